"""Moments: measured on a live pipeline, sketched, kept, and what they are good for."""

import math

import pytest
import torch
from torch import Tensor, nn

from compose.calibrate import _omega, _Sketch, by_layer, from_bytes, measure, reads, to_bytes
from compose.errors import InvalidRequest, NonFinite
from compose.families import adaptable, table
from compose.moments import Moment, solved_right, stacked, total
from compose.pocket import ADAPTERS
from compose.pocket.calibrate import Silent, shipped
from compose.pocket.evaluate import read
from compose.settings import Settings
from compose.warm import WarmPipeline, alone

SETTINGS = Settings(prompt="", seed=3, steps=3, guidance=4.0, width=64, height=64)


def dense(moment: Moment) -> Tensor:
    return torch.diag(moment.diagonal.double()) + moment.factor.double() @ moment.factor.double().mT


def test_layers_that_read_the_same_share_a_moment_and_others_do_not() -> None:
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    assert reads(f"{block}.attn1.to_q") == reads(f"{block}.attn1.to_v") == f"{block}.attn1"
    assert (
        reads(f"{block}.attn2.to_k") == reads("unet.up_blocks.0.x.attn2.to_v") == "unet.encoder_hidden_states"
    )
    assert reads(f"{block}.attn2.to_q") == f"{block}.attn2.to_q"
    assert reads(f"{block}.attn1.to_out.0") == f"{block}.attn1.to_out.0"


def test_what_is_measured_is_what_flowed(warm: WarmPipeline) -> None:
    """Against a plain sum of outer products, taken by a hook of our own."""
    layer = next(
        n for n in table("pocket") if n.endswith("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    )
    module = dict(adaptable("unet", warm.pipeline.unet))[layer]
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2).double())
    )
    layers = read(ADAPTERS / "milo.safetensors")
    try:
        found = measure(
            warm, ["a milo"] * 2, stack=alone(layers), settings=SETTINGS, listener=Silent(), rank=1024
        )
    finally:
        hook.remove()
        warm.apply(())
    x = torch.cat(seen)
    G = x.mT @ x
    G /= G.diagonal().mean()
    assert (dense(found[reads(layer)]) - G).norm() < 1e-4 * G.norm()
    linears = [
        n
        for c in ("unet", "text_encoder")
        for n, m in adaptable(c, getattr(warm.pipeline, c))
        if isinstance(m, nn.Linear)
    ]
    assert set(found) == {reads(n) for n in linears}


def test_what_was_rendered_before_is_measured_all_the_same(warm: WarmPipeline) -> None:
    first, again = (
        measure(warm, ["a star"], stack=(), settings=SETTINGS, listener=Silent()) for _ in range(2)
    )
    assert first.keys() == again.keys()
    assert any(read.startswith("text_encoder") for read in again)


def test_a_sketch_of_few_directions_is_exact_and_of_many_keeps_the_strongest() -> None:
    g = torch.Generator().manual_seed(0)
    few = torch.randn(500, 6, generator=g) @ torch.randn(6, 200, generator=g)
    many = torch.randn(4000, 200, generator=g) * (torch.arange(1, 201) ** -1.0)
    for x, tolerance in ((few, 1e-3), (many, 0.05)):
        sketch = _Sketch.of(_omega(200, rank=16))
        for part in x.split(100):
            sketch.see(part)
        moment = sketch.moment(16)
        G = x.double().mT @ x.double()
        G /= G.diagonal().mean()
        assert moment is not None
        assert (dense(moment) - G).norm() < tolerance * G.norm()
        assert float((moment.diagonal + moment.factor.square().sum(-1)).mean()) == pytest.approx(1, abs=1e-3)
    assert _Sketch.of(_omega(8, rank=4)).moment(4) is None
    endless = _Sketch.of(_omega(8, rank=4))
    endless.see(torch.full((2, 8), 1e30))
    with pytest.raises(NonFinite, match="cannot be measured"):
        endless.moment(4)


def test_woodbury_is_the_inverse() -> None:
    g = torch.Generator().manual_seed(1)
    moments = [Moment(torch.rand(30, generator=g), torch.randn(30, 4 + i, generator=g)) for i in range(3)]
    batch = [stacked([m], torch.device("cpu")) for m in moments]
    metric = total([(1.0, batch[0]), (3.0, batch[1]), (0.5, batch[2])], 1e-3)
    expected = dense(moments[0]) + 3 * dense(moments[1]) + 0.5 * dense(moments[2]) + 1e-3 * torch.eye(30)
    A = torch.randn(1, 5, 30, generator=g, dtype=torch.float64)
    torch.testing.assert_close(solved_right(A, metric)[0], A[0] @ expected.inverse(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(batch[0].right_of(A)[0], A[0] @ dense(moments[0]), rtol=1e-9, atol=1e-12)


def test_moments_survive_their_file_and_a_damaged_one_is_refused(warm: WarmPipeline) -> None:
    data = next(iter(shipped(warm.base.digest).values())).read_bytes()
    moments = from_bytes(data, "pocket")
    kept = {reads(layer): moment for layer, moment in moments.items()}
    again = from_bytes(to_bytes(kept, {}), "pocket")
    assert again.keys() == moments.keys() == by_layer(kept, "pocket").keys()
    assert all(torch.equal(again[n].factor, moments[n].factor) for n in moments)
    with pytest.raises(InvalidRequest, match="calibrate again"):
        from_bytes(data[:-5], "pocket")
    (layer, moment), *_ = kept.items()
    for broken in (
        Moment(moment.diagonal[:-1], moment.factor[:-1]),
        Moment(moment.diagonal * math.nan, moment.factor),
    ):
        with pytest.raises(InvalidRequest, match="do not fit"):
            from_bytes(to_bytes(kept | {layer: broken}, {}), "pocket")


def test_the_demo_adapters_ship_calibrated(warm: WarmPipeline) -> None:
    import hashlib

    lora = [
        p for p in ADAPTERS.glob("*.safetensors") if p.stem in {"milo", "fungo", "ochreframe", "nightbars"}
    ]
    digests = {f"sha256:{hashlib.sha256(p.read_bytes()).hexdigest()}" for p in lora}
    assert digests == set(shipped(warm.base.digest))
