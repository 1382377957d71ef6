"""The distance of two adapters is that of their dense updates."""

import pytest
import torch

from compose.difference import differences, total
from compose.factors import Factors
from tests.adapters import delta, random_factors


def test_it_is_the_distance_of_the_dense_updates() -> None:
    a = random_factors("pocket", seed=1, rank=4)
    b = {name: Factors(f.up + 0.1, f.down) for name, f in a.items()} | random_factors(
        "pocket", seed=2, rank=6, where=lambda name: ".ff." in name
    )
    del b["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    told = differences(a, b)
    assert [c.layer for c in told] == list(dict.fromkeys([*a, *b]))
    dense_a, dense_b = [], []
    for c in told:
        one, other = (delta(x[c.layer]) if c.layer in x else None for x in (a, b))
        one = torch.zeros_like(other) if one is None else one
        other = torch.zeros_like(one) if other is None else other
        dense_a.append(one.flatten())
        dense_b.append(other.flatten())
        assert c.change == pytest.approx(float((one - other).norm()), rel=1e-6, abs=1e-9)
        assert (c.before, c.after) == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-6)
    x, y = torch.cat(dense_a), torch.cat(dense_b)
    assert total(told).change == pytest.approx(float((x - y).norm()), rel=1e-6)
    assert total(told).cosine == pytest.approx(
        float(torch.nn.functional.cosine_similarity(x, y, dim=0)), rel=1e-6
    )


def test_equal_adapters_are_not_apart() -> None:
    a = random_factors("pocket", seed=1, rank=4)
    assert total(differences(a, dict(a))).cosine == pytest.approx(1.0)
    assert max(c.change for c in differences(a, dict(a))) < 1e-6
