"""The catalog: assets with immutable, numbered versions, and aliases that move.

On disk: `DIR/lock` (held while open), `DIR/catalog.db` (SQLite, WAL, synchronous=FULL), `DIR/blobs`,
`DIR/tmp`. Invariants: one process owns a catalog and one connection writes; a row is written after its blob
is durable, so every version that was ever acknowledged has its bytes; numbers count from 1 without a gap and
are never used again; every change is an event, in the transaction that makes it. A deleted version is hidden,
and comes back whole until `collect_garbage` has purged its bytes.
"""

import fcntl
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from registry.blobs import BlobStore, Upload
from registry.digests import NO_DIGESTS, Digests
from registry.errors import Conflict, InvalidName, Locked, NotFound
from registry.finding import Query, index
from registry.refs import Ref, check_alias, check_name, parse
from registry.schema import migrations

_ALL = "select v.*, (select json_group_array(a.alias) from (select alias from aliases where name = v.name"
_ALL += " and number = v.number order by alias) a) as alias_list from versions v"
_SELECT = f"{_ALL} where v.deleted_at is null"


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version. `facts` and `recipe` are JSON objects; `aliases` are those that name it at this
    moment.
    """

    name: str
    number: int
    digest: str
    size_bytes: int
    kind: str
    card_digest: str
    facts: dict[str, Any]
    recipe: dict[str, Any] | None
    created_at: datetime
    aliases: tuple[str, ...]
    digests: Digests
    deleted_at: datetime | None

    @property
    def ref(self) -> str:
        """`hero:3`."""
        return f"{self.name}:{self.number}"


@dataclass(frozen=True, slots=True)
class Event:
    """A change. `seq` counts from 1 without a gap; `detail` is a JSON object that depends on `action`:
    `checkin`, `merge`, `alias`, `delete`, `undelete`, `purge`.
    """

    seq: int
    at: datetime
    actor: str
    action: str
    name: str
    number: int
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection removed, or would: versions whose bytes are gone, files nobody names, bytes freed."""

    versions: tuple[str, ...]
    orphans: tuple[str, ...]
    size_bytes: int


class Catalog:
    """Opens the catalog in a directory, making it if need be. Raises Locked when another process has it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._lock_file = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise Locked(f"{root} is in use by another process; stop it, or choose another --data") from None
        self.blobs = BlobStore(root)
        self._mutex = threading.RLock()
        self._listeners: list[Callable[[], object]] = []
        self._connection = sqlite3.connect(root / "catalog.db", timeout=30, check_same_thread=False)
        for pragma in ("journal_mode=wal", "synchronous=full", "foreign_keys=on", "trusted_schema=off"):
            self._connection.execute(f"pragma {pragma}")
        self._db = Database(self._connection)
        migrations.apply(self._db)

    def close(self) -> None:
        """Gives the directory back."""
        self._connection.close()
        self._lock_file.close()

    @contextmanager
    def _write(self) -> Iterator[None]:
        # BEGIN IMMEDIATE: sqlite-utils' atomic() defers, and a deferred transaction fails when it upgrades.
        with self._mutex:
            self._connection.execute("begin immediate")
            try:
                yield
            except BaseException:
                self._connection.rollback()
                raise
            self._connection.commit()
        for listener in tuple(self._listeners):
            listener()

    def _rows(self, sql: str, *parameters: object) -> list[Version]:
        with self._mutex:
            return [_version(row) for row in self._db.query(sql, parameters)]

    def add(
        self,
        upload: Upload,
        *,
        name: str,
        kind: str,
        facts: dict[str, Any],
        card: bytes = b"",
        recipe: dict[str, Any] | None = None,
        alias: str = "",
        request_id: str = "",
        digests: Digests = NO_DIGESTS,
        actor: str = "",
    ) -> tuple[Version, bool]:
        """Makes the uploaded bytes the next version of `name`; the version, and whether it is new.

        The same bytes with the same card and the same `facts["declared"]` (what the artist said besides) are
        the version that holds them already; when it was deleted, it is back. The same `request_id` is the
        same call. Raises InvalidName, Conflict (the asset is of another kind, or the id was used for
        another asset).
        """
        check_name(name)
        if alias:
            check_alias(alias)
        digest, size = upload.finish(), upload.size
        if earlier := self._repeated(name, kind, digest, request_id):  # before the bytes are kept
            return earlier, False
        upload.commit()
        with self._write():
            if earlier := self._repeated(name, kind, digest, request_id):  # and again, alone now
                return earlier, False
            rows = self._rows(f"{_ALL} where v.name = ? order by v.number desc", name)
            card_digest = hashlib.sha256(card).hexdigest() if card else ""
            same = [
                row
                for row in rows
                if (row.digest, row.card_digest) == (digest, card_digest)
                and row.facts.get("declared") == facts.get("declared")
            ]
            number = same[0].number if same else (rows[0].number + 1 if rows else 1)
            if not same:
                now = _now()
                self._db["assets"].insert({"name": name, "created_at": now}, ignore=True)
                self._db["versions"].insert(
                    {
                        "name": name,
                        "number": number,
                        "digest": digest,
                        "size_bytes": size,
                        "kind": kind,
                        "card": card,
                        "card_digest": card_digest,
                        "facts": json.dumps(facts, sort_keys=True),
                        "recipe": json.dumps(recipe, sort_keys=True) if recipe else None,
                        "created_at": now,
                        "body_digest": digests.body,
                        "tensor_digest": digests.tensors,
                    }
                )
                (rowid,) = self._connection.execute(
                    "select rowid from versions where name = ? and number = ?", (name, number)
                ).fetchone()
                index(self._db, rowid, name, kind, facts, card)
                action = "merge" if recipe else "checkin"
                self._event(actor, action, name, number, {"digest": digest, "kind": kind})
            elif same[0].deleted_at:
                self._restore(actor, same[0])
            if alias:
                self._point(actor, name, alias, number)
            if request_id:
                self._db["requests"].insert({"request_id": request_id, "name": name, "number": number})
        return self.resolve(f"{name}:{number}"), not same

    def _repeated(self, name: str, kind: str, digest: str, request_id: str) -> Version | None:
        """The version an earlier call with this id made. Raises Conflict when this call can make none."""
        with self._mutex:
            for row in self._db["requests"].rows_where("request_id = ?", [request_id or None]):
                earlier = self.resolve(f"{row['name']}:{row['number']}")
                if (earlier.name, earlier.digest) != (name, digest):
                    raise Conflict(
                        f"request id {request_id!r} was used for {earlier.ref}, of other bytes or name",
                        field="request_id",
                    )
                return earlier
            rows = self._rows(f"{_ALL} where v.name = ? order by v.number desc limit 1", name)
        if rows and rows[0].kind != kind:
            raise Conflict(
                f"{name!r} holds {rows[0].kind}, this is {kind}; choose another name", field="name"
            )
        return None

    def resolve(self, text: str) -> Version:
        """The version a reference names now. Raises InvalidName, NotFound."""
        ref = parse(text)
        found = self._rows(*_query(ref))
        if found:
            return found[0]
        if ref.digest or not self._rows(f"{_ALL} where v.name = ? limit 1", ref.name):
            raise NotFound(
                f"there is no {text!r} in the catalog; `atelier list` shows what there is", field="ref"
            )
        if self._rows(f"{_ALL} where v.name = ? and v.number = ?", ref.name, str(ref.number)):
            raise NotFound(f"{text} was deleted; `atelier undelete {text}` brings it back", field="ref")
        raise NotFound(
            f"{ref.name!r} has no {text!r}; `atelier history {ref.name}` shows what it has", field="ref"
        )

    def card(self, version: Version) -> bytes:
        """The version's card, byte for byte; empty when it has none."""
        with self._mutex:
            row = self._db["versions"].get((version.name, version.number))
        return bytes(row["card"] or b"")

    def history(self, name: str) -> list[Version]:
        """Every version of an asset, deleted ones too, newest first. Raises InvalidName, NotFound."""
        rows = self._rows(f"{_ALL} where v.name = ? order by v.number desc", check_name(name))
        if not rows:
            raise NotFound(
                f"there is no {name!r} in the catalog; `atelier list` shows what there is", field="name"
            )
        return rows

    def newest(self, *, after: str = "", limit: int = 100, query: Query | None = None) -> list[Version]:
        """The newest version of each asset whose name sorts after `after`, in order of name; only those that
        `query` asks for.
        """
        where, parameters = (query or Query()).sql()
        return self._rows(
            f"{_SELECT} and v.name > ?"
            " and v.number = (select max(number) from versions where name = v.name and deleted_at is null)"
            f"{where} order by v.name limit ?",
            after,
            *parameters,
            limit,
        )

    def with_digest(self, digest: str) -> list[Version]:
        """Every version that holds these bytes, oldest first."""
        return self._rows(f"{_SELECT} and v.digest = ? order by v.created_at, v.name", digest)

    def with_tensors(self, digest: str) -> list[Version]:
        """Every version that holds these tensors, whatever the header, oldest first."""
        return self._rows(f"{_SELECT} and v.tensor_digest = ? order by v.created_at, v.name", digest or None)

    def set_alias(
        self, name: str, alias: str, number: int, *, expected: int | None = None, actor: str = ""
    ) -> tuple[Version, int]:
        """Points an alias at a version; that version, and the number it named before (0: it is new).

        `expected` is the number the caller believes it names now: when it does not, Conflict, and nothing
        moves. Raises InvalidName, NotFound.
        """
        check_name(name)
        check_alias(alias)
        with self._write():
            version = self.resolve(f"{name}:{number}")
            rows = list(self._db["aliases"].rows_where("name = ? and alias = ?", [name, alias]))
            previous = rows[0]["number"] if rows else 0
            if expected is not None and expected != previous:
                now = f"names {name}:{previous}" if previous else "does not exist"
                raise Conflict(
                    f"{name}@{alias} {now}, not {expected} as you thought; look, then try again",
                    field="alias",
                )
            self._point(actor, name, alias, number)
        return self.resolve(version.ref), previous

    def _point(self, actor: str, name: str, alias: str, number: int) -> None:
        self._db["aliases"].upsert({"name": name, "alias": alias, "number": number}, pk=("name", "alias"))
        self._event(actor, "alias", name, number, {"alias": alias})

    def delete(self, ref: str, *, actor: str = "") -> Version:
        """Hides a version; `undelete` brings it back until its bytes are purged. Raises InvalidName,
        NotFound, and Conflict while an alias names it or a saved stack is made of it.
        """
        with self._write():
            version = self.resolve(ref)
            if version.aliases:
                raise Conflict(
                    f"{version.name}@{version.aliases[0]} names {version.ref}; move the alias first",
                    field="ref",
                )
            needed = Query(labels=[("member", version.digest)]).sql()
            users = self._rows(f"{_SELECT}{needed[0]} order by v.name, v.number", *needed[1])
            same = [
                other
                for other in self.with_digest(version.digest)
                if other.ref != version.ref and other.facts.get("declared") == version.facts.get("declared")
            ]
            if users and not same:
                raise Conflict(f"{users[0].ref} is made of {version.ref}; delete that first", field="ref")
            self._update(version, {"deleted_at": _now()})
            self._event(actor, "delete", version.name, version.number, {"digest": version.digest})
        return version

    def undelete(self, ref: str, *, actor: str = "") -> Version:
        """Brings a deleted version back, by `hero:3`. Raises InvalidName, NotFound (it was never there), and
        Conflict when it is not deleted, or purged.
        """
        asked = parse(ref)
        if asked.number is None:
            raise InvalidName(f"{ref!r} may name several; say which, {asked.name or 'hero'}:3", field="ref")
        with self._write():
            found = self._rows(f"{_ALL} where v.name = ? and v.number = ?", asked.name, str(asked.number))
            if not found:
                raise NotFound(f"{ref!r} was never there", field="ref")
            if not found[0].deleted_at:
                raise Conflict(f"{ref!r} is not deleted", field="ref")
            if not self.blobs.path(found[0].digest).exists():
                raise Conflict(f"the bytes of {ref!r} are purged; check the file in again", field="ref")
            self._restore(actor, found[0])
        return self.resolve(ref)

    def _restore(self, actor: str, version: Version) -> None:
        self._update(version, {"deleted_at": None, "purged_at": None})
        self._event(actor, "undelete", version.name, version.number, {"digest": version.digest})

    def _update(self, version: Version, values: dict[str, str | None]) -> None:
        self._db["versions"].update((version.name, version.number), values)

    def _event(self, actor: str, action: str, name: str, number: int, detail: dict[str, Any]) -> None:
        self._db["events"].insert(
            {
                "at": _now(),
                "actor": actor,
                "action": action,
                "name": name,
                "number": number,
                "detail": json.dumps(detail, sort_keys=True),
            }
        )

    def events(self, since: int = 0, *, limit: int = 1000) -> list[Event]:
        """Changes with `seq` above `since`, in order."""
        with self._mutex:
            rows = list(
                self._db.query("select * from events where seq > ? order by seq limit ?", (since, limit))
            )
        return [
            Event(**row | {"at": datetime.fromisoformat(row["at"]), "detail": json.loads(row["detail"])})
            for row in rows
        ]

    @contextmanager
    def listening(self, listener: Callable[[], object]) -> Iterator[None]:
        """Within, calls `listener` after every change, on the thread that made it."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def collect_garbage(
        self, *, retention: timedelta, grace: timedelta, dry_run: bool = False, actor: str = ""
    ) -> Garbage:
        """Purges versions deleted longer than `retention` ago, and files that no version names.

        No file younger than `grace` goes: a check-in may be about to name it.
        """
        now, size = datetime.now(UTC), 0
        with self._write():
            expired = (now - retention).isoformat()
            gone = self._rows(
                f"{_ALL} where v.deleted_at < ? and v.purged_at is null order by v.name, v.number", expired
            )
            named = self._named("purged_at is null")
            kept = self._named("purged_at is null and (deleted_at is null or deleted_at >= ?)", expired)
            orphans = []
            for digest, info in self.blobs.files():
                if digest in kept or now.timestamp() - info.st_mtime < grace.total_seconds():
                    continue
                size += info.st_size
                if digest not in named:
                    orphans.append(digest)
                if not dry_run:
                    self.blobs.remove(digest)
            for version in gone if not dry_run else ():
                self._update(version, {"purged_at": now.isoformat()})
                self._event(actor, "purge", version.name, version.number, {"digest": version.digest})
        return Garbage(tuple(version.ref for version in gone), tuple(orphans), size)

    def _named(self, where: str, *parameters: str) -> set[str]:
        sql = f"select distinct digest from versions where {where}"
        return {row["digest"] for row in self._db.query(sql, parameters)}


def _query(ref: Ref) -> tuple[str, ...]:
    if ref.digest:
        return f"{_SELECT} and v.digest = ? order by v.created_at limit 1", ref.digest
    if ref.number is not None:
        return f"{_SELECT} and v.name = ? and v.number = ?", ref.name, str(ref.number)
    if ref.alias:
        join = "join aliases b on b.name = v.name and b.number = v.number"
        return f"{_ALL} {join} where v.deleted_at is null and b.name = ? and b.alias = ?", ref.name, ref.alias
    return f"{_SELECT} and v.name = ? order by v.number desc limit 1", ref.name


def _version(row: dict[str, Any]) -> Version:
    return Version(
        name=row["name"],
        number=row["number"],
        digest=row["digest"],
        size_bytes=row["size_bytes"],
        kind=row["kind"],
        card_digest=row["card_digest"],
        facts=json.loads(row["facts"]),
        recipe=json.loads(row["recipe"]) if row["recipe"] else None,
        created_at=datetime.fromisoformat(row["created_at"]),
        aliases=tuple(json.loads(row["alias_list"])),
        digests=Digests(row["body_digest"], row["tensor_digest"]),
        deleted_at=datetime.fromisoformat(row["deleted_at"]) if row["deleted_at"] else None,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat()
