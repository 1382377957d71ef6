"""What the catalog answers with, and how its rows become that."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from registry.digests import Digests
from registry.refs import Ref

ALL = "select v.*, (select json_group_array(a.alias) from (select alias from aliases where name = v.name"
ALL += " and number = v.number order by alias) a) as alias_list from versions v"
LIVE = f"{ALL} where v.deleted_at is null"


@dataclass(frozen=True, slots=True)
class Version:
    """One version. Its bytes, number and what was found in them never change; its card has revisions, of
    which `card_digest` is the newest; `aliases` are those that name it at this moment. `facts` and `recipe`
    are JSON objects.
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
class CardRevision:
    """A card a version had or has: `number` counts from 1, `digest` is the sha256 of the bytes in hex, ""
    for no card.
    """

    number: int
    digest: str
    card: bytes
    at: datetime
    actor: str


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture shown with a version: a PNG in the store, sizes in pixels."""

    digest: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True, slots=True)
class Event:
    """A change. `seq` counts from 1 without a gap; `detail` is a JSON object that depends on `action`:
    `checkin`, `merge`, `alias`, `card`, `preview`, `delete`, `undelete`, `purge`, `publish`, `pull`.
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
    """What a collection removed, or would: versions whose bytes are gone, files nobody names, bytes freed;
    and `held`, versions whose time had come but for a merge that was made of them (its reference beside
    theirs).
    """

    versions: tuple[str, ...]
    orphans: tuple[str, ...]
    size_bytes: int
    held: tuple[tuple[str, str], ...]


def query(ref: Ref) -> tuple[str, ...]:
    """The SQL for the version a reference names, with its parameters."""
    if ref.digest:
        return f"{LIVE} and v.digest = ? order by v.created_at limit 1", ref.digest
    if ref.number is not None:
        return f"{LIVE} and v.name = ? and v.number = ?", ref.name, str(ref.number)
    if ref.alias:
        join = "join aliases b on b.name = v.name and b.number = v.number"
        return f"{ALL} {join} where v.deleted_at is null and b.name = ? and b.alias = ?", ref.name, ref.alias
    return f"{LIVE} and v.name = ? order by v.number desc limit 1", ref.name


def version(row: dict[str, Any]) -> Version:
    """A row of `ALL`."""
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


def event(row: dict[str, Any]) -> Event:
    """A row of `events`."""
    return Event(**row | {"at": datetime.fromisoformat(row["at"]), "detail": json.loads(row["detail"])})


def now() -> str:
    """The moment, as rows keep it."""
    return datetime.now(UTC).isoformat()
