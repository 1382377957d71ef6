"""What a prepared stack keeps between merges: bounded in bytes, and only what no weight changes."""

from dataclasses import replace

import pytest
import torch

from compose.groups import Adapter, active, group, nbytes
from compose.lapack import eigh
from compose.memo import _sizes
from compose.merging import Merged, Prepared
from compose.methods import METHODS, Parameters
from compose.moments import Moment
from compose.weights import Weight
from tests.compose.test_methods import SHAPES, adapter

RANKS = (4, 6)
FACTORS = sum(4 * r * (d + k) for r in RANKS for d, k in SHAPES.values())


def stack() -> list[Adapter]:
    g = torch.Generator().manual_seed(0)
    return [
        Adapter(
            adapter(i, rank, SHAPES),
            moments={
                n: Moment(torch.rand(k, generator=g) + 0.1, torch.randn(k, 3, generator=g))
                for n, (_, k) in SHAPES.items()
            },
        )
        for i, rank in enumerate(RANKS)
    ]


def merged(prepared: Prepared, method: str, second: float = 0.5) -> Merged:
    told = Parameters(rank=3) if "rank" in METHODS[method].parameters else Parameters()
    return prepared.merge([Weight(1.0), Weight(second)], method=method, parameters=told)


def test_it_holds_the_factors_once_and_says_how_much_that_is() -> None:
    prepared = Prepared(stack())
    assert prepared.nbytes() == 0
    merged(prepared, "naive")
    assert nbytes(stack(), active(stack())) == prepared.nbytes() == FACTORS


@pytest.mark.parametrize("results", [0, 2_000, 20_000, 1 << 30])
def test_whatever_is_tried_it_stays_within_its_budget_and_the_numbers_are_the_same(results: int) -> None:
    prepared = Prepared(stack(), results=results)
    for method in METHODS:
        for second in (0.5, -0.7):
            found, meant = merged(prepared, method, second), merged(Prepared(stack()), method, second)
            assert prepared.nbytes() <= FACTORS + results
            for name in SHAPES:
                assert torch.equal(found.layers[name].up, meant.layers[name].up)
                assert torch.equal(found.layers[name].down, meant.layers[name].down)


def test_a_batch_has_room_for_its_moments_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, k = ("a", "b"), SHAPES["a"][1]
    factors = sum(4 * r * sum(SHAPES["a"]) for r in RANKS)
    moments = len(RANKS) * 4 * k * (1 + 3)
    bare = [replace(adapter, moments={}) for adapter in stack()]
    for room, split, together in ((2 * factors, stack(), bare), (2 * (factors + moments), [], stack())):
        monkeypatch.setattr("compose.groups.CHUNK_BYTES", room)
        assert layers in [batch.layers for batch in group(together)]
        assert layers not in [batch.layers for batch in group(split)]


def test_a_stack_over_its_budget_keeps_nothing() -> None:
    prepared = Prepared(stack(), kept=FACTORS - 1)
    merged(prepared, "svd")
    assert prepared.nbytes() == 0


def test_another_set_of_adapters_lets_go_of_what_the_last_one_kept() -> None:
    prepared = Prepared(stack())
    merged(prepared, "svd")
    merged(prepared, "naive", second=0.0)  # as if it were not there
    assert prepared.nbytes() == sum(4 * RANKS[0] * (d + k) for d, k in SHAPES.values())


def test_what_a_projection_comes_to_is_kept_once() -> None:
    prepared = Prepared(stack())
    prepared.merge([Weight(1.0), Weight(0.5)], method="tsv", parameters=Parameters(rank=3))
    cores = len(SHAPES) * 3 * 8 * sum(RANKS) ** 2  # a Gram matrix, a root and its inverse, float64
    weights = 4 * len(RANKS) * len(SHAPES)
    results = sum(4 * 3 * (d + k) for d, k in SHAPES.values())
    assert prepared.nbytes() == 2 * FACTORS + cores + weights + results


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("results", [0, 1 << 30])
def test_the_weight_of_a_part_costs_the_layers_of_that_part_alone(method: str, results: int) -> None:
    def weights(factor: float) -> list[Weight]:
        return [Weight(1.0), Weight.of_parts(0.5, {"a": factor})]

    told = Parameters(rank=3) if "rank" in METHODS[method].parameters else Parameters()
    prepared = Prepared(stack(), results=results)
    before = prepared.merge(weights(0.8), method=method, parameters=told)
    after = prepared.merge(weights(-0.3), method=method, parameters=told)
    meant = Prepared(stack()).merge(weights(-0.3), method=method, parameters=told)
    assert (after.kept, after.truncation_error) == (meant.kept, meant.truncation_error)
    for name in SHAPES:
        assert torch.equal(after.layers[name].up, meant.layers[name].up)
        assert torch.equal(after.layers[name].down, meant.layers[name].down)
        there = name != "a" and results and method not in {"naive"}
        assert (after.layers[name].down is before.layers[name].down) == bool(there)
    other = prepared.merge(weights(-0.3), method="svd", parameters=Parameters(rank=2))
    assert {factors.rank for factors in other.layers.values()} == {2}


def test_methods_in_turn_hold_no_more_than_is_counted() -> None:
    """14 MiB are room for the outcome and the core of either method, not of both."""
    g = torch.Generator().manual_seed(0)
    shapes = {f"l{i}": (320, 320) for i in range(60)}
    limit = 14336 << 10
    prepared = Prepared([Adapter(adapter(seed, 16, shapes)) for seed in range(3)], results=limit)
    for turn in range(3):
        for method, told in (
            ("orthogonal", Parameters(strength=0.3 + 0.2 * turn, rank=16)),
            ("tsv", Parameters(rank=16 + turn)),
        ):
            weights = torch.rand(3, generator=g).tolist()
            prepared.merge([Weight(w) for w in weights], method=method, parameters=told)
            memo, own = prepared._memo, [t for group in prepared._groups for t in (group.up, group.down)]
            held = [value for places in memo._kept.values() for value, _ in places.values()]
            assert sum(_sizes(held, besides=own).values()) == memo.nbytes <= limit
            assert len(held) == 2  # one batch: what the method comes to, and its core


@pytest.mark.parametrize("told", [Parameters(rank=3), Parameters(energy=0.9), Parameters(ratio=2.0)])
@pytest.mark.parametrize("most", [0, 1 << 30])
def test_batches_that_are_solved_together_come_to_the_same_bytes(
    told: Parameters, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[int] = []

    def counted(problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        solved.append(len(problems))
        return eigh(problems)

    monkeypatch.setattr("compose.merging.eigh", counted)
    monkeypatch.setattr("compose.merging.POSED_BYTES", most)
    weights = [Weight(1.0), Weight(-0.5)]
    together = Prepared(stack()).merge(weights, method="svd", parameters=told)
    assert solved == ([len(SHAPES)] if most else [2, 1])  # of one shape each
    apart = Prepared(stack(), kept=0).merge(weights, method="svd", parameters=told)
    assert list(together.layers) == list(apart.layers)
    for name, factors in apart.layers.items():
        assert torch.equal(together.layers[name].up, factors.up)
        assert torch.equal(together.layers[name].down, factors.down)
    assert together.truncation_error == apart.truncation_error
