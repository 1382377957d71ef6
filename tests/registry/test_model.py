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


@dataclass
class Kept:
    """What the model knows of a version."""

    data: bytes
    card: bytes
    cards: list[bytes]
    deleted: bool = False
    purged: bool = False


@dataclass
class Model:
    """Versions by name, in order, and what aliases name."""

    versions: dict[str, list[Kept]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)

    def find(self, name: str, number: int) -> Kept | None:
        history = self.versions.get(name, [])
        return history[number - 1] if number <= len(history) else None

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
        history = self.model.versions.setdefault(name, [])
        same = [
            n for n, kept in reversed([*enumerate(history, 1)]) if kept.data == data and card in kept.cards
        ]
        if same:
            history[same[0] - 1].deleted = history[same[0] - 1].purged = False
        else:
            history.append(Kept(data, card, [card]))
        number = same[0] if same else len(history)
        if alias:
            self.model.aliases[name, alias] = number
        with self.catalog.blobs.upload() as upload:
            upload.write(data)
            version, created = self.catalog.add(
                upload, name=name, kind="lora", facts={}, card=card, alias=alias
            )
        assert (version.number, created) == (number, not same)

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
