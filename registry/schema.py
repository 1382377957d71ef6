"""The tables, made by sqlite-utils' Migrations, each in a transaction. Add a migration; never edit one that
was released.
"""

import json
from contextlib import closing
from pathlib import Path

from sqlite_utils import Database, Migrations

from registry.errors import InvalidFile
from registry.finding import head
from registry.needs import note
from registry.writer import Writer

migrations = Migrations("atelier")


def upgrade(db: Database, path: Path) -> None:
    """Makes what is missing of the tables. Raises InvalidFile when a later release has made others."""
    with closing(Database(memory=True)) as empty:
        known = {migration.name for migration in migrations.pending(empty)}
    if later := {migration.name for migration in migrations.applied(db)} - known:
        raise InvalidFile(
            f"{path} was written by a later release of Atelier ({max(later)}); serve it with that"
        )
    migrations.apply(db)


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m001_assets_versions_aliases(db: Database) -> None:
    """A version row points to a blob by digest; `facts` is JSON computed at check-in and never changed."""
    db["assets"].create({"name": str, "created_at": str}, pk="name", strict=True)
    db["versions"].create(
        {
            "name": str,
            "number": int,
            "digest": str,
            "size_bytes": int,
            "kind": str,
            "card": bytes,
            "card_digest": str,
            "facts": str,
            "recipe": str,
            "created_at": str,
        },
        pk=("name", "number"),
        not_null={"digest", "size_bytes", "kind", "card_digest", "facts", "created_at"},
        foreign_keys=[("name", "assets", "name")],
        strict=True,
    )
    db["versions"].create_index(["digest"])
    db["aliases"].create(
        {"name": str, "alias": str, "number": int},
        pk=("name", "alias"),
        not_null={"number"},
        foreign_keys=[("name", "assets", "name")],
        strict=True,
    )
    db["requests"].create(
        {"request_id": str, "name": str, "number": int},
        pk="request_id",
        not_null={"name", "number"},
        strict=True,
    )


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m002_digests_deletion_events(db: Database) -> None:
    """Digests beside the file's; soft deletion; an event for every change, numbered without a gap."""
    versions = db["versions"]
    versions.add_column("body_digest", str, not_null_default="")
    versions.add_column("tensor_digest", str, not_null_default="")
    versions.add_column("deleted_at", str)
    versions.add_column("purged_at", str)
    versions.create_index(["tensor_digest"])
    db["events"].create(
        {
            "seq": int,
            "at": str,
            "actor": str,
            "action": str,
            "name": str,
            "number": int,
            "detail": str,
        },
        pk="seq",
        not_null={"at", "actor", "action", "name", "number", "detail"},
        strict=True,
    )


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m003_finding(db: Database) -> None:
    """What versions are filtered by, and the full text they are found by; `m005` fills what replaces it."""
    db["labels"].create(
        {"version": int, "field": str, "value": str},
        pk=("field", "value", "version"),
        not_null={"version"},
        strict=True,
    )
    db.execute("create virtual table search using fts5(words, tokenize='unicode61 remove_diacritics 2')")


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m004_card_revisions_previews_projections(db: Database) -> None:
    """Cards keep every revision; pictures shown with versions; projections by which likes are found; the
    newest version of each asset, which alone is searched (`m005` fills what replaces it); and `stored`, every
    file that must be there with the version that needs it.
    """
    db["cards"].create(
        {
            "name": str,
            "version": int,
            "number": int,
            "digest": str,
            "card": bytes,
            "at": str,
            "actor": str,
        },
        pk=("name", "version", "number"),
        not_null={"digest", "card", "at", "actor"},
        strict=True,
    )
    db.execute(
        "insert into cards select name, number, 1, card_digest, coalesce(card, x''), created_at, ''"
        " from versions"
    )
    db["previews"].create(
        {"name": str, "number": int, "digest": str, "width": int, "height": int, "caption": str},
        pk=("name", "number", "digest"),
        not_null={"width", "height", "caption"},
        strict=True,
    )
    db["projections"].create(
        {"version": int, "space": str, "vector": bytes},
        pk="version",
        not_null={"space", "vector"},
        strict=True,
    )
    db["projections"].create_index(["space"])
    db["labels"].create_index(["version"])
    db.create_view(
        "stored",
        "select digest, name, number, '' as what, deleted_at, purged_at from versions"
        " union all select p.digest, p.name, p.number, 'preview of ', v.deleted_at, v.purged_at"
        " from previews p join versions v on v.name = p.name and v.number = p.number",
    )
    db["heads"].create({"version": int, "name": str}, pk="version", not_null={"name"}, strict=True)
    db["heads"].create_index(["name"], unique=True)
    db.execute("drop table search")
    tokens = "tokenize='unicode61 remove_diacritics 2', prefix='1 2 3'"
    db.execute(f"create virtual table search using fts5(words, {tokens})")


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m005_places_members(db: Database) -> None:
    """Heads have places in the order of names, which are their rows in the full text; labels are words there.
    `needs` are the digests that a version names of others: a saved stack its members', a merge its parents'.
    """
    writer = Writer(db.conn)
    db["needs"].create(
        {"digest": str, "version": int, "what": str},
        pk=("digest", "version"),
        not_null={"what"},
        strict=True,
    )
    for row in writer.query("select rowid as id, facts, recipe from versions"):
        note(writer, row["id"], json.loads(row["facts"]), json.loads(row["recipe"] or "{}"))
    db["labels"].drop()
    db["heads"].drop()
    db["heads"].create(
        {"place": int, "version": int, "name": str, "created_at": str},
        pk="place",
        not_null={"version", "name", "created_at"},
        strict=True,
    )
    db["heads"].create_index(["name"], unique=True)
    db.execute("drop table search")
    tokens = "tokenize='unicode61 remove_diacritics 2', prefix='1 2 3'"
    db.execute(f"create virtual table search using fts5(words, {tokens})")
    for row in writer.query("select name from assets order by name"):
        head(writer, row["name"])


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m006_hub_links(db: Database) -> None:
    """Which asset is which repository of a Hub, and what both held when they were last the same
    (`registry.hub.state`); `under_way` is what a push or pull has begun, JSON.
    """
    db["hub_links"].create(
        {
            "name": str,
            "endpoint": str,
            "repo": str,
            "file": str,
            "strip": int,
            "number": int,
            "digest": str,
            "card_digest": str,
            "commit_id": str,
            "oids": str,
            "pictures": str,
            "under_way": str,
            "synced_at": str,
        },
        pk="name",
        not_null={
            "endpoint", "repo", "file", "strip", "number", "digest", "card_digest", "commit_id", "oids",
            "pictures", "under_way", "synced_at",
        },
        foreign_keys=[("name", "assets", "name")],
        strict=True,
    )  # fmt: skip
    db["hub_links"].create_index(["repo"])


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m007_jobs(db: Database) -> None:
    """Jobs, what happened to them, their pictures, and those that they start from: `stored` as long as their
    job is there.
    """
    db["jobs"].create(
        {
            "number": int,
            "name": str,
            "state": str,
            "creator": str,
            "priority": int,
            "order_json": str,
            "request_id": str,
            "fingerprint": str,
            "created_at": str,
            "ended_at": str,
            "expires_at": str,
            "told": str,
        },
        pk="number",
        not_null={"name", "state", "creator", "priority", "order_json", "fingerprint", "created_at", "told"},
        strict=True,
    )
    db["jobs"].create_index(["name"], unique=True)
    db["jobs"].create_index(["creator", "request_id"], unique=True)  # nulls differ
    db["jobs"].create_index(["state"])
    db["jobs"].create_index(["expires_at"])
    db["job_events"].create(
        {"job": str, "sequence": int, "at": str, "detail": str},
        pk=("job", "sequence"),
        not_null={"at", "detail"},
        strict=True,
    )
    db["job_images"].create(
        {"job": str, "image": int, "digest": str, "size_bytes": int},
        pk=("job", "image"),
        not_null={"digest", "size_bytes"},
        strict=True,
    )
    db["job_images"].create_index(["digest"])
    db["job_inputs"].create(
        {"job": str, "what": str, "digest": str}, pk=("job", "what"), not_null={"digest"}, strict=True
    )
    db["job_inputs"].create_index(["digest"])
    (before,) = db.execute("select sql from sqlite_master where name = 'stored'").fetchone()
    db["stored"].drop()
    images = "select digest, job, image, 'picture of job ', null, null from job_images"
    inputs = "select digest, job, 0, what || ' of job ', null, null from job_inputs"
    db.execute(f"{before} union all {images} union all {inputs}")


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m008_versions_without_body_digest(db: Database) -> None:
    """The few versions whose body was not read yet are found without looking at the others."""
    db.execute("create index idx_versions_no_body on versions(digest) where body_digest = ''")


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m009_composed_text(db: Database) -> None:
    """What is searched has letters and their accents in one (`registry.finding.composed`)."""
    writer = Writer(db.conn)
    for row in writer.query("select name from assets order by name"):
        head(writer, row["name"])


@migrations()  # type: ignore[untyped-decorator]  # sqlite-utils ships no types
def m010_tensor_samples(db: Database) -> None:
    """By which versions that may hold the same tensors are found; those of earlier releases by their size."""
    db["versions"].add_column("tensor_sample", str, not_null_default="")
    db["versions"].create_index(["tensor_sample", "size_bytes"])
