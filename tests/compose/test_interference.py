"""Who fights whom: every number against dense matrices."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import ImageChops
from torch import Tensor

from compose.factors import Factors
from compose.groups import Adapter
from compose.heatmap import heat_map
from compose.interference import interference, part_of
from compose.merging import merge
from compose.methods import Parameters
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


def rows(one: Adapter, name: str) -> Tensor:
    """An orthonormal basis of what an adapter reads, in columns."""
    return torch.linalg.svd(update(one, name), full_matrices=False)[2][:3].mT


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
        for part in (Q, "text_encoder", "unet.down_blocks.0 attn2"):
            there = [n for n in member.layers if part in {n, part_of(n)}]
            norms = math.sqrt(sum(float(update(member, n).square().sum()) for n in there))
            assert report.norm(i, part) == pytest.approx(norms)
    alone = {n: [m for m in (one, two) if n in m.layers] for n in K}
    assert set(report.every_layer) == set(K)
    for where, answers, i, j in ((one, two, 0, 1), (two, one, 1, 0)):
        energies = [
            float((update(m, Q) @ inputs(where, Q) @ update(m, Q).mT).trace()) for m in (answers, where)
        ]
        heard = report.crosstalk(i, j, Q)
        assert heard == pytest.approx(math.sqrt(energies[0] / energies[1]), rel=1e-6)
        assert report.crosstalk(i, j, "unet.down_blocks.0 attn1") == pytest.approx(heard)
        V = rows(where, Q)
        in_weights = float((update(answers, Q) @ V).norm() / (update(where, Q) @ V).norm())
        assert report.crosstalk_in_weights(i, j, Q) == pytest.approx(in_weights, rel=1e-6)
        theirs = rows(answers, Q)
        kept = float(
            (update(where, Q) - update(where, Q) @ theirs @ theirs.mT).norm() / update(where, Q).norm()
        )
        assert report.apart(i, Q) == pytest.approx(kept, rel=1e-6)
        for name in where.layers:  # where nobody else is, all of it is kept
            assert report.apart(i, name) == pytest.approx(kept if len(alone[name]) > 1 else 1.0, rel=1e-6)
    sums = float((update(one, Q) + update(two, Q)).norm())
    assert report.coherence(Q) == pytest.approx(sums / (report.norm(0, Q) + report.norm(1, Q)))
    assert report.cosine(0, 1, KEY) == 0.0
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


def test_what_is_apart_is_what_orthogonal_keeps_of_who_comes_last() -> None:
    stack = [adapter(seed, Weight(0.5 * seed), (Q, TEXT)) for seed in (1, 2, 3)]
    report = interference(stack)
    for last in range(3):
        order = [*(one for one in stack if one is not stack[last]), stack[last]]
        merged = merge(order, method="orthogonal", parameters=Parameters(protect=1.0))
        assert report.apart(last) == pytest.approx(merged.kept[-1], rel=1e-5)
    twins = interference([stack[0], stack[1], stack[0]])
    assert [twins.apart(i) for i in (0, 2)] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert interference([stack[0], adapter(4, Weight(0.0), (Q, TEXT))]).apart(1) == 1.0


def test_adapters_that_fill_a_layer_leave_nothing_apart() -> None:
    stack = [adapter(seed, Weight(1.0), (KEY,)) for seed in range(5)]  # 15 directions of 9
    assert all(interference(stack).apart(i) < 1e-3 for i in range(5))


def test_parts_are_named_as_one_would_say_them() -> None:
    assert [part_of(name) for name in K] == [
        "unet.down_blocks.0 attn1",
        "unet.down_blocks.0 attn2",
        "text_encoder",
    ]
    assert part_of("transformer.transformer_blocks.7.attn.to_q") == "transformer.transformer_blocks.7 attn"
    assert part_of("unet.conv_in") == "unet conv_in"
    assert part_of("transformer.pos_embed.proj") == "transformer pos_embed"


def test_the_heat_map_is_loud_where_it_is_loud() -> None:
    report = interference([adapter(1, Weight(1.0), (Q, TEXT)), adapter(2, Weight(8.0), (Q, KEY))])
    image = heat_map(report, ["one", "a-very-long-name-of-an-adapter-that-goes-on-and-on"])
    assert image.width < 900
    cells = [image.getpixel((image.width - x, 75)) for x in (20, image.width - 210)]
    assert len({cells[0], (255, 255, 255)}) == 2
    names = ["one-of-a-long-name", "two"]
    bare = heat_map(replace(report, calibrated=(True, False)), names)
    said = heat_map(report, names)
    assert bare.width > 200
    assert bare.size == said.size
    changed = ImageChops.difference(bare, said).getbbox()
    assert changed
    assert changed[1] >= 2 * 24  # only who lives there by weights is told otherwise
    assert changed[3] <= 3 * 24
    foot = said.crop((0, said.height - 60, said.width, said.height))
    assert len(foot.getcolors()) > 2  # the legend


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
