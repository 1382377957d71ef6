"""Who fights whom: every number against dense matrices."""

import math

import pytest
import torch
from torch import Tensor

from compose.factors import Factors
from compose.groups import Adapter
from compose.heatmap import heat_map
from compose.interference import interference, part_of
from compose.moments import Moment
from compose.weights import Weight

K = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 12,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": 9,
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 10,
}
Q, KEY, TEXT = K


def adapter(seed: int, weight: Weight, names: tuple[str, ...], *, measured: bool = True) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    layers = {n: Factors(torch.randn(8, 3, generator=g), torch.randn(3, K[n], generator=g)) for n in names}
    moments = {n: Moment(torch.rand(k, generator=g), torch.randn(k, 4, generator=g)) for n, k in K.items()}
    return Adapter(layers, weight, moments if measured else {})


def update(one: Adapter, name: str) -> Tensor:
    f = one.layers[name]
    return one.weight.of(name) * f.up.double() @ f.down.double()


def inputs(one: Adapter, name: str) -> Tensor:
    if one.moments:
        m = one.moments[name]
        return torch.diag(m.diagonal.double()) + m.factor.double() @ m.factor.double().mT
    V = torch.linalg.svd(update(one, name), full_matrices=False)[2][:3]
    return V.mT @ V


@pytest.mark.parametrize("measured", [True, False])
def test_crosstalk_norms_and_angles_are_those_of_dense_matrices(measured: bool) -> None:
    one = adapter(1, Weight(1.0), (Q, TEXT), measured=measured)
    two = adapter(2, Weight.of_parts(0.5, {"attn1": 2.0}), (Q, KEY))
    report = interference([one, two])

    def energy(of: Adapter, where: Adapter, names: set[str]) -> float:
        return sum(
            float((update(of, n) @ inputs(where, n) @ update(of, n).mT).trace())
            for n in names & set(of.layers)
        )

    here = set(K) if measured else set(one.layers)  # where nothing was measured only its own layers count
    assert report.crosstalk(0, 1) == pytest.approx(
        math.sqrt(energy(two, one, here) / energy(one, one, set(K))), rel=1e-6
    )
    assert report.crosstalk(1, 0) == pytest.approx(
        math.sqrt(energy(one, two, set(K)) / energy(two, two, set(K))), rel=1e-6
    )
    assert report.crosstalk(0, 1, "text_encoder") == 0.0  # the other one says nothing there
    assert report.crosstalk(1, 0, "text_encoder") == math.inf  # and there it has no voice of its own
    for i, member in enumerate((one, two)):
        assert report.norm(i) == pytest.approx(
            math.sqrt(sum(float(update(member, n).square().sum()) for n in member.layers))
        )
    inner = float((update(one, Q) * update(two, Q)).sum())
    assert report.cosine(0, 1) == pytest.approx(inner / report.norm(0) / report.norm(1))
    both = (
        torch.cat([update(one, Q) + update(two, Q), update(two, KEY)], dim=1).square().sum()
        + update(one, TEXT).square().sum()
    )
    assert report.coherence() == pytest.approx(math.sqrt(float(both)) / (report.norm(0) + report.norm(1)))
    (U, _, V), (X, _, Y) = (torch.linalg.svd(update(m, Q), full_matrices=False) for m in (one, two))
    expected = (
        float(torch.linalg.svdvals(V[:3] @ Y[:3].mT)[0]),
        float(torch.linalg.svdvals(U[:, :3].mT @ X[:, :3])[0]),
    )
    assert report.cosines["", 0, 1] == pytest.approx(expected, rel=1e-6)


def test_the_same_adapter_twice_is_one_voice() -> None:
    one = adapter(1, Weight(1.0), (Q, TEXT))
    report = interference([one, one])
    assert report.crosstalk(0, 1) == pytest.approx(1.0)
    assert report.cosine(0, 1) == pytest.approx(1.0)
    assert report.coherence() == pytest.approx(1.0)


def test_parts_are_named_as_one_would_say_them() -> None:
    assert [part_of(name) for name in K] == [
        "unet.down_blocks.0 attn1",
        "unet.down_blocks.0 attn2",
        "text_encoder",
    ]
    assert part_of("transformer.transformer_blocks.7.attn.to_q") == "transformer.transformer_blocks.7 attn"
    assert part_of("unet.conv_in") == "unet conv_in"


def test_the_heat_map_is_loud_where_it_is_loud() -> None:
    report = interference([adapter(1, Weight(1.0), (Q, TEXT)), adapter(2, Weight(8.0), (Q, KEY))])
    image = heat_map(report, ["one", "a-very-long-name-of-an-adapter-that-goes-on-and-on"])
    assert image.width < 900
    cells = [image.getpixel((image.width - x, 75)) for x in (20, image.width - 210)]
    assert len({cells[0], (255, 255, 255)}) == 2


def test_a_report_that_nobody_wants_any_more_stops_at_the_next_meeting() -> None:
    class Gone(Exception):
        pass

    left = 0

    def check() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Gone

    stack = [adapter(seed, Weight(1.0), (Q, TEXT)) for seed in (1, 2, 3)]
    for asked in range(1, 27):  # 2 batches of 1 + 3 pairs + 3 * 3 answers
        left = asked
        with pytest.raises(Gone):
            interference(stack, check=check)
    left = 27
    assert interference(stack, check=check) == interference(stack)
    assert left == 1
