"""The catalog: assets with immutable, numbered versions, and aliases that move.

On disk: `DIR/lock` (held while open), `DIR/catalog.db` (SQLite, WAL, synchronous=FULL), `DIR/blobs`,
`DIR/tmp`. Invariants: one process owns a catalog and one connection writes; a row is written after its blob
is durable, so every version that was ever acknowledged has its bytes; numbers count from 1 without a gap and
are never used again.
"""

import fcntl
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from registry.blobs import BlobStore, Upload
from registry.errors import Conflict, Locked, NotFound
from registry.refs import Ref, check_alias, check_name, parse
from registry.schema import migrations

_SELECT = "select v.*, (select json_group_array(a.alias) from (select alias from aliases where name = v.name"
_SELECT += " and number = v.number order by alias) a) as alias_list from versions v"


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

    @property
    def ref(self) -> str:
        """`hero:3`."""
        return f"{self.name}:{self.number}"


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
    ) -> tuple[Version, bool]:
        """Makes the uploaded bytes the next version of `name`; the version, and whether it is new.

        The same bytes with the same card and the same `facts["declared"]` (what the artist said besides) are
        the version that holds them already. The same `request_id` is the same call. Raises InvalidName,
        Conflict (the asset is of another kind, or the id was used for another asset).
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
            rows = self._rows(f"{_SELECT} where v.name = ? order by v.number desc", name)
            card_digest = hashlib.sha256(card).hexdigest() if card else ""
            same = [
                row
                for row in rows
                if (row.digest, row.card_digest) == (digest, card_digest)
                and row.facts.get("declared") == facts.get("declared")
            ]
            number = same[0].number if same else (rows[0].number + 1 if rows else 1)
            if not same:
                now = datetime.now(UTC).isoformat()
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
                    }
                )
            if alias:
                self._db["aliases"].upsert(
                    {"name": name, "alias": alias, "number": number}, pk=("name", "alias")
                )
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
            rows = self._rows(f"{_SELECT} where v.name = ? order by v.number desc limit 1", name)
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
        if ref.digest or not self._rows(f"{_SELECT} where v.name = ? limit 1", ref.name):
            raise NotFound(
                f"there is no {text!r} in the catalog; `atelier list` shows what there is", field="ref"
            )
        raise NotFound(
            f"{ref.name!r} has no {text!r}; `atelier history {ref.name}` shows what it has", field="ref"
        )

    def card(self, version: Version) -> bytes:
        """The version's card, byte for byte; empty when it has none."""
        with self._mutex:
            row = self._db["versions"].get((version.name, version.number))
        return bytes(row["card"] or b"")

    def history(self, name: str) -> list[Version]:
        """Every version of an asset, newest first. Raises InvalidName, NotFound."""
        rows = self._rows(f"{_SELECT} where v.name = ? order by v.number desc", check_name(name))
        if not rows:
            raise NotFound(
                f"there is no {name!r} in the catalog; `atelier list` shows what there is", field="name"
            )
        return rows

    def newest(self, *, after: str = "", limit: int = 100) -> list[Version]:
        """The newest version of each asset whose name sorts after `after`, in order of name."""
        return self._rows(
            f"{_SELECT} where v.name > ?"
            " and v.number = (select max(number) from versions where name = v.name) order by v.name limit ?",
            after,
            limit,
        )

    def with_digest(self, digest: str) -> list[Version]:
        """Every version that holds these bytes, oldest first."""
        return self._rows(f"{_SELECT} where v.digest = ? order by v.created_at, v.name", digest)

    def set_alias(
        self, name: str, alias: str, number: int, *, expected: int | None = None
    ) -> tuple[Version, int]:
        """Points an alias at a version; that version, and the number it named before (0: it is new).

        `expected` is the number the caller believes it names now: when it does not, Conflict, and nothing
        moves. Raises InvalidName, NotFound.
        """
        version = self.resolve(f"{check_name(name)}:{number}")
        check_alias(alias)
        with self._write():
            rows = list(self._db["aliases"].rows_where("name = ? and alias = ?", [name, alias]))
            previous = rows[0]["number"] if rows else 0
            if expected is not None and expected != previous:
                now = f"names {name}:{previous}" if previous else "does not exist"
                raise Conflict(
                    f"{name}@{alias} {now}, not {expected} as you thought; look, then try again",
                    field="alias",
                )
            self._db["aliases"].upsert({"name": name, "alias": alias, "number": number}, pk=("name", "alias"))
        return self.resolve(version.ref), previous


def _query(ref: Ref) -> tuple[str, ...]:
    if ref.digest:
        return f"{_SELECT} where v.digest = ? order by v.created_at limit 1", ref.digest
    if ref.number is not None:
        return f"{_SELECT} where v.name = ? and v.number = ?", ref.name, str(ref.number)
    if ref.alias:
        join = "join aliases b on b.name = v.name and b.number = v.number"
        return f"{_SELECT} {join} where b.name = ? and b.alias = ?", ref.name, ref.alias
    return f"{_SELECT} where v.name = ? order by v.number desc limit 1", ref.name


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
    )
