"""What nobody names any more: versions deleted long ago, and files that no version has.

Files go once it is durable that nobody names them, before anybody else writes: whenever a collection is cut,
what is left over are files that the next one takes.
"""

from datetime import UTC, datetime, timedelta
from functools import partial

from registry.blobs import BlobStore
from registry.database import CatalogDatabase
from registry.needs import held_by_merges
from registry.records import ALL, Garbage, version


def collect(
    db: CatalogDatabase,
    blobs: BlobStore,
    *,
    retention: timedelta,
    grace: timedelta,
    dry_run: bool = False,
    actor: str = "",
) -> Garbage:
    """Purges versions deleted longer than `retention` ago, and files that no version names; none that a
    merge was made of, as long as the merge is there.

    No file younger than `grace` goes: a check-in may be about to name it.
    """
    moment, size = datetime.now(UTC), 0
    with db.write():
        expired = (moment - retention).isoformat()
        held = held_by_merges(db.query, expired)
        past = [
            version(row)
            for row in db.query(
                f"{ALL} where v.deleted_at < ? and v.purged_at is null order by v.name, v.number", expired
            )
        ]
        gone = [found for found in past if found.ref not in held]
        named = _named(db, "purged_at is null")
        kept = _named(db, "purged_at is null and (deleted_at is null or deleted_at >= ?)", expired)
        for found in past:
            if found.ref in held:
                kept |= {found.digest} | _named(db, "name = ? and number = ?", found.name, found.number)
        orphans = []
        for digest, info in blobs.files():
            if digest in kept or moment.timestamp() - info.st_mtime < grace.total_seconds():
                continue
            size += info.st_size
            if digest not in named:
                orphans.append(digest)
            if not dry_run:
                db.then(partial(blobs.remove, digest))
        for found in gone if not dry_run else ():
            place = found.name, found.number
            sql = "update versions set purged_at = ? where name = ? and number = ?"
            db.tables.execute(sql, moment.isoformat(), *place)
            db.tables.execute("delete from previews where name = ? and number = ?", *place)
            db.event(actor, "purge", *place, {"digest": found.digest})
    return Garbage(tuple(found.ref for found in gone), tuple(orphans), size, tuple(held.items()))


def _named(db: CatalogDatabase, where: str, *parameters: object) -> set[str]:
    return {
        row["digest"] for row in db.query(f"select distinct digest from stored where {where}", *parameters)
    }
