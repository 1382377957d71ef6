"""Edits on both sides, syncs, and crashes at any request, in any order: the sides come together, and nothing
that either acknowledged is lost.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.catalog import Catalog
from registry.hub.client import Hub
from registry.hub.endpoint import Endpoint
from registry.hub.exchange import Exchange
from registry.hub.files import WEIGHTS
from registry.hub.push import push
from server.door import Gate
from tests.hub.conftest import Studio
from tests.hub.repos import File, Repo
from tests.hub.standin import TOKEN, StandIn, Trouble
from tests.hub.test_round_trip import png

FILE = WEIGHTS["lora"]
EDITS = st.sampled_from(
    ["weights here", "card here", "picture here", "weights there", "card there", "picture there"]
)
CRASH = st.one_of(
    st.none(), st.tuples(st.integers(0, 14), st.sampled_from([Trouble.CUT_BEFORE, Trouble.CUT_AFTER]))
)
SYNC = st.tuples(st.sampled_from(["", "theirs", "both"]), CRASH)
HISTORY = st.lists(st.one_of(EDITS, SYNC), min_size=2, max_size=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters, each of other bytes."""
    folder = tmp_path_factory.mktemp("files")
    maker = Studio(None, None, folder)  # type: ignore[arg-type]
    return [maker.weights() for _ in range(12)]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with StandIn(tmp_path_factory.mktemp("standin")) as running:
        yield running


@dataclass(slots=True, repr=False)
class World:
    """A studio and a Hub, and what each acknowledged."""

    studio: Studio
    standin: StandIn
    files: list[Path]
    made: int = 0
    cards_here: set[bytes] = field(default_factory=set)
    pictures: int = 0

    @property
    def repo(self) -> Repo:
        return self.standin.repo("ann/milo")

    def edit(self, what: str) -> None:
        """An edit that its side acknowledges."""
        self.made += 1
        card = f"---\nlicense: mit\n---\n# {what} {self.made}\n".encode()
        path = self.files[self.made % len(self.files)]
        match what:
            case "weights here":
                self.studio.check_in("milo", path=path, card=card)
                self.cards_here.add(card)
            case "card here":
                self.studio.set_card("milo", card)
                self.cards_here.add(card)
            case "picture here" if self.pictures < 6:
                version = self.studio.catalog.resolve("milo")
                self.studio.exchange.door.add_preview(version, png(f"#{self.made:06x}"), "", "ann")
                self.pictures += 1
            case "weights there":
                self.repo.write({FILE: self.standin.storage.put(path.read_bytes())}, "theirs")
            case "card there":
                self.repo.write({"README.md": File.regular(card)}, "theirs")
            case "picture there" if self.pictures < 6:
                self.repo.write({f"{self.made}.png": File.regular(png(f"#{self.made:06x}"))}, "theirs")
                self.pictures += 1

    def sync(self, keep: str, crash: tuple[int, Trouble] | None = None) -> str:
        """A sync, in which from some request on nobody answers any more; what became of it."""
        left = [crash[0]] if crash else []

        def dead(request: str) -> Trouble | None:
            if not crash:
                return None
            left[0] -= 1
            return crash[1] if left[0] == -1 else Trouble.CUT_BEFORE if left[0] < -1 else None

        self.standin.dead = dead
        (outcome,) = self.studio.sync("milo", keep=keep)
        self.standin.dead = None
        return outcome.action

    def check_nothing_is_lost(self) -> None:
        """Ours is in the catalog; theirs was in the catalog before it was put below something of ours."""
        catalog = self.studio.catalog
        versions = catalog.history("milo")
        cards = {revision.card for v in versions for revision in catalog.card_revisions(v)}
        digests = {v.digest for v in versions}
        assert self.cards_here <= cards
        for below, above in zip(self.repo.commits, self.repo.commits[1:], strict=False):
            if below.title == "theirs" and above.title.startswith("milo version"):
                assert f"sha256:{below.files[FILE].sha256}" in digests
                assert below.files["README.md"].data in cards
            assert below.files != above.files  # nothing is committed twice

    def check_both_are_the_same(self) -> None:
        """Head and newest version: weights, card; the version's pictures are there, those there are here."""
        catalog, head = self.studio.catalog, self.repo.head.files
        newest = catalog.resolve("milo")
        assert newest.digest == f"sha256:{head[FILE].sha256}"
        assert catalog.card(newest) == head["README.md"].data
        mapped = self.studio.exchange.links.of("milo").pictures
        shown = [{p.digest for p in catalog.previews(v)} for v in catalog.history("milo")]
        assert {mapped[digest] for digest in shown[0]} <= head.keys()
        there = {path for path in head if path.endswith(".png")}
        assert there <= {path for digest, path in mapped.items() if digest in set().union(*shown)}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a world begins: a copy of what was there when it was made."""

    data: Path
    repos: dict[str, Repo]
    seen: dict[str, Any]

    @classmethod
    def of(cls, it: World, folder: Path) -> "Start":
        it.studio.catalog.close()
        shutil.copytree(it.studio.folder / "data", folder)
        seen = {"made": it.made, "cards_here": set(it.cards_here), "pictures": it.pictures}
        return cls(folder, deepcopy(it.standin.repos), seen)


@contextmanager
def world(standin: StandIn, files: list[Path], start: Start | None = None) -> Iterator[World]:
    """As it was at the start; without one, where milo is published."""
    standin.requests.clear()
    standin.repos = deepcopy(start.repos) if start else {}
    held = {f.sha256 for repo in standin.repos.values() for c in repo.commits for f in c.files.values()}
    for stored in standin.directory.iterdir():  # what an earlier world has sent, this one sends again
        if stored.name not in held:
            stored.unlink()
    with tempfile.TemporaryDirectory() as folder:
        if start:
            shutil.copytree(start.data, Path(folder) / "data")
        catalog = Catalog(Path(folder) / "data")
        hub = Hub(Endpoint(standin.url, TOKEN), silent=5.0, pauses=())
        studio = Studio(catalog, Exchange(catalog, hub, Gate(catalog)), Path(folder))
        try:
            if not start:
                studio.check_in("milo", path=files[0], card=b"---\nlicense: mit\n---\n# Milo\n")
                push(studio.exchange, "milo", repo="ann/milo")
            yield World(studio, standin, files, **deepcopy(start.seen if start else {}))
        finally:
            catalog.close()


@pytest.fixture(scope="module")
def published(standing: StandIn, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Milo is published, and nothing else has happened."""
    with world(standing, files) as it:
        return Start.of(it, tmp_path_factory.mktemp("published") / "data")


@pytest.fixture(scope="module")
def conflict(
    standing: StandIn, files: list[Path], published: Start, tmp_path_factory: pytest.TempPathFactory
) -> Start:
    """Both sides have changed everything."""
    with world(standing, files, published) as it:
        for what in ("weights here", "picture here", "weights there", "card there", "picture there"):
            it.edit(what)
        return Start.of(it, tmp_path_factory.mktemp("conflict") / "data")


History = list[str | tuple[str, tuple[int, Trouble] | None]]


@settings(max_examples=int(os.environ.get("ATELIER_INTERLEAVINGS", "100")), deadline=None)
@given(history=HISTORY)
def test_whatever_happens_the_sides_come_together_and_nothing_is_lost(
    standing: StandIn, files: list[Path], published: Start, history: History
) -> None:
    with world(standing, files, published) as it:
        for event in history:
            if isinstance(event, str):
                it.edit(event)
            else:
                it.sync(*event)
        for _ in range(3):
            action = it.sync("both")
        assert action == "unchanged"
        commits = len(it.repo.commits)
        assert it.sync("") == "unchanged"
        assert len(it.repo.commits) == commits
        it.check_both_are_the_same()
        it.check_nothing_is_lost()


@pytest.mark.parametrize("keep", ["ours", "theirs", "both"])
def test_a_crash_at_every_request_of_a_conflicts_resolution(
    standing: StandIn, files: list[Path], conflict: Start, keep: str
) -> None:
    with world(standing, files, conflict) as it:
        it.sync(keep)
        made = [(place, seen.method) for place, seen in enumerate(standing.requests)]
    crashes = [(place, Trouble.CUT_BEFORE) for place, _ in made]
    crashes += [(place, Trouble.CUT_AFTER) for place, method in made if method != "GET"]
    assert len(crashes) > 5
    for crash in crashes:
        with world(standing, files, conflict) as it:
            it.sync(keep, crash)
            assert standing.requests[crash[0]].method == made[crash[0]][1]
            it.sync(keep)
            assert it.sync("") == "unchanged"
            it.check_both_are_the_same()
            if keep != "ours":
                it.check_nothing_is_lost()
