"""Every merge method where it is odd: more rank than dimensions, nothing at all, opposites, twins; and what
all of them owe to the weights.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compose.errors import NonFinite
from compose.factors import Factors
from compose.groups import Adapter
from compose.merging import Merged, merge
from compose.methods import METHODS, Parameters
from compose.moments import Moment
from compose.weights import Weight

SHAPES = {"wide": (6, 9), "tall": (9, 6)}
RANDOM = {"dare-linear", "dare-ties"}
CALIBRATED = {"activation", "regmean"}
Layers = dict[str, Factors]


def layers(seed: int, rank: int) -> Layers:
    g = torch.Generator().manual_seed(seed)
    return {
        name: Factors(torch.randn(d, rank, generator=g), torch.randn(rank, k, generator=g))
        for name, (d, k) in SHAPES.items()
    }


def nothing(rank: int = 2) -> Layers:
    return {name: Factors(torch.zeros(d, rank), torch.zeros(rank, k)) for name, (d, k) in SHAPES.items()}


def member(own: Layers, weight: float, seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    moments = {
        name: Moment(torch.rand(k, generator=g) + 0.1, torch.randn(k, 3, generator=g))
        for name, (_, k) in SHAPES.items()
    }
    return Adapter(own, Weight(weight), moments)


def update(found: Layers | Merged, name: str) -> Tensor:
    factors = (found.layers if isinstance(found, Merged) else found)[name]
    return factors.up.double() @ factors.down.double()


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-9


def seeded(name: str) -> Parameters:
    """The full rank, so that nothing is cut, and a seed where there is one."""
    takes = METHODS[name].parameters
    return Parameters(rank=64 if "density" in takes else None, seed=3 if "seed" in takes else None)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("factor", [-1.0, 2.5])
def test_all_weights_times_a_number_is_the_result_times_it(name: str, factor: float) -> None:
    stack = [member(layers(1, 2), 1.0, 1), member(layers(2, 3), -0.6, 2), member(layers(3, 2), 0.3, 3)]
    once = merge(stack, method=name, parameters=seeded(name))
    turned = [replace(one, weight=one.weight.scaled(factor)) for one in stack]
    found = merge(turned, method=name, parameters=seeded(name))
    for layer in SHAPES:
        assert near(update(found, layer), factor * update(once, layer))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_factors_whose_squares_exceed_float32_merge_as_any_others(name: str) -> None:
    """A LoHa's factors are products, and come as large as this from a file of usual numbers."""
    ranked = "rank" in METHODS[name].parameters
    told = replace(seeded(name), rank=2) if ranked else seeded(name)
    usual = [member(layers(seed, 3), 1.0, seed) for seed in (1, 2)]
    for sides in ((2.0**66, 1.0), (1.0, 2.0**66)):
        large = [
            replace(a, layers={n: Factors(f.up * sides[0], f.down * sides[1]) for n, f in a.layers.items()})
            for a in usual
        ]
        meant, found = (merge(stack, method=name, parameters=told) for stack in (usual, large))
        assert found.truncation_error == pytest.approx(meant.truncation_error, rel=1e-4)
        for layer in SHAPES:
            assert near(update(found, layer) / 2.0**66, update(meant, layer))


@pytest.mark.parametrize("name", ["dare-linear", "magnitude-prune", "tsv", "orthogonal"])
def test_an_update_that_float32_cannot_hold_is_told(name: str) -> None:
    far = {n: Factors(f.up * 1e25, f.down * 1e25) for n, f in layers(1, 2).items()}
    told = Parameters(rank=2, mode="symmetric" if name == "orthogonal" else None)
    with pytest.raises(NonFinite, match="beyond float32: one of its adapters went wrong in training"):
        merge([member(far, 1.0), member(layers(2, 2), 1.0)], method=name, parameters=told)


@pytest.mark.parametrize("name", sorted(set(METHODS) - RANDOM - CALIBRATED))
def test_an_adapter_that_changes_nothing_is_as_if_it_were_not_there(name: str) -> None:
    """Of dare it moves the random numbers, of calibrated methods its activations count."""
    others = [member(layers(1, 2), 1.0), member(layers(2, 3), -0.6)]
    alone = merge(others, method=name, parameters=seeded(name))
    for place in range(3):
        with_it = merge(
            [*others[:place], member(nothing(), 1.0), *others[place:]], method=name, parameters=seeded(name)
        )
        assert all(near(update(with_it, layer), update(alone, layer)) for layer in SHAPES)
        if with_it.kept[place] is not None:
            assert with_it.kept[place] == 1.0  # of nothing, nothing was lost


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.0, 0.0)])
def test_nothing_merged_with_nothing_is_nothing(name: str, weights: tuple[float, float]) -> None:
    for own in (nothing(), layers(1, 2)) if weights == (0.0, 0.0) else (nothing(),):
        for told in [Parameters()] + [Parameters(energy=0.9)] * ("energy" in METHODS[name].parameters):
            found = merge([member(own, weights[0]), member(own, weights[1])], method=name, parameters=told)
            assert found.truncation_error == 0
            for layer in SHAPES:
                assert update(found, layer).abs().max() == 0
                assert found.layers[layer].rank >= 1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_adapter_without_layers_adds_none(name: str) -> None:
    alone = merge([member(layers(1, 2), 0.7, 1)], method=name, parameters=seeded(name))
    beside = merge(
        [member(layers(1, 2), 0.7, 1), replace(member({}, 1.0), moments={"x": None})],
        method=name,
        parameters=seeded(name),
    )  # type: ignore[dict-item]
    assert beside.layers.keys() == alone.layers.keys()
    assert all(torch.equal(beside.layers[layer].up, alone.layers[layer].up) for layer in SHAPES)
    assert merge([member({}, 1.0)], method=name, parameters=seeded(name)) == Merged(
        {}, (1.0,) if METHODS[name].separable else (None,), 0.0
    )


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("ranks", [(4, 4), (9, 9)], ids=["summed", "each"])
def test_more_rank_than_dimensions_is_no_special_case(name: str, ranks: tuple[int, int]) -> None:
    """6 x 9, with 8 columns or 18: the dense textbook where one says what should come out."""
    one, two = layers(1, ranks[0]), layers(2, ranks[1])
    stack = [member(one, 1.0, 1), member(two, -0.5, 2)]
    found = merge(stack, method=name, parameters=seeded(name))
    for layer, (d, k) in SHAPES.items():
        A, B = update(one, layer), update(two, layer)
        got, exact = update(found, layer), A - 0.5 * B
        assert torch.isfinite(got).all()
        match name:
            case "naive":
                assert near(got, exact)
            case "svd":
                U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
                rank = min(max(ranks), d, k)
                assert near(got, U[:, :rank] * S[:rank] @ Vh[:rank])
            case "iso":
                U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
                assert near(got, S.mean() * U @ Vh)
            case "tsv":
                parts = [torch.linalg.svd(X, full_matrices=False) for X in (A, B)]
                cut = [(U[:, :r], S[:r], Vh[:r]) for (U, S, Vh), r in zip(parts, ranks, strict=True)]
                U, V = torch.cat([u for u, _, _ in cut], 1), torch.cat([v.mT for _, _, v in cut], 1)
                S = torch.cat([cut[0][1], -0.5 * cut[1][1]])
                left, right = (
                    P @ Q for X in (U, V) for P, _, Q in [torch.linalg.svd(X, full_matrices=False)]
                )
                assert near(got, left * S @ right.mT)
    if (
        name == "orthogonal" and min(ranks) == 9
    ):  # the first one's inputs are all there are where they are six
        guarded = merge(stack, method=name, parameters=Parameters(protect=1.0))
        assert near(update(guarded, "tall"), update(one, "tall"))
    if name == "knots":
        summed = merge(stack, method="knots", parameters=Parameters(rule="sum"))
        assert all(near(update(summed, n), update(one, n) - 0.5 * update(two, n)) for n in SHAPES)


def test_opposite_twins_cancel_where_the_sum_is_meant() -> None:
    one = layers(1, 3)
    for name in ("naive", "svd", "iso", "knots", "core-ties", "ties"):
        found = merge([member(one, 1.0), member(one, -1.0)], method=name)
        for layer in SHAPES:
            assert update(found, layer).norm() < 1e-5 * update(one, layer).norm(), name


def test_twins_share_one_side_of_the_symmetric_mode_and_are_one_and_a_half_of_themselves() -> None:
    one = layers(1, 3)
    for side in ("input", "output"):
        told = Parameters(mode="symmetric", side=side)
        found = merge([member(one, 1.0), member(one, 1.0)], method="orthogonal", parameters=told)
        for layer in SHAPES:
            assert near(update(found, layer), math.sqrt(2) * update(one, layer), 1e-4)


def test_the_rank_that_svd_takes_by_itself_is_of_those_that_act() -> None:
    stack = [member(layers(1, 2), 1.0), member(layers(2, 3), 0.5), member(layers(3, 6), 0.0)]
    assert {f.rank for f in merge(stack, method="svd").layers.values()} == {3}
    parted = [*stack[:2], replace(stack[2], weight=Weight.of_parts(1.0, {"tall": 0.0, "wide": 0.0}))]
    assert {f.rank for f in merge(parted, method="svd").layers.values()} == {3}
