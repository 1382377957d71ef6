"""What is held is counted and what is counted is held, whoever reads the same, gives up, or frees meanwhile:
every order of events is forced, by the calls that the readers and the account make.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atelier.client import Client
from compose.errors import InvalidRequest
from compose.factors import Factors
from compose.ledger import Ledger
from compose.methods import Parameters
from compose.warm import WarmPipeline
from compose.weights import Weight
from registry.blobs import BlobStore
from registry.catalog import Catalog
from server import merges
from server.calibrations import Calibrations
from server.errors import Cancelled
from server.merges import Merges
from server.pinned import Pinned
from server.served import served
from server.stacks import Stacks
from tests.adapters import delta, random_factors, write_kohya
from tests.conftest import serving

ROOM = 1 << 30


class Watched(Ledger):
    """A ledger that lets something happen right after a claim of a kind, once."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.then: dict[str, list[Callable[[], None]]] = {}

    def claim(self, kind: str, name: object, size: Any, **how: Any) -> None:
        super().claim(kind, name, size, **how)
        if self.then.get(kind):
            self.then[kind].pop(0)()

    def load_a_base(self) -> None:
        """One that wants all the room there is: everything else has to go."""
        self.claim("bases", "big", self.budget, owned=True, free=lambda: None)


@pytest.fixture
def ledger() -> Watched:
    return Watched(ROOM)


@pytest.fixture
def stacks(tmp_path: Path, warm: WarmPipeline, ledger: Ledger) -> Iterator[Stacks]:
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        for seed, name in enumerate(("one", "two")):
            write_kohya(tmp_path / name, random_factors("pocket", seed=seed, rank=4))
            client.check_in(tmp_path / name, name=name)
        catalog: Catalog = running.catalog
        yield Stacks(catalog, Calibrations(catalog, served([warm.base])), ledger=ledger)


def pin(stacks: Stacks, *names: str) -> list[Pinned]:
    refs = [(name, Weight(1.0)) for name in names]
    return list(stacks.pin(refs, method="naive", parameters=Parameters()))


def held(stacks: Stacks) -> int:
    return sum(size for _, size in stacks.shelf.held())


def test_the_magnitudes_of_a_dora_are_counted_with_its_factors(
    stacks: Stacks, ledger: Watched, tmp_path: Path, warm: WarmPipeline
) -> None:
    write_kohya(tmp_path / "plain", random_factors("pocket", seed=3, rank=4))
    tensors = load_file(tmp_path / "plain")
    for name in [name for name in tensors if name.endswith("lora_up.weight")]:
        tensors[name.replace("lora_up.weight", "dora_scale")] = torch.ones(len(tensors[name]), 1)
    save_file(tensors, tmp_path / "dora")
    with serving(tmp_path / "other", warm) as running, Client(running.address) as client:
        client.check_in(tmp_path / "dora", name="dora")
        mine = Stacks(running.catalog, Calibrations(running.catalog, served([warm.base])), ledger=ledger)
        layers = mine.shelf.layers(pin(mine, "dora")[0], "pocket")
        magnitudes = [f.magnitude.nbytes for f in layers.values() if f.magnitude is not None]
        factors = sum(f.up.nbytes + f.down.nbytes for f in layers.values())
    assert magnitudes
    assert ledger.parts() == {"adapters": factors + sum(magnitudes)}


def test_one_of_two_readers_gives_up_and_what_the_other_keeps_is_counted(
    stacks: Stacks, ledger: Watched
) -> None:
    (one,) = pin(stacks, "one")
    inside, go_on, ended = threading.Event(), threading.Event(), list[str]()

    def gone() -> None:
        inside.set()
        assert go_on.wait(60)
        raise Cancelled("enough")

    def give_up() -> None:
        with pytest.raises(Cancelled):
            stacks.shelf.layers(one, "pocket", gone)
        ended.append("gave up")

    second = threading.Thread(target=give_up)
    second.start()
    assert inside.wait(60)
    stacks.shelf.layers(one, "pocket")
    size = held(stacks)
    go_on.set()
    second.join(60)
    assert ended == ["gave up"]
    assert (held(stacks), ledger.parts()) == (size, {"adapters": size})
    with pytest.raises(Cancelled):  # alone: nothing is held, nothing counted
        stacks.shelf.layers(pin(stacks, "two")[0], "pocket", gone)
    assert (held(stacks), ledger.parts()) == (size, {"adapters": size})


def test_one_of_two_readers_finds_no_room_and_what_the_other_keeps_is_counted(
    stacks: Stacks, ledger: Watched
) -> None:
    (one,) = pin(stacks, "one")

    def other_reads() -> None:
        stacks.shelf.layers(one, "pocket")
        ledger.budget = 1  # from now on there is no room for anything new

    ledger.then["adapters"] = [other_reads]
    stacks.shelf.layers(one, "pocket")
    assert held(stacks) > 0
    assert ledger.parts() == {"adapters": held(stacks)}


def test_an_adapter_that_is_evicted_as_soon_as_it_is_counted_is_not_held(
    stacks: Stacks, ledger: Watched
) -> None:
    ledger.then["adapters"] = [lambda: None, ledger.load_a_base]  # after the claim of its exact size
    assert stacks.shelf.layers(pin(stacks, "one")[0], "pocket")
    assert (held(stacks), ledger.parts()) == (0, {"bases": ROOM})


def test_an_adapter_that_finds_no_room_once_read_is_neither_held_nor_counted(
    stacks: Stacks, ledger: Watched
) -> None:
    ledger.then["adapters"] = [lambda: Ledger.claim(ledger, "scorer", "clip", ROOM - 1)]
    ledger.budget = 2 * ROOM

    def full() -> None:
        ledger.budget = ROOM

    assert stacks.shelf.layers(pin(stacks, "one")[0], "pocket", full)
    assert (held(stacks), ledger.parts()) == (0, {"scorer": ROOM - 1})


@pytest.mark.parametrize("kind", ["merges", "prepared"])
def test_a_merge_that_is_evicted_as_soon_as_it_is_counted_is_not_held(
    kind: str, stacks: Stacks, ledger: Watched
) -> None:
    ledger.then[kind] = [ledger.load_a_base]
    both = pin(stacks, "one", "two")
    assert stacks.merges.merge(both, "pocket", "svd", Parameters(rank=4)).layers
    known = stacks.merges._merged if kind == "merges" else stacks.merges._prepared
    assert len(known) == 0
    assert kind not in ledger.parts()


def test_a_merge_without_room_for_its_factors_reads_them_as_it_goes(stacks: Stacks, ledger: Watched) -> None:
    """A small file may be of many factors; the bytes are the same."""
    refs = [("one", Weight.of_parts(1.0, {"unet": 0.5})), ("two", Weight(1.0))]
    pair = list(stacks.pin(refs, method="svd", parameters=Parameters()))

    def merged() -> dict[str, Factors]:
        return stacks.merges.merge(pair, "pocket", "svd", Parameters(rank=2)).layers

    ledger.budget = 1
    lean = merged()
    assert (held(stacks), ledger.parts()) == (0, {})
    ledger.budget = ROOM
    rich = merged()
    assert held(stacks) > 0
    assert lean.keys() == rich.keys()
    assert all(torch.equal(lean[n].up, rich[n].up) and torch.equal(lean[n].down, rich[n].down) for n in rich)


def test_a_large_stack_is_merged_from_its_files_and_each_is_hashed_once(
    stacks: Stacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    verified, plain = BlobStore.verified, Parameters()

    def watched(store: BlobStore, digest: str) -> Path:
        read.append(digest)
        return verified(store, digest)

    def pinned(**weights: Weight) -> tuple[Pinned, ...]:
        return stacks.pin(list(weights.items()), method="svd", parameters=plain)

    stack = pinned(
        one=Weight.of_parts(0.8, {"up_blocks": 0.5}), two=Weight.of_parts(-0.3, {"mid_block": 2.0})
    )
    small = stacks.merges.merge(stack, "pocket", "svd", plain)
    monkeypatch.setattr(BlobStore, "verified", watched)
    monkeypatch.setattr(merges, "LARGE_BYTES", 0)
    fresh = Merges(stacks.shelf, stacks.merges._calibrations)
    large = fresh.merge(stack, "pocket", "svd", plain)
    assert sorted(read) == sorted(p.version.digest for p in stack)
    for name, factors in small.layers.items():
        assert torch.equal(delta(factors), delta(large.layers[name]))
    with pytest.raises(InvalidRequest, match="nowhere"):
        fresh.merge(pinned(one=Weight.of_parts(1.0, {"nowhere": 0.5})), "pocket", "svd", plain)
