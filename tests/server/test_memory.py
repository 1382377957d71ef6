"""What a server holds of adapters and merges is counted with its bases, within one budget, and told."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from atelier.client import AtelierError, Client
from atelier.messages import method
from compose.residence import Residence, held
from compose.warm import WarmPipeline
from server.engine import InProcessEngine
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving

RANK = 8


@pytest.fixture
def size(tmp_path: Path) -> int:
    """Bytes of each of three adapters, in float32."""
    for seed in range(3):
        layers = random_factors("pocket", seed=seed, rank=RANK)
        write_kohya(tmp_path / f"file{seed}", layers)
    return sum(f.up.nbytes + f.down.nbytes for f in layers.values())


def served(tmp_path: Path, warm: WarmPipeline, room: int) -> Iterator[tuple[Running, Client]]:
    base = sum(held(warm).values())
    engine = InProcessEngine(Residence(warm, budget=base + room))
    with (
        serving(tmp_path / "data", warm, engine=engine) as running,
        Client(running.address, timeout=120) as client,
    ):
        for seed in range(3):
            client.check_in(tmp_path / f"file{seed}", name=f"hero{seed}", triggers=[f"hero{seed}"])
        yield running, client


def parts(client: Client) -> dict[str, int]:
    return {part.name: part.size_bytes for part in client.status().memory.parts}


def test_adapters_and_merges_are_parts_of_the_budget(tmp_path: Path, warm: WarmPipeline, size: int) -> None:
    for _, client in served(tmp_path, warm, 2 * size + size // 2):
        told = held(warm)
        assert parts(client) == {"bases": told["bases"], "golden": told["golden"]}
        for number, count in ((0, 1), (1, 2), (2, 2), (2, 2), (0, 2)):
            list(client.render("a star", stack={f"hero{number}": 1.0}, steps=1))
            assert parts(client)["adapters"] == count * size
        refs = [adapter.ref for adapter in client.status().adapters.adapters]
        assert refs == ["hero0:1", "hero2:1"]
        status = client.status()
        assert sum(part.size_bytes for part in status.memory.parts) <= status.memory.budget_bytes
        assert status.adapters.size_bytes == parts(client)["adapters"]


def test_a_merge_is_kept_as_long_as_there_is_room(tmp_path: Path, warm: WarmPipeline, size: int) -> None:
    for _, client in served(tmp_path, warm, 40 * size):
        stack = {"hero0": 1.0, "hero1": 0.5}
        list(client.render("a star", stack=stack, method=method("svd", rank=RANK), steps=1))
        found = parts(client)
        assert (found["adapters"], found["merges"]) == (2 * size, size)
        assert found["prepared"] >= 2 * size
        assert client.status().adapters.merges == 1


def test_a_merge_that_cannot_be_kept_renders_all_the_same(
    tmp_path: Path, warm: WarmPipeline, size: int
) -> None:
    for _, client in served(tmp_path, warm, 2 * size):
        stack = {"hero0": 1.0, "hero1": 0.5}
        how = method("svd", rank=RANK)
        first, again = (
            [p.png for p in client.render("a star", stack=stack, method=how, steps=2, seed=1).pictures()]
            for _ in range(2)
        )
        assert first == again
        status = client.status()
        assert sum(part.size_bytes for part in status.memory.parts) <= status.memory.budget_bytes


def test_an_adapter_that_does_not_fit_beside_its_base_is_refused_and_others_render(
    tmp_path: Path, warm: WarmPipeline, size: int
) -> None:
    for _, client in served(tmp_path, warm, size - 1):
        with pytest.raises(AtelierError, match=r"hero0:1 needs \d+ MB, and beside the") as caught:
            list(client.render("a star", stack={"hero0": 1.0}, steps=1))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(list(client.render("a star", steps=1).pictures())) == 1
        assert "adapters" not in parts(client)
