"""The tables, made by sqlite-utils' Migrations, each in a transaction. Add a migration; never edit one that
was released.
"""

from sqlite_utils import Database, Migrations

migrations = Migrations("atelier")


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
