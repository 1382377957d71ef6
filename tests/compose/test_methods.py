"""The merge methods against the dense textbook, and the properties each one promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.errors import InvalidRequest
from compose.factors import Factors, spectrum
from compose.groups import Adapter as GroupedAdapter
from compose.merging import Prepared
from compose.methods import Parameters
from compose.weights import Weight
from tests.adapters import blend

Adapter = dict[str, Factors]


def adapter(seed: int, rank: int, shapes: dict[str, tuple[int, int]]) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    return {
        name: Factors(torch.randn(d, rank, generator=g), torch.randn(rank, k, generator=g))
        for name, (d, k) in shapes.items()
    }


SHAPES = {"a": (24, 40), "b": (24, 40), "c": (64, 32)}


def delta(layers: Adapter, name: str) -> torch.Tensor:
    return layers[name].up.double() @ layers[name].down.double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_naive_is_the_weighted_sum_also_where_ranks_and_layers_differ() -> None:
    one, two = adapter(1, 4, SHAPES), adapter(2, 7, {"a": (24, 40), "d": (8, 8)})
    merged = blend([(one, 0.7), (two, -1.5)]).layers
    assert set(merged) == {"a", "b", "c", "d"}
    assert relative(delta(merged, "a"), 0.7 * delta(one, "a") - 1.5 * delta(two, "a")) < 1e-6
    assert relative(delta(merged, "d"), -1.5 * delta(two, "d")) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 20), st.integers(0, 99))
def test_svd_is_the_best_approximation_and_knows_its_error(ranks: list[int], rank: int, seed: int) -> None:
    stack = [(adapter(seed + i, r, SHAPES), 0.5 + i) for i, r in enumerate(ranks)]
    merged = blend(stack, method="svd", parameters=Parameters(rank=rank))
    error = total = 0.0
    for name in SHAPES:
        exact = sum(w * delta(a, name) for a, w in stack)
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert (delta(merged.layers, name) - best).norm() < 1e-5 * exact.norm()
        error += float(S[rank:].square().sum())
        total += float(S.square().sum())
    assert merged.truncation_error == pytest.approx(math.sqrt(error / total), abs=1e-5)


def test_svd_by_energy_keeps_the_smallest_rank_that_holds_it() -> None:
    one = adapter(1, 12, SHAPES)
    merged = blend([(one, 1.0)], method="svd", parameters=Parameters(energy=0.9)).layers
    for name in SHAPES:
        squares = torch.linalg.svdvals(delta(one, name)).square()
        shares = squares.cumsum(0) / squares.sum()
        assert merged[name].rank == int((shares < 0.9).sum()) + 1


def test_twins_and_zero_weights_are_rank_deficient_and_harmless() -> None:
    one = adapter(1, 6, SHAPES)
    twins = blend([(one, 0.5), (one, 0.5)], method="svd", parameters=Parameters(rank=12)).layers
    none = blend([(one, 0.0)], method="svd", parameters=Parameters(rank=6)).layers
    for name in SHAPES:
        assert relative(delta(twins, name), delta(one, name)) < 1e-5
        assert delta(none, name).abs().max() == 0


def test_the_spectrum_is_that_of_the_dense_update() -> None:
    one = adapter(3, 9, {"a": (30, 50)})["a"]
    s = spectrum(one.up[None], one.down[None])
    dense = torch.linalg.svdvals(one.up.double() @ one.down.double())[:9]
    torch.testing.assert_close(s.values[0], dense, rtol=1e-9, atol=0)
    torch.testing.assert_close(s.left[0].mT @ s.left[0], torch.eye(9).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(s.right[0] @ s.right[0].mT, torch.eye(9).double(), atol=1e-8, rtol=0)


def test_the_first_adapter_of_an_orthogonal_merge_answers_its_own_inputs_as_if_alone() -> None:
    one, two, three = (adapter(i, 5, SHAPES) for i in range(3))
    stack = [(one, 1.0), (two, 0.8), (three, 1.2)]
    guarded = blend(stack, method="orthogonal", parameters=Parameters(protect=1.0))
    plain = blend(stack)
    for name in SHAPES:
        x = one[name].down.double().mT @ torch.randn(5, 1, dtype=torch.float64)
        alone = delta(one, name) @ x
        assert relative(delta(guarded.layers, name) @ x, alone) < 1e-5
        assert relative(delta(plain.layers, name) @ x, alone) > 0.1
    assert guarded.kept[0] == 1.0
    assert 0 < guarded.kept[1] < 1


def test_orthogonal_updates_obey_pythagoras_and_the_first_stays_bit_identical() -> None:
    one, two = adapter(1, 5, SHAPES), adapter(2, 5, SHAPES)
    merged = blend([(one, 1.0), (two, 1.0)], method="orthogonal", parameters=Parameters(protect=1.0)).layers
    for name in SHAPES:
        first, second = merged[name].down[:5], merged[name].down[5:]
        assert torch.equal(first, one[name].down)
        assert (first.double() @ second.double().mT).abs().max() < 1e-5
        parts = delta(one, name).norm() ** 2 + (two[name].up.double() @ second.double()).norm() ** 2
        assert float(delta(merged, name).norm() ** 2 / parts) == pytest.approx(1, abs=1e-6)


def test_strength_zero_is_naive_to_the_bit_and_more_strength_keeps_less() -> None:
    stack = [(adapter(1, 5, SHAPES), 1.0), (adapter(2, 5, SHAPES), 1.0)]
    untouched = blend(stack, method="orthogonal", parameters=Parameters(strength=0.0)).layers
    for name, factors in blend(stack).layers.items():
        assert torch.equal(factors.down, untouched[name].down)
    kept = [
        blend(stack, method="orthogonal", parameters=Parameters(strength=s)).kept[1]
        for s in (0.0, 0.3, 0.6, 1.0)
    ]
    assert kept == sorted(kept, reverse=True)


def test_a_second_copy_of_the_same_adapter_vanishes() -> None:
    one = adapter(1, 5, SHAPES)
    merged = blend([(one, 1.0), (one, 1.0)], method="orthogonal", parameters=Parameters(protect=1.0))
    assert merged.kept[1] < 1e-5


def test_equal_inputs_give_equal_bytes() -> None:
    stack = [(adapter(1, 5, SHAPES), 1.0), (adapter(2, 8, SHAPES), 0.5)]
    a, b = (blend(stack, method="svd", parameters=Parameters(rank=6)).layers for _ in range(2))
    assert all(torch.equal(a[n].up, b[n].up) and torch.equal(a[n].down, b[n].down) for n in SHAPES)


@pytest.mark.parametrize(
    ("weights", "method", "parameters", "field"),
    [
        ([], "naive", Parameters(), "stack"),
        ([1.0] * 17, "naive", Parameters(), "stack"),
        ([math.nan], "naive", Parameters(), "stack.weight"),
        ([math.inf], "naive", Parameters(), "stack.weight"),
        ([9.0], "naive", Parameters(), "stack.weight"),
        ([1.0], "magic", Parameters(), "method.name"),
        ([1.0], "naive", Parameters(rank=4), "method.rank"),
        ([1.0], "svd", Parameters(rank=0), "method.rank"),
        ([1.0], "svd", Parameters(rank=65536), "method.rank"),
        ([1.0], "svd", Parameters(rank=4, energy=0.5), "method.energy"),
        ([1.0], "svd", Parameters(energy=0.0), "method.energy"),
        ([1.0], "svd", Parameters(energy=math.nan), "method.energy"),
        ([1.0], "orthogonal", Parameters(strength=1.5), "method.strength"),
        ([1.0], "orthogonal", Parameters(protect=0.0), "method.protect"),
    ],
)
def test_a_wrong_parameter_is_named(
    weights: list[float], method: str, parameters: Parameters, field: str
) -> None:
    one = adapter(1, 2, {"a": (4, 4)})
    with pytest.raises(InvalidRequest) as refused:
        blend([(one, w) for w in weights], method=method, parameters=parameters)
    assert refused.value.field == field


def test_what_is_kept_counts_the_layers_of_one_adapter_alone_too() -> None:
    first, second = adapter(1, 4, {"a": (24, 40)}), adapter(2, 4, SHAPES)
    merged = blend([(first, 1.0), (second, 1.0)], method="orthogonal", parameters=Parameters(protect=1.0))
    before = sum(float(delta(second, name).square().sum()) for name in SHAPES)
    taken = delta(merged.layers, "a") - delta(first, "a")
    after = sum(float(delta(second, name).square().sum()) for name in ("b", "c")) + float(
        taken.square().sum()
    )
    assert merged.kept == (1.0, pytest.approx(math.sqrt(after / before), rel=1e-5))


class Unwanted(Exception):
    """What a test's `check` raises."""


class Patience:
    """A `check` that raises when it is called for the last of so many times."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Unwanted


@pytest.mark.parametrize(
    ("method", "told", "calls"),
    [
        ("svd", Parameters(rank=3), 2),  # two shapes, two batches
        ("ties", Parameters(rank=3), 5),  # and each of its three layers
    ],
)
def test_a_merge_asks_between_batches_whether_it_is_wanted_and_stops(
    method: str, told: Parameters, calls: int
) -> None:
    stack = [GroupedAdapter(adapter(i, 4, SHAPES)) for i in (1, 2)]
    weights = [Weight(1.0), Weight(0.5)]
    prepared, patient = Prepared(stack), Patience(calls + 1)
    expected = prepared.merge(weights, method=method, parameters=told, check=patient)
    assert patient.left == 1
    stopped = Prepared(stack)
    for _ in range(2):  # from nothing, then with what a finished merge has left
        for call in range(1, calls + 1):
            with pytest.raises(Unwanted):
                stopped.merge(weights, method=method, parameters=told, check=Patience(call))
        again = stopped.merge(weights, method=method, parameters=told)
        for name in SHAPES:
            assert torch.equal(again.layers[name].up, expected.layers[name].up)
            assert torch.equal(again.layers[name].down, expected.layers[name].down)
        assert again.truncation_error == expected.truncation_error
        stopped.merge(weights[::-1], method=method, parameters=told)  # or it would be there already


def test_iso_of_a_smaller_rank_keeps_where_the_sum_was_largest_and_knows_its_error() -> None:
    stack = [(adapter(1, 5, SHAPES), 1.0), (adapter(2, 4, SHAPES), 0.5)]
    lost = total = 0.0
    for told in (Parameters(rank=3), Parameters(energy=3 / 9)):  # all nine values are equal
        merged = blend(stack, method="iso", parameters=told)
        for name in SHAPES:
            exact = delta(stack[0][0], name) + 0.5 * delta(stack[1][0], name)
            U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
            level = S[:9].mean()
            assert relative(delta(merged.layers, name), level * U[:, :3] @ Vh[:3]) < 1e-5
            assert merged.layers[name].rank == 3
            lost, total = lost + float(6 * level**2), total + float(9 * level**2)
        assert merged.truncation_error == pytest.approx(math.sqrt(lost / total), rel=1e-5)


@pytest.mark.parametrize("method", ["knots", "core-ties"])
@pytest.mark.parametrize("told", [Parameters(rank=4, density=0.5), Parameters(energy=0.8, density=0.5)])
def test_a_finished_sum_of_a_smaller_rank_is_its_best_approximation(method: str, told: Parameters) -> None:
    one = adapter(1, 5, SHAPES)
    twins = {
        name: Factors(torch.cat([f.up, f.up], 1), torch.cat([f.down, f.down]) / 2) for name, f in one.items()
    }
    for stack in (
        [(one, 1.0), (adapter(2, 4, SHAPES), -0.5)],
        [(one, 1.0), (twins, 0.5), (adapter(3, 1, SHAPES), 1.0)],  # rank-deficient
    ):
        whole = blend(stack, method=method, parameters=Parameters(density=0.5)).layers
        cut = blend(stack, method=method, parameters=told)
        lost = total = 0.0
        for name in SHAPES:
            U, S, Vh = torch.linalg.svd(delta(whole, name), full_matrices=False)
            shares = S.square().cumsum(0) / S.square().sum()
            rank = told.rank or int((shares < 0.8).sum()) + 1
            assert cut.layers[name].rank == rank
            assert relative(delta(cut.layers, name), U[:, :rank] * S[:rank] @ Vh[:rank]) < 1e-5
            lost, total = lost + float(S[rank:].square().sum()), total + float(S.square().sum())
        assert cut.truncation_error == pytest.approx(math.sqrt(lost / total), rel=1e-4)
