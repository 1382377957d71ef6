"""The catalog against a model of a few lines: whatever is done in whatever order, both say the same."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from registry import keeping
from registry.catalog import Catalog
from registry.errors import Conflict, NotFound, RegistryError
from registry.finding import Query

NAMES, NUMBERS = st.sampled_from(["ann", "bob", "cy"]), st.integers(1, 4)
DATA, CARDS = st.sampled_from([b"one", b"two", b"three"]), st.sampled_from([b"", b"fox", b"owl"])
ALIASES = st.sampled_from(["stable", "next"])
PICTURES, CAPTIONS = st.sampled_from([b"front", b"side", b"back"]), st.sampled_from(["", "a caption"])
SESSIONS = st.sampled_from(["s1", "s2"])


@dataclass
class Kept:
    """What the model knows of a version."""

    data: bytes
    card: bytes
    cards: list[bytes]
    deleted: bool = False
    purged: bool = False
    previews: dict[bytes, str] = field(default_factory=dict)
    """Captions by picture, in order."""


@dataclass
class Model:
    """Versions by name, in order, and what aliases name; by session, what of an upload is here and which
    version it became.
    """

    versions: dict[str, list[Kept]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    parked: dict[str, bytes] = field(default_factory=dict)
    made: dict[str, tuple[str, int]] = field(default_factory=dict)

    def find(self, name: str, number: int) -> Kept | None:
        history = self.versions.get(name, [])
        return history[number - 1] if number <= len(history) else None

    def one_of(self, name: str, number: int) -> int:
        """A number that the asset has, most often."""
        return 1 + number % (len(self.versions.get(name, [])) + 1)

    def newest(self) -> dict[str, int]:
        live = {
            name: [number for number, kept in enumerate(history, 1) if not kept.deleted]
            for name, history in self.versions.items()
        }
        return {name: numbers[-1] for name, numbers in sorted(live.items()) if numbers}


class Machine(RuleBasedStateMachine):
    """Every rule does the same to the catalog and to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.catalog, self.model = Catalog(self.folder / "data"), Model()

    def teardown(self) -> None:
        self.catalog.close()
        assert keeping.verify(self.folder / "data").sound
        shutil.rmtree(self.folder)

    @rule(name=NAMES, data=DATA, card=CARDS, alias=st.one_of(st.just(""), ALIASES))
    def check_in(self, name: str, data: bytes, card: bytes, alias: str) -> None:
        number, new = self.kept(name, data, card)
        if alias:
            self.model.aliases[name, alias] = number
        with self.catalog.blobs.upload() as upload:
            upload.write(data)
            version, created = self.catalog.add(
                upload, name=name, kind="lora", facts={}, card=card, alias=alias
            )
        assert (version.number, created) == (number, new)

    def kept(self, name: str, data: bytes, card: bytes) -> tuple[int, bool]:
        """What the model makes of a check-in: the version's number, and whether it is new."""
        history = self.model.versions.setdefault(name, [])
        for number, kept in reversed([*enumerate(history, 1)]):
            if kept.data == data and card in kept.cards:
                kept.deleted = kept.purged = False
                return number, False
        history.append(Kept(data, card, [card]))
        return len(history), True

    @rule(session=SESSIONS, piece=DATA, right=st.sampled_from([True, True, False]), again=st.booleans())
    def bring_a_piece(self, session: str, piece: bytes, right: bool, again: bool) -> None:
        here = b"" if again else self.model.parked.get(session, b"")
        offset = len(here) if right else len(here) + 1
        if not right:
            self.told(Conflict, lambda: self.catalog.blobs.upload(session, offset))
            return
        with self.catalog.blobs.upload(session, offset) as upload:
            self.told(Conflict, lambda: self.catalog.blobs.upload(session, offset))  # only one at a time
            upload.write(piece)
            upload.park()
        self.model.parked[session] = here + piece

    @rule(session=SESSIONS)
    def refuse(self, session: str) -> None:
        with self.catalog.blobs.upload(session, len(self.model.parked.pop(session, b""))) as upload:
            upload.write(b"nonsense")

    @rule(session=SESSIONS, name=NAMES, piece=DATA)
    def bring_the_rest(self, session: str, name: str, piece: bytes) -> None:
        here = self.model.parked.pop(session, b"")
        data, earlier = here + piece, self.model.made.get(session)
        fits = earlier and earlier[0] == name and self.model.versions[name][earlier[1] - 1].data == data
        wanted = Conflict if earlier and not fits else None
        if not earlier:
            self.model.made[session] = name, self.kept(name, data, b"")[0]

        def bring() -> None:
            with self.catalog.blobs.upload(session, len(here)) as upload:
                upload.write(piece)
                version, _ = self.catalog.add(upload, name=name, kind="lora", facts={}, request_id=session)
            assert (version.name, version.number) == self.model.made[session]

        self.told(wanted, bring)

    @rule(name=NAMES, number=NUMBERS, picture=PICTURES, caption=CAPTIONS)
    def show(self, name: str, number: int, picture: bytes, caption: str) -> None:
        number = self.model.one_of(name, number)
        kept = self.model.find(name, number)
        wanted: type[RegistryError] | None = NotFound
        if kept and not kept.deleted:
            wanted, kept.previews[picture] = None, caption

        def add() -> None:
            with self.catalog.blobs.upload() as upload:
                upload.write(picture)
                self.catalog.add_preview(f"{name}:{number}", upload, width=1, height=2, caption=caption)

        self.told(wanted, add)

    @rule(name=NAMES, number=NUMBERS, picture=PICTURES)
    def show_no_more(self, name: str, number: int, picture: bytes) -> None:
        shown = [
            (of, n, here)
            for of, history in self.model.versions.items()
            for n, kept in enumerate(history, 1)
            for here in kept.previews
        ]
        if shown and number > 1:  # else one that is most likely not there
            name, number, picture = shown[number % len(shown)]
        kept, digest = self.model.find(name, number), f"sha256:{hashlib.sha256(picture).hexdigest()}"
        there = bool(kept and not kept.deleted and kept.previews.pop(picture, None) is not None)
        self.told(
            None if there else NotFound, lambda: self.catalog.remove_preview(f"{name}:{number}", digest)
        )

    @rule(name=NAMES, alias=ALIASES, number=NUMBERS, expected=st.one_of(st.none(), st.integers(0, 4)))
    def point(self, name: str, alias: str, number: int, expected: int | None) -> None:
        kept, before = self.model.find(name, number), self.model.aliases.get((name, alias), 0)
        wanted: type[RegistryError] | None = None
        if kept is None or kept.deleted:
            wanted = NotFound
        elif expected is not None and expected != before:
            wanted = Conflict
        else:
            self.model.aliases[name, alias] = number
        self.told(wanted, lambda: self.catalog.set_alias(name, alias, number, expected=expected))

    @rule(name=NAMES, number=NUMBERS, card=CARDS, expected=st.one_of(st.none(), CARDS))
    def edit_card(self, name: str, number: int, card: bytes, expected: bytes | None) -> None:
        kept = self.model.find(name, number)
        seen = None if expected is None else hashlib.sha256(expected).hexdigest() if expected else ""
        wanted: type[RegistryError] | None = None
        if kept is None or kept.deleted:
            wanted = NotFound
        elif expected is not None and expected != kept.card:
            wanted = Conflict
        elif card != kept.card:
            kept.cards.append(card)
            kept.card = card
        self.told(wanted, lambda: self.catalog.set_card(f"{name}:{number}", card, {}, expected=seen))

    @rule(name=NAMES, number=NUMBERS)
    def delete(self, name: str, number: int) -> None:
        kept = self.model.find(name, number)
        wanted: type[RegistryError] | None = None
        if kept is None or kept.deleted:
            wanted = NotFound
        elif number in [n for (of, _), n in self.model.aliases.items() if of == name]:
            wanted = Conflict
        else:
            kept.deleted = True
        self.told(wanted, lambda: self.catalog.delete(f"{name}:{number}"))

    @rule(name=NAMES, number=NUMBERS)
    def undelete(self, name: str, number: int) -> None:
        kept = self.model.find(name, number)
        wanted: type[RegistryError] | None = None
        if kept is None:
            wanted = NotFound
        elif not kept.deleted or (kept.purged and not self.stored(kept.data)):
            wanted = Conflict
        else:
            kept.deleted = kept.purged = False
        self.told(wanted, lambda: self.catalog.undelete(f"{name}:{number}"))

    @rule()
    def collect(self) -> None:
        for kept in self.every():
            kept.purged = kept.deleted
            if kept.purged:
                kept.previews.clear()
        self.catalog.collect_garbage(retention=timedelta(0), grace=timedelta(0))

    @rule()
    def restart(self) -> None:
        self.catalog.close()
        self.catalog = Catalog(self.folder / "data")

    @invariant()
    def the_newest_are_the_same(self) -> None:
        found = {version.name: version.number for version in self.catalog.newest()}
        assert found == self.model.newest()

    @invariant()
    def what_is_there_is_found_by_every_name_and_reads_back(self) -> None:
        for name, history in self.model.versions.items():
            for number, kept in enumerate(history, 1):
                if kept.deleted:
                    self.told(NotFound, lambda ref=f"{name}:{number}": self.catalog.resolve(ref))
                    continue
                version = self.catalog.resolve(f"{name}:{number}")
                assert b"".join(self.catalog.blobs.chunks(version.digest)) == kept.data
                assert self.catalog.card(version) == kept.card
                assert [r.card for r in self.catalog.card_revisions(version)] == kept.cards
                shown = self.catalog.previews(version)
                assert [(b"".join(self.catalog.blobs.chunks(p.digest)), p.caption) for p in shown] == list(
                    kept.previews.items()
                )
        for (name, alias), number in self.model.aliases.items():
            assert self.catalog.resolve(f"{name}@{alias}").number == number

    @invariant()
    def a_search_finds_the_newest_with_that_card(self) -> None:
        wanted = [
            name for name, number in self.model.newest().items()
            if self.model.versions[name][number - 1].card == b"fox"
        ]  # fmt: skip
        assert [version.name for version in self.catalog.newest(query=Query(text="fox"))] == wanted

    @invariant()
    def what_is_here_of_an_upload_is_what_was_sent(self) -> None:
        for session in ("s1", "s2"):
            sent = self.model.parked.get(session)
            assert self.catalog.blobs.parked_bytes(session) == len(sent or b"")
            if sent:
                assert self.catalog.blobs.parked(session).read_bytes() == sent
            made = self.catalog.made_by(session)
            assert (made and (made.name, made.number)) == self.model.made.get(session)
        left = {path.name for path in self.catalog.blobs.incoming.iterdir()}
        assert left == {self.catalog.blobs.parked(session).name for session in self.model.parked}

    @invariant()
    def events_count_without_a_gap(self) -> None:
        events = self.catalog.events(limit=10_000)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))

    def every(self) -> list[Kept]:
        return [kept for history in self.model.versions.values() for kept in history]

    def stored(self, data: bytes) -> bool:
        return any(kept.data == data and not kept.purged for kept in self.every())

    def told(self, wanted: type[RegistryError] | None, call: Callable[[], object]) -> None:
        with pytest.raises(wanted) if wanted else nullcontext():
            call()


TestCatalogAgainstModel = Machine.TestCase
TestCatalogAgainstModel.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
