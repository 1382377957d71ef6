"""Projections estimate cosines without bias, and are the same for ever."""

from statistics import mean, stdev

import numpy as np
import pytest
import torch

from compose.difference import differences, total
from compose.factors import Factors
from compose.projection import COORDINATES, cosine, projection
from registry.nearest import Near, Nearby
from tests.adapters import Layers, random_factors


def near(a: Layers, b: Layers) -> list[Near]:
    return Nearby(lambda: [(0, "", projection(a)), (1, "", projection(b))]).nearest(0, at_least=-1.0, limit=1)


def estimate(a: Layers, b: Layers) -> float:
    (found,) = near(a, b)
    return found.cosine


def between(a: Layers, b: Layers, share: float) -> Layers:
    """`a`, and `share` of `b` beside it."""
    return {
        name: Factors(torch.cat([a[name].up, b[name].up * share], 1), torch.cat([a[name].down, b[name].down]))
        for name in a
    }


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0, 3.0])
def test_an_estimate_is_near_the_cosine_without_bias(share: float) -> None:
    errors = []
    for seed in range(40):
        a, b = (random_factors("pocket", seed=2 * seed + i, rank=2) for i in range(2))
        mixed = between(a, b, share)
        true = total(differences(a, mixed)).cosine
        assert cosine(a, mixed) == pytest.approx(true, abs=1e-6)
        errors.append(estimate(a, mixed) - true)
    expected = (1 - true**2) / COORDINATES**0.5  # of a correlation estimated from so many coordinates
    assert abs(mean(errors)) < 4 * expected / 40**0.5 + 1e-6
    assert stdev(errors) < 2 * expected + 1e-6


def test_a_projection_does_not_depend_on_rank_scale_order_or_machine() -> None:
    a = random_factors("pocket", seed=1, rank=3)
    padded = {
        name: Factors(torch.cat([f.up, torch.zeros_like(f.up)], 1), torch.cat([f.down, f.down]))
        for name, f in reversed(a.items())
    }
    assert estimate(a, padded) == pytest.approx(1.0, abs=1e-6)
    ones = {"unet.x": Factors(torch.ones(5, 1), torch.ones(1, 7))}
    kept = np.frombuffer(projection(ones), np.float32)
    wanted = [-1, -2, 1, 2, -3, -1, 1, -2, -1, 0, -1]  # whole numbers, but for the transform's rounding
    assert np.abs(kept - np.array(wanted + [0] * (COORDINATES - len(wanted)))).max() < 1e-5


def test_what_is_nothing_is_like_nothing() -> None:
    a = random_factors("pocket", seed=1, rank=3)
    zero = {name: Factors(f.up * 0, f.down) for name, f in a.items()}
    assert cosine(a, zero) == cosine(zero, zero) == cosine(a, {}) == 0.0
    assert near(zero, a) == near(a, zero) == []


def test_an_error_in_a_layer_is_told_and_no_more_layers_are_read() -> None:
    asked = []

    class Bad(dict[str, Factors]):
        def __getitem__(self, name: str) -> Factors:
            asked.append(name)
            if name == "l3":
                raise KeyError("a layer that cannot be read")
            return super().__getitem__(name)

    layers = Bad({f"l{n}": Factors(torch.ones(400, 64), torch.ones(64, 400)) for n in range(500)})
    with pytest.raises(KeyError, match="cannot be read"):
        projection(layers)
    assert len(asked) < 500
