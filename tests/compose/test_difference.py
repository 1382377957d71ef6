"""The distance of two adapters is that of their dense updates."""

import pytest
import torch

from compose.difference import differences, total
from compose.errors import InvalidRequest
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


def test_a_dora_is_as_far_away_as_what_it_adds_to_the_bases_weights() -> None:
    g = torch.Generator().manual_seed(0)
    W = {n: torch.randn(6, 8, generator=g, dtype=torch.float64) for n in ("a", "b", "c")}
    plain = {n: Factors(torch.randn(6, 2, generator=g), torch.randn(2, 8, generator=g)) for n in W}
    rows, columns = 1 + torch.rand(6, 1, generator=g), 1 + torch.rand(1, 8, generator=g)
    dora = {
        "a": Factors(plain["a"].up, plain["a"].down, rows),
        "b": Factors(plain["b"].up, plain["b"].down, columns),
    }

    def updates(layers: dict[str, Factors], name: str) -> torch.Tensor:
        if name not in layers:
            return torch.zeros_like(W[name])
        if (m := layers[name].magnitude) is None:
            return delta(layers[name])
        V = W[name] + delta(layers[name])
        return m.double() * V / V.norm(dim=1 if m.shape[1] == 1 else 0, keepdim=True) - W[name]

    for one, other in ((plain, dora), (dora, plain), (dora, dora | {"a": plain["a"]})):
        told = differences(one, other, golden=lambda name: W[name].float())
        assert [c.layer for c in told] == list(dict.fromkeys([*one, *other]))
        for c in told:
            a, b = updates(one, c.layer), updates(other, c.layer)
            assert (c.before, c.after) == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)
            assert c.change == pytest.approx(float((a - b).norm()), rel=1e-5, abs=1e-5)
            if float(a.norm() * b.norm()):
                assert c.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
    with pytest.raises(
        InvalidRequest, match="'a' is a DoRA layer: what it adds depends on the base's weights"
    ):
        differences(dora, dora)
