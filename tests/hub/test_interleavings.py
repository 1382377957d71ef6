"""Edits in two studios and on the Hub, syncs, crashes at any request and edits in the midst of one, in any
order: all come together, and nothing that anybody acknowledged is lost.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.catalog import Catalog
from registry.errors import Conflict, RegistryError
from registry.hub.client import Hub
from registry.hub.endpoint import Endpoint
from registry.hub.exchange import Exchange
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from server.door import Gate
from tests.hub.conftest import Studio
from tests.hub.repos import File, Repo
from tests.hub.standin import TOKEN, StandIn, Trouble
from tests.hub.test_round_trip import png

FILE, CARD, CONFIG = WEIGHTS["lora"], "README.md", "adapter_config.json"
NAMES = {"here": "milo", "elsewhere": "luna"}
"""What the two studios call the same repository."""
EDITS = [
    *(f"{what} {side}" for what in ("weights", "card", "picture", "config") for side in (*NAMES, "there")),
    *(f"{what} {side}" for what in ("no picture", "no version") for side in NAMES),
    *("no picture there", "no card there"),
]
Crash = tuple[int, Trouble]


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync: from the request `crash` on nobody answers any more; `meanwhile`, at a request, an edit."""

    side: str = "here"
    keep: str = ""
    delete: bool = False
    crash: Crash | None = None
    meanwhile: tuple[int, str] | None = None
    direction: str = "both"


KEEPS = st.sampled_from(["", "ours", "theirs", "both"])
CRASHES = st.tuples(st.integers(0, 14), st.sampled_from([Trouble.CUT_BEFORE, Trouble.CUT_AFTER]))
MEANWHILE = st.tuples(st.integers(0, 10), st.sampled_from(EDITS))
SYNCS = st.builds(
    Sync,
    st.sampled_from(list(NAMES)),
    KEEPS,
    st.booleans(),
    st.one_of(st.none(), CRASHES),
    st.one_of(st.none(), MEANWHILE),
    st.sampled_from(["both", "both", "push", "pull"]),
)
HISTORY = st.lists(st.one_of(st.sampled_from(EDITS), SYNCS), min_size=2, max_size=10)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters, each of other bytes, with something in the header that is stripped."""
    folder = tmp_path_factory.mktemp("files")
    maker = Studio(None, None, folder)  # type: ignore[arg-type]
    return [maker.weights(metadata={"ss_dataset_dirs": f'{{"{n}_secret": 1}}'}) for n in range(16)]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with StandIn(tmp_path_factory.mktemp("standin")) as running:
        yield running


@dataclass(slots=True)
class Acknowledged:
    """What a studio was told is kept; and the commits below which it chose to put nothing of its own."""

    cards: set[bytes] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)


@dataclass(slots=True, repr=False)
class World:
    """Two studios and a Hub, and what each acknowledged."""

    studios: dict[str, Studio]
    standin: StandIn
    files: list[Path]
    made: int = 0
    pictures: int = 0
    kept: dict[str, Acknowledged] = field(default_factory=lambda: {side: Acknowledged() for side in NAMES})
    wrong: list[Exception] = field(default_factory=list)

    @property
    def repo(self) -> Repo:
        return self.standin.repo("ann/milo")

    def edit(self, what: str) -> None:
        """An edit, which its side acknowledges, or refuses."""
        self.made += 1
        kind, _, side = what.rpartition(" ")
        card = f"---\nlicense: mit\n---\n# {what} {self.made}\n".encode()
        if side == "there":
            self._edit_there(kind, card)
        else:
            with suppress(Conflict):  # a sync changed it at the same moment, and the artist is told
                self._edit_here(kind, card, side)

    def _edit_there(self, kind: str, card: bytes) -> None:
        head, png_there = self.repo.head.files, f"{self.made}.png"
        shown = [path for path in head if path.endswith(".png")]
        stored = self.standin.storage.put(self.files[self.made % len(self.files)].read_bytes())
        match kind:
            case "weights":
                self.repo.write({FILE: stored}, "theirs")
            case "card":
                self.repo.write({CARD: File.regular(card)}, "theirs")
            case "config":
                self.repo.write({CONFIG: File.regular(self.config)}, "theirs")
            case "picture" if self.pictures < 6:
                self.repo.write({png_there: File.regular(png(f"#{self.made:06x}"))}, "theirs")
                self.pictures += 1
            case "no picture" if shown:
                self.repo.write({shown[self.made % len(shown)]: None}, "theirs")
            case "no card" if CARD in head:
                self.repo.write({CARD: None}, "theirs")

    @property
    def config(self) -> bytes:
        return b'{"peft_type": "LORA", "r": %d}' % self.made

    def _edit_here(self, kind: str, card: bytes, side: str) -> None:
        studio, name, kept = self.studios[side], NAMES[side], self.kept[side]
        path, newest = self.files[self.made % len(self.files)], studio.exchange.newest(name)
        match kind:
            case "weights" | "config":
                said = {"adapter_config": self.config.decode()} if kind == "config" else {}
                kept.digests.add(studio.check_in(name, path=path, card=card, **said).digest)
                kept.cards.add(card)
            case "card" if newest:
                studio.set_card(newest.ref, card)
                kept.cards.add(card)
            case "picture" if newest and self.pictures < 6:
                studio.exchange.door.add_preview(newest, png(f"#{self.made:06x}"), "", "ann")
                self.pictures += 1
            case "no picture" if newest and (shown := studio.catalog.previews(newest)):
                studio.catalog.remove_preview(newest.ref, shown[self.made % len(shown)].digest)
            case "no version" if newest:
                live = [v for v in studio.catalog.history(name) if not v.deleted_at]
                if len(live) > 1:
                    studio.catalog.delete(newest.ref)

    def sync(self, wish: Sync) -> str:
        """What became of a sync."""
        asked = -1

        def due(request: str) -> Trouble | None:
            nonlocal asked
            asked += 1
            if wish.meanwhile and asked == wish.meanwhile[0]:
                try:
                    self.edit(wish.meanwhile[1])
                except Exception as error:  # the server's thread has nobody to tell
                    self.wrong.append(error)
            if not wish.crash or asked < wish.crash[0]:
                return None
            return wish.crash[1] if asked == wish.crash[0] else Trouble.CUT_BEFORE

        self.standin.dead = due
        name = NAMES[wish.side]
        (outcome,) = self.studios[wish.side].sync(
            name, keep=wish.keep, delete=wish.delete, direction=wish.direction
        )
        self.standin.dead = None
        assert not self.wrong
        assert outcome.error is None or isinstance(outcome.error, RegistryError)
        if wish.keep == "ours":
            self.kept[wish.side].given_up |= {commit.oid for commit in self.repo.commits}
        return outcome.action

    def settle(self) -> None:
        """Syncs until nothing moves any more; where what is there was deleted here, something new comes."""
        for _ in range(6):
            for side, studio in self.studios.items():
                newest, link = studio.exchange.newest(NAMES[side]), studio.exchange.links.of(NAMES[side])
                if newest is None or newest.number < link.here.number:
                    self.edit(f"weights {side}")
            actions = [self.sync(Sync(side, "both")) for side in self.studios]
            if set(actions) == {"unchanged"}:
                break
        assert set(actions) == {"unchanged"}
        commits = len(self.repo.commits)
        assert {self.sync(Sync(side)) for side in self.studios} == {"unchanged"}
        assert len(self.repo.commits) == commits

    def check_nothing_is_lost(self) -> None:
        """What a studio was told it keeps, it keeps; what is below a commit of it, it had before."""
        for side, studio in self.studios.items():
            catalog, kept = studio.catalog, self.kept[side]
            versions = catalog.history(NAMES[side])
            cards = {revision.card for v in versions for revision in catalog.card_revisions(v)}
            assert kept.cards <= cards
            assert kept.digests <= {v.digest for v in versions}
            bodies = {body(catalog.blobs.path(v.digest)) for v in versions}
            title = f"{NAMES[side]} version"
            for below, above in zip(self.repo.commits, self.repo.commits[1:], strict=False):
                foreign = not below.title.startswith((title, "initial"))
                if foreign and above.title.startswith(title) and below.oid not in kept.given_up:
                    assert body(self.standin.storage.path(below.files[FILE].sha256)) in bodies
                    assert CARD not in below.files or below.files[CARD].data in cards
        for below, above in zip(self.repo.commits, self.repo.commits[1:], strict=False):
            assert below.files != above.files  # nothing is committed twice

    def check_all_are_the_same(self) -> None:
        """Head and newest versions: weights, card, configuration; each has the pictures that it should."""
        head = self.repo.head.files
        for side, studio in self.studios.items():
            catalog, link = studio.catalog, studio.exchange.links.of(NAMES[side])
            newest, there = catalog.resolve(NAMES[side]), self.standin.storage.path(head[FILE].sha256)
            assert body(catalog.blobs.path(newest.digest)) == body(there)
            assert link.strip or newest.digest == f"sha256:{head[FILE].sha256}"
            assert CARD not in head or catalog.card(newest) == head[CARD].data
            told = newest.facts["declared"]["adapter_config"].encode()
            assert told == (head[CONFIG].data if CONFIG in head else b"")
            shown = {link.pictures[p.digest] for p in catalog.previews(newest)}
            assert shown - {""} <= head.keys()
            assert {path for path in head if path.endswith(".png")} <= set(link.pictures.values())


def body(path: Path) -> str:
    """The digest of a file's tensors, whatever its header tells."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@dataclass(frozen=True, slots=True, repr=False)
class Start:
    """Where a world begins: a copy of what was there when it was made."""

    data: Path
    repos: dict[str, Repo]
    seen: dict[str, Any]

    def __repr__(self) -> str:
        return f"Start at {self.data}"

    @classmethod
    def of(cls, it: World, folder: Path) -> "Start":
        for side, studio in it.studios.items():
            studio.catalog.close()
            shutil.copytree(studio.folder / "data", folder / side)
        shutil.copytree(it.standin.directory, folder / "there")
        seen = {"made": it.made, "pictures": it.pictures, "kept": deepcopy(it.kept)}
        return cls(folder, deepcopy(it.standin.repos), seen)


@contextmanager
def world(
    standin: StandIn,
    files: list[Path],
    start: Start | None = None,
    *,
    strip: bool = False,
    alone: bool = False,
) -> Iterator[World]:
    """As it was at the start; without one, where milo is published, and pulled elsewhere unless `alone`."""
    standin.requests.clear()
    standin.repos = deepcopy(start.repos) if start else {}
    for stored in standin.directory.iterdir():  # what an earlier world has sent, this one sends again
        stored.unlink()
    if start:
        shutil.copytree(start.data / "there", standin.directory, dirs_exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        studios = dict[str, Studio]()
        for side in list(NAMES)[: 1 if alone else 2]:
            at = Path(folder) / side
            if start:
                shutil.copytree(start.data / side, at / "data")
            catalog = stack.enter_context(closing(Catalog(at / "data")))
            hub = Hub(Endpoint(standin.url, TOKEN), pauses=())
            studios[side] = Studio(catalog, Exchange(catalog, hub, Gate(catalog)), at)
        if not start:
            studios["here"].check_in("milo", path=files[0], card=b"---\nlicense: mit\n---\n# Milo\n")
            push(studios["here"].exchange, "milo", repo="ann/milo", strip=strip)
            if not alone:
                pull(studios["elsewhere"].exchange, "ann/milo", name=NAMES["elsewhere"])
        yield World(studios, standin, files, **deepcopy(start.seen if start else {}))


@pytest.fixture(scope="module")
def published(
    standing: StandIn, files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, Start]:
    """Milo is published, as it is or (True) stripped, and nothing else has happened."""
    starts = {}
    for strip in (False, True):
        with world(standing, files, strip=strip) as it:
            starts[strip] = Start.of(it, tmp_path_factory.mktemp("published") / "data")
    return starts


@pytest.fixture(scope="module")
def conflict(standing: StandIn, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Both sides have changed everything."""
    with world(standing, files, alone=True) as it:
        for what in ("weights here", "picture here", "weights there", "card there", "picture there"):
            it.edit(what)
        return Start.of(it, tmp_path_factory.mktemp("conflict") / "data")


@settings(max_examples=int(os.environ.get("ATELIER_INTERLEAVINGS", "100")), deadline=None)
@given(history=HISTORY, strip=st.booleans())
def test_whatever_happens_all_come_together_and_nothing_is_lost(
    standing: StandIn,
    files: list[Path],
    published: dict[bool, Start],
    history: list[str | Sync],
    strip: bool,
) -> None:
    with world(standing, files, published[strip]) as it:
        for event in history:
            if isinstance(event, str):
                it.edit(event)
            else:
                it.sync(event)
        it.settle()
        it.check_all_are_the_same()
        it.check_nothing_is_lost()


@pytest.mark.parametrize("keep", ["ours", "theirs", "both"])
def test_a_crash_at_every_request_of_a_conflicts_resolution(
    standing: StandIn, files: list[Path], conflict: Start, keep: str
) -> None:
    with world(standing, files, conflict, alone=True) as it:
        it.sync(Sync(keep=keep))
        made = [(place, seen.method) for place, seen in enumerate(standing.requests)]
    crashes = [(place, Trouble.CUT_BEFORE) for place, _ in made]
    crashes += [(place, Trouble.CUT_AFTER) for place, method in made if method != "GET"]
    assert len(crashes) > 5
    for crash in crashes:
        with world(standing, files, conflict, alone=True) as it:
            it.sync(Sync(keep=keep, crash=crash))
            assert standing.requests[crash[0]].method == made[crash[0]][1]
            it.sync(Sync(keep=keep))
            assert it.sync(Sync()) == "unchanged"
            it.check_all_are_the_same()
            it.check_nothing_is_lost()
