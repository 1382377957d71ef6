"""The catalog: assets with immutable, numbered versions, and aliases that move.

On disk: `DIR/lock` (held while open), `DIR/catalog.db` (SQLite, WAL, synchronous=FULL), `DIR/blobs`,
`DIR/tmp`. Invariants: one process owns a catalog; a row is written after its blob
is durable, so every version that was ever acknowledged has its bytes; numbers count from 1 without a gap and
are never used again; every change is an event, in the transaction that makes it. A deleted version is hidden,
and comes back whole until `collect_garbage` has purged its bytes.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from registry.blobs import BlobStore, Upload
from registry.bodies import Bodies
from registry.database import CatalogDatabase
from registry.derived import Derived
from registry.digests import NO_DIGESTS, Digests
from registry.errors import Conflict, InvalidName, Moved, NotFound
from registry.finding import Query, head
from registry.garbage import collect
from registry.jobs import Jobs
from registry.nearest import Nearby, Projection
from registry.needs import check_members, note
from registry.previews import Previews
from registry.records import (
    ALL,
    LIVE,
    CardRevision,
    Event,
    Garbage,
    Version,
    event,
    now,
    query,
    version,
)
from registry.refs import check_alias, check_name, parse

PROJECTED = "select p.version, p.space, p.vector from projections p join versions v on v.rowid = p.version"


class Catalog:
    """Opens the catalog in a directory, making it if need be. Raises Locked when another process has it."""

    def __init__(self, root: Path) -> None:
        self._db = CatalogDatabase(root)
        self.blobs, self.derived = BlobStore(root), Derived(root)
        self.close, self.listening, self.database = self._db.close, self._db.listening, self._db
        self.bodies = Bodies(self._db, self.blobs)
        self.jobs, self._nearby = Jobs(self._db, self.blobs), Nearby(self._projections)
        shown = Previews(self._db, self.blobs, self.resolve)
        self.previews, self.add_preview, self.remove_preview = shown.of, shown.add, shown.remove

    def _rows(self, sql: str, *parameters: object) -> list[Version]:
        return [version(row) for row in self._db.query(sql, *parameters)]

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
        projection: Projection | None = None,
        seen: Version | None = None,
        first: bool = False,
        actor: str = "",
    ) -> tuple[Version, bool]:
        """Makes the uploaded bytes the next version of `name`; the version, and whether it is new.

        The same bytes with the same card (or one the version had before it was edited) and the same
        `facts["declared"]` (what the artist said besides) are the version that holds them already; when it
        was deleted, it is back. The same `request_id` is the
        same call. `seen` is the version that has to be the newest still, with the card it has there; to be
        the `first`, no version may be there. Raises InvalidName, Conflict (the asset is of another kind, or
        the id was used for another asset), Moved.
        """
        check_name(name)
        if alias:
            check_alias(alias)
        digest, size = upload.finish(), upload.size
        if earlier := self._repeated(name, kind, digest, request_id):  # before the bytes are kept
            return earlier, False
        upload.commit()
        with self._db.write():
            if earlier := self._repeated(name, kind, digest, request_id):  # and again, alone now
                return earlier, False
            if seen:
                self._check_newest(seen)
            if first:
                self._check_nothing(name)
            self.blobs.check_kept(digest)
            check_members(self._db.query, facts)
            rows = self._rows(f"{ALL} where v.name = ? and v.digest = ? order by v.number desc", name, digest)
            card_digest = _digest(card)
            with_card = self._db.query(
                "select distinct version from cards where name = ? and digest = ?", name, card_digest
            )
            numbers = {row["version"] for row in with_card}
            same = [
                row
                for row in rows
                if row.number in numbers and row.facts.get("declared") == facts.get("declared")
            ]
            number = same[0].number if same else self._newest_number(name) + 1
            if not same:
                at = now()
                self._db.tables.insert("assets", {"name": name, "created_at": at}, clash="ignore")
                self._db.tables.insert(
                    "versions",
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
                        "created_at": at,
                        "body_digest": digests.body,
                        "tensor_digest": digests.tensors,
                        "tensor_sample": digests.sample,
                    },
                )
                note(self._db.tables, self._rowid(name, number), facts, recipe or {})
                head(self._db.tables, name)
                self._revise(actor, name, number, 1, card)
                if projection:
                    self._project(name, number, projection)
                action = "merge" if recipe else "checkin"
                self._db.event(actor, action, name, number, {"digest": digest, "kind": kind})
            elif same[0].deleted_at:
                self._restore(actor, same[0])
            if alias:
                self._point(actor, name, alias, number)
            if request_id:
                row = {"request_id": request_id, "name": name, "number": number}
                self._db.tables.insert("requests", row)
            return self.resolve(f"{name}:{number}"), not same

    def _newest_number(self, name: str) -> int:
        (row,) = self._db.query("select max(number) as n from versions where name = ?", name)
        return row["n"] or 0

    def _repeated(self, name: str, kind: str, digest: str, request_id: str) -> Version | None:
        """The version an earlier call with this id made. Raises Conflict when this call can make none."""
        if earlier := self.made_by(request_id):
            if (earlier.name, earlier.digest) != (name, digest):
                raise Conflict(
                    f"request id {request_id!r} was used for {earlier.ref}, of other bytes or name",
                    field="request_id",
                )
            return earlier
        rows = self._rows(f"{ALL} where v.name = ? order by v.number desc limit 1", name)
        if rows and rows[0].kind != kind:
            raise Conflict(
                f"{name!r} holds {rows[0].kind}, this is {kind}; choose another name", field="name"
            )
        return None

    def made_by(self, request_id: str) -> Version | None:
        """The version that the call with this id made."""
        for row in self._db.query("select * from requests where request_id = ?", request_id or None):
            return self._rows(f"{ALL} where v.name = ? and v.number = ?", row["name"], row["number"])[0]
        return None

    def resolve(self, text: str) -> Version:
        """The version a reference names now. Raises InvalidName, NotFound."""
        ref = parse(text)
        found = self._rows(*query(ref))
        if found:
            return found[0]
        if ref.digest or not self._rows(f"{ALL} where v.name = ? limit 1", ref.name):
            raise NotFound(
                f"there is no {text!r} in the catalog; `atelier list` shows what there is", field="ref"
            )
        if self._rows(f"{ALL} where v.name = ? and v.number = ?", ref.name, str(ref.number)):
            raise NotFound(f"{text} was deleted; `atelier undelete {text}` brings it back", field="ref")
        raise NotFound(
            f"{ref.name!r} has no {text!r}; `atelier history {ref.name}` shows what it has", field="ref"
        )

    def card(self, version: Version) -> bytes:
        """The version's card, byte for byte; empty when it has none."""
        (row,) = self._db.query(
            "select card from versions where name = ? and number = ?", version.name, version.number
        )
        return bytes(row["card"] or b"")

    def card_revisions(self, version: Version) -> list[CardRevision]:
        """Every card the version had, oldest first; the last is its card now."""
        rows = self._db.query(
            "select number, digest, card, at, actor from cards where name = ? and version = ?"
            " order by number",
            version.name,
            version.number,
        )
        return [
            CardRevision(**row | {"at": datetime.fromisoformat(row["at"]), "card": bytes(row["card"])})
            for row in rows
        ]

    def set_card(
        self,
        ref: str,
        card: bytes,
        facts: dict[str, Any],
        *,
        expected: str | None = None,
        seen: Version | None = None,
        actor: str = "",
    ) -> tuple[Version, int]:
        """Gives a version another card, as its next revision; the version, and the revision's number. The
        card it has already makes none.

        `facts` replaces those of the version that come from the card. `expected` is the `card_digest` the
        caller has seen: when it is another by now, Conflict, and nothing changes. `seen` is as in `add`.
        Raises InvalidName, NotFound, Moved.
        """
        with self._db.write():
            if seen:
                self._check_newest(seen)
            found = self.resolve(ref)
            if expected is not None and expected != found.card_digest:
                raise Conflict(
                    f"the card of {found.ref} was changed meanwhile; look at it, then try again",
                    field="expected_card_digest",
                )
            (row,) = self._db.query(
                "select max(number) as n from cards where name = ? and version = ?", found.name, found.number
            )
            if _digest(card) == found.card_digest:
                return found, int(row["n"])
            number, facts = int(row["n"]) + 1, found.facts | facts
            self._revise(actor, found.name, found.number, number, card)
            told: dict[str, str | bytes | None] = {
                "card": card,
                "card_digest": _digest(card),
                "facts": json.dumps(facts, sort_keys=True),
            }
            self._update(found, told)
            head(self._db.tables, found.name)
            self._db.event(
                actor, "card", found.name, found.number, {"revision": number, "digest": _digest(card)}
            )
            return self.resolve(found.ref), number

    def _revise(self, actor: str, name: str, version: int, number: int, card: bytes) -> None:
        row = {"name": name, "version": version, "number": number, "digest": _digest(card), "card": card}
        self._db.tables.insert("cards", row | {"at": now(), "actor": actor})

    def _rowid(self, name: str, number: int) -> int:
        (row,) = self._db.query(
            "select rowid as id from versions where name = ? and number = ?", name, number
        )
        return int(row["id"])

    def _check_newest(self, seen: Version) -> None:
        """Within `write`. Raises Moved."""
        live = self._newest_live(seen.name)
        if not live or (live.number, live.card_digest) != (seen.number, seen.card_digest):
            raise Moved(
                f"{seen.ref} is not the newest any more, or has another card; look at it, then try again",
                field="name",
            )

    def _check_nothing(self, name: str) -> None:
        """Within `write`. Raises Moved."""
        if live := self._newest_live(name):
            raise Moved(f"{live.ref} was not there before; look at it, then try again", field="name")

    def _newest_live(self, name: str) -> Version | None:
        """The newest version that is not deleted."""
        live = f"{ALL} where v.name = ? and v.deleted_at is null order by v.number desc limit 1"
        return next(iter(self._rows(live, name)), None)

    def project(self, version: Version, projection: Projection) -> None:
        """Keeps a version's projection, by which its likes are found."""
        with self._db.write():
            self._project(version.name, version.number, projection)

    def _project(self, name: str, number: int, projection: Projection) -> None:
        rowid = self._rowid(name, number)
        row = {"version": rowid, "space": projection.space, "vector": projection.vector}
        self._db.tables.upsert("projections", row, key=["version"])
        self._db.then(partial(self._nearby.add, rowid, projection))

    def unprojected(self, kinds: Sequence[str], *, limit: int = 100) -> list[Version]:
        """Versions of these kinds that have no projection yet."""
        marks = ", ".join("?" * len(kinds))
        return self._rows(
            f"{LIVE} and v.kind in ({marks}) and v.rowid not in (select version from projections) limit ?",
            *kinds,
            limit,
        )

    def nearest(self, version: Version, *, at_least: float, limit: int) -> list[tuple[Version, float]]:
        """Versions whose projections point the way of this one's, the nearest first, with the cosine."""
        rowid = self._rowid(version.name, version.number)
        near = self._nearby.nearest(rowid, at_least=at_least, limit=limit)
        return [(found, n.cosine) for n in near for found in self._rows(f"{LIVE} and v.rowid = ?", n.version)]

    def _projections(self) -> list[tuple[int, str, bytes]]:
        rows = self._db.query(f"{PROJECTED} where v.deleted_at is null")
        return [(row["version"], row["space"], row["vector"]) for row in rows]

    def history(self, name: str) -> list[Version]:
        """Every version of an asset, deleted ones too, newest first. Raises InvalidName, NotFound."""
        rows = self._rows(f"{ALL} where v.name = ? order by v.number desc", check_name(name))
        if not rows:
            raise NotFound(
                f"there is no {name!r} in the catalog; `atelier list` shows what there is", field="name"
            )
        return rows

    def newest(self, *, after: str = "", limit: int = 100, query: Query | None = None) -> list[Version]:
        """The newest version of each asset whose name sorts after `after`, in order of name; only those that
        `query` asks for.
        """
        rows, parameters = (query or Query()).sql(after, limit)
        return self._rows(f"{ALL} join ({rows}) n on n.version = v.rowid order by v.name", *parameters)

    def with_digest(self, digest: str) -> list[Version]:
        """Every version that holds these bytes, oldest first."""
        return self._rows(f"{LIVE} and v.digest = ? order by v.created_at, v.name", digest)

    def with_tensors(self, digest: str) -> list[Version]:
        """Every version that holds these tensors, whatever the header, oldest first."""
        return self._rows(f"{LIVE} and v.tensor_digest = ? order by v.created_at, v.name", digest or None)

    def set_alias(
        self, name: str, alias: str, number: int, *, expected: int | None = None, actor: str = ""
    ) -> tuple[Version, int]:
        """Points an alias at a version; that version, and the number it named before (0: it is new).

        `expected` is the number the caller believes it names now: when it does not, Conflict, and nothing
        moves. Raises InvalidName, NotFound.
        """
        check_name(name)
        check_alias(alias)
        with self._db.write():
            found = self.resolve(f"{name}:{number}")
            rows = self._db.query("select number from aliases where name = ? and alias = ?", name, alias)
            previous = rows[0]["number"] if rows else 0
            if expected is not None and expected != previous:
                names = f"names {name}:{previous}" if previous else "does not exist"
                raise Conflict(
                    f"{name}@{alias} {names}, not {expected} as you thought; look, then try again",
                    field="alias",
                )
            self._point(actor, name, alias, number)
            return self.resolve(found.ref), previous

    def _point(self, actor: str, name: str, alias: str, number: int) -> None:
        row = {"name": name, "alias": alias, "number": number}
        self._db.tables.upsert("aliases", row, key=["name", "alias"])
        self._db.event(actor, "alias", name, number, {"alias": alias})

    def delete(self, ref: str, *, actor: str = "") -> Version:
        """Hides a version; `undelete` brings it back until its bytes are purged. Raises InvalidName,
        NotFound, and Conflict while an alias names it or a saved stack is made of it.
        """
        with self._db.write():
            found = self.resolve(ref)
            if found.aliases:
                raise Conflict(
                    f"{found.name}@{found.aliases[0]} names {found.ref}; move the alias first",
                    field="ref",
                )
            users = self._rows(
                f"{LIVE} and v.rowid in (select version from needs where what = 'member' and digest = ?)"
                " order by v.name, v.number",
                found.digest,
            )
            same = [
                other
                for other in self.with_digest(found.digest)
                if other.ref != found.ref and other.facts.get("declared") == found.facts.get("declared")
            ]
            if users and not same:
                raise Conflict(f"{users[0].ref} is made of {found.ref}; delete that first", field="ref")
            self._update(found, {"deleted_at": now()})
            head(self._db.tables, found.name)
            rowid = self._rowid(found.name, found.number)
            self._db.then(partial(self._nearby.remove, rowid))
            self._db.event(actor, "delete", found.name, found.number, {"digest": found.digest})
        return found

    def undelete(self, ref: str, *, actor: str = "") -> Version:
        """Brings a deleted version back, by `hero:3`. Raises InvalidName, NotFound (it was never there), and
        Conflict when it is not deleted, or purged, or made of what is deleted.
        """
        asked = parse(ref)
        if asked.number is None:
            raise InvalidName(f"{ref!r} may name several; say which, {asked.name or 'hero'}:3", field="ref")
        with self._db.write():
            found = self._rows(f"{ALL} where v.name = ? and v.number = ?", asked.name, str(asked.number))
            if not found:
                raise NotFound(f"{ref!r} was never there", field="ref")
            if not found[0].deleted_at:
                raise Conflict(f"{ref!r} is not deleted", field="ref")
            if not self.blobs.path(found[0].digest).exists():
                raise Conflict(f"the bytes of {ref!r} are purged; check the file in again", field="ref")
            check_members(self._db.query, found[0].facts)
            self._restore(actor, found[0])
            return self.resolve(ref)

    def _restore(self, actor: str, version: Version) -> None:
        self._update(version, {"deleted_at": None, "purged_at": None})
        head(self._db.tables, version.name)
        for row in self._db.query(
            f"{PROJECTED} where p.version = ?", self._rowid(version.name, version.number)
        ):
            back = Projection(row["space"], row["vector"])
            self._db.then(partial(self._nearby.add, row["version"], back))
        self._db.event(actor, "undelete", version.name, version.number, {"digest": version.digest})

    def _update(self, version: Version, values: dict[str, str | bytes | None]) -> None:
        sets = ", ".join(f"{column} = ?" for column in values)
        sql = f"update versions set {sets} where name = ? and number = ?"
        self._db.tables.execute(sql, *values.values(), version.name, version.number)

    def last_event(self) -> int:
        """The `seq` of the newest change, 0 before any."""
        (row,) = self._db.query("select coalesce(max(seq), 0) as last from events")
        return int(row["last"])

    def events(self, since: int = 0, *, limit: int = 1000) -> list[Event]:
        """Changes with `seq` above `since`, in order."""
        rows = self._db.query("select * from events where seq > ? order by seq limit ?", since, limit)
        return [event(row) for row in rows]

    def collect_garbage(
        self, *, retention: timedelta, grace: timedelta, dry_run: bool = False, actor: str = ""
    ) -> Garbage:
        """Purges what was deleted longer than `retention` ago, and files of no version older than `grace`."""
        how = {"retention": retention, "grace": grace}
        found = collect(self._db, self.blobs, **how, dry_run=dry_run, actor=actor)
        if not dry_run:
            self.derived.keep_only(digest for digest, _ in self.blobs.files())
        return found


def _digest(card: bytes) -> str:
    return hashlib.sha256(card).hexdigest() if card else ""
