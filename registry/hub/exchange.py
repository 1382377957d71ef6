"""What push, pull and sync work with: a catalog, its links, a Hub, and the door through which everything that
comes from there has to go.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from registry.blobs import Upload
from registry.catalog import Catalog
from registry.digests import DigestStream
from registry.errors import Conflict, InvalidFile, NotFound
from registry.hub.client import Hub
from registry.hub.state import Here, Links
from registry.records import Version


@dataclass(frozen=True, slots=True)
class Arrival:
    """What comes with the bytes of a pulled file. `commit` makes it a version of its own, where the asset had
    the same bytes before and the Hub went back to them. `seen` is the version it goes on top of: when that is
    not the newest any more, or has another card, nothing is made (Moved); nor when it has to be the `first`,
    and there is one.
    """

    name: str
    card: bytes
    file_name: str
    origin: Mapping[str, Any]
    commit: str = ""
    alias: str = ""
    base: str = ""
    adapter_config: str = ""
    seen: Version | None = None
    first: bool = False


class Door(Protocol):
    """The ordinary gate of the catalog."""

    def check_in(self, upload: Upload, digests: DigestStream, arrival: Arrival, actor: str) -> Version:
        """Makes a file, which `digests` has seen, a version."""

    def set_card(self, version: Version, card: bytes, actor: str, *, newest: bool = False) -> Version:
        """Gives a version another card, if it has the one it was seen with still (or Conflict); with `newest`
        if it is the newest still, too (or Moved).
        """

    def add_preview(self, version: Version, image: bytes, caption: str, actor: str) -> str:
        """Shows a picture with a version; the digest of what was kept of it."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far something is: `what` is done with `name`, `done` of `total` bytes."""

    name: str
    repo: str
    what: str
    done: int = 0
    total: int = 0


class Claims:
    """The assets that somebody is bringing together with a Hub now: one at a time each."""

    def __init__(self) -> None:
        self._names, self._guard = set[str](), threading.Lock()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Within, an asset is this caller's. Raises Conflict when it is another's."""
        with self._guard:
            if name in self._names:
                raise Conflict(f"{name} is being published or pulled by another call; wait for that")
            self._names.add(name)
        try:
            yield
        finally:
            with self._guard:
                self._names.discard(name)


@dataclass(frozen=True, slots=True)
class Exchange:
    """For one Hub. `told` hears of every step, `stopped` says whether to go on; `claims` are shared by all
    who work with the same catalog.
    """

    catalog: Catalog
    hub: Hub
    door: Door
    actor: str = ""
    told: Callable[[Step], None] = lambda step: None
    stopped: Callable[[], bool] = lambda: False
    claims: Claims = field(default_factory=Claims)
    links: Links = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "links", Links(self.catalog))
        object.__setattr__(self, "hub", self.hub.watched(lambda size: None, self.stopped))

    @property
    def endpoint(self) -> str:
        """The Hub's URL."""
        return self.hub.endpoint.url

    def moving(self, name: str, repo: str, what: str, total: int = 0) -> Hub:
        """The Hub, telling of the bytes of files as `what` is done."""
        done = 0

        def moved(size: int) -> None:
            nonlocal done
            done += size
            self.told(Step(name, repo, what, done, max(total, done)))

        self.told(Step(name, repo, what, 0, total))
        return self.hub.watched(moved, self.stopped)

    def newest(self, name: str) -> Version | None:
        """The newest version that is there."""
        try:
            return self.catalog.resolve(name)
        except NotFound:
            return None

    def card(self, name: str, digest: str) -> bytes:
        """A card that an asset had once; empty when it is not known."""
        rows = self.catalog.database.query(
            "select card from cards where name = ? and digest = ? limit 1", name, digest
        )
        return bytes(rows[0]["card"]) if rows else b""


def here(version: Version) -> Here:
    """A version as it is compared."""
    return Here(version.number, version.digest, version.card_digest)


def digest_of(card: bytes) -> str:
    """What the catalog calls a card, "" for none."""
    return hashlib.sha256(card).hexdigest() if card else ""


def check_kind(version: Version) -> None:
    """Raises InvalidFile for a saved stack, which has no weights."""
    if version.kind == "stack":
        raise InvalidFile(
            f"{version.ref} is a saved stack, which has no weights of its own; merge it, publish the merge",
            field="ref",
        )
