"""Adapters beside quantised layers: the numbers of the plain dense path, and nothing left behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compose import bases
from compose.bases import FP8, load
from compose.calibrate import measure
from compose.errors import IncompatibleBase
from compose.factors import Factors
from compose.families import adaptable
from compose.layerwise import Stack
from compose.ledger import Ledger
from compose.pocket.calibrate import Silent
from compose.render import Picture, render
from compose.residence import Residence, estimate, held
from compose.settings import Settings
from compose.sidecars import Sidecar, is_plain
from compose.warm import WarmPipeline, alone, warm_up
from compose.weights import Weight
from compose.words import SPARE_ROWS
from tests.adapters import Layers
from tests.pipelines import tiny

FAMILIES = ("sd1", "sdxl", "sd3", "flux")


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp("fp8") / request.param)


@pytest.fixture(scope="module")
def stored(path: Path) -> WarmPipeline:
    """A base whose denoiser is stored in 8 bits."""
    return warm_up(replace(bases.find(str(path)), fp8=True))


@pytest.fixture(scope="module")
def rounded(path: Path, stored: WarmPipeline) -> WarmPipeline:
    """The same in float32, its weights rounded through 8 bits where the other's are."""
    base = bases.find(str(path))
    pipeline = load(base, device="cpu", dtype=torch.float32)
    theirs = dict(stored.denoiser.named_parameters())
    with torch.no_grad():
        for name, parameter in (getattr(pipeline, "unet", None) or pipeline.transformer).named_parameters():
            if theirs[name].dtype == FP8:
                parameter.copy_(parameter.to(FP8).float())
    return WarmPipeline(base, pipeline)


def some(warm: WarmPipeline, *, seed: int, rank: int = 3, scale: float = 0.05) -> Layers:
    g = torch.Generator().manual_seed(seed)
    shapes = {name: warm.live(name).shape for name in warm.layers()}
    return {
        name: Factors(torch.randn(d, rank, generator=g) * scale, torch.randn(rank, k, generator=g) * scale)
        for name, (d, k) in sorted(shapes.items())
    }


class Kept(Silent):
    """A listener that keeps pictures."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def picture(self, image: int, picture: Picture) -> None:
        self.pictures.append(picture)


def latents(warm: WarmPipeline, stack: Stack) -> Tensor:
    """What the denoiser predicts last, of two steps."""
    seen: list[Tensor] = []
    hook = warm.denoiser.register_forward_hook(lambda _, __, output: seen.append(output[0].clone()))
    try:
        render(
            warm,
            Settings(prompt="a star", seed=5, steps=2, guidance=3.0, width=32, height=32),
            stack=stack,
            listener=Kept(),
        )
    finally:
        hook.remove()
    return seen[-1]


def test_a_stored_base_has_its_denoiser_in_8_bits_and_everything_else_as_it_was(
    stored: WarmPipeline, rounded: WarmPipeline
) -> None:
    eight = [p for p in stored.denoiser.parameters() if p.dtype == FP8]
    assert sum(p.numel() for p in eight) > 0.5 * sum(p.numel() for p in stored.denoiser.parameters())
    assert all(p.dtype == torch.float32 for p in stored.pipeline.text_encoder.parameters())
    assert (stored.dtype, rounded.dtype) == ("float8_e4m3fn", "float32")
    assert set(stored.layers()) == set(rounded.layers())
    assert stored.modules == rounded.modules
    assert stored.weight_bytes() == rounded.weight_bytes() - 3 * sum(p.numel() for p in eight)
    assert stored.golden_bytes() < rounded.golden_bytes()
    for name, norm in stored.norms().items():
        assert norm == pytest.approx(rounded.norms()[name], rel=1e-6)


def test_a_stack_beside_gives_the_numbers_of_the_dense_path(
    stored: WarmPipeline, rounded: WarmPipeline
) -> None:
    stack = [(some(rounded, seed=1), Weight(0.8)), (some(rounded, seed=2, rank=5), Weight(-0.4))]
    bare = latents(stored, ())
    assert torch.equal(bare, latents(rounded, ()))
    beside, dense = latents(stored, stack), latents(rounded, stack)
    assert (beside - dense).norm() < 1e-5 * dense.norm()
    assert (beside - bare).norm() > 1e-2 * bare.norm()  # and in 8 bits most of it would be lost
    half = [(layers, Weight(weight.value / 2)) for layers, weight in stack]
    assert not torch.equal(latents(stored, half), beside)
    assert torch.equal(latents(stored, stack), beside)
    assert not stored.is_golden()
    assert torch.equal(latents(stored, ()), bare)
    assert stored.is_golden()
    rounded.apply(())


def test_pictures_with_none_before_and_after_are_equal_to_the_bit(stored: WarmPipeline) -> None:
    def drawn(stack: Stack) -> Picture:
        kept = Kept()
        settings = Settings(prompt="a star", seed=5, steps=2, guidance=3.0, width=32, height=32)
        render(stored, settings, stack=stack, listener=kept)
        return kept.pictures[0]

    before = drawn(())
    changed = drawn(alone(some(stored, seed=3, scale=0.2)))
    assert not np.array_equal(changed, before)
    assert np.array_equal(drawn(()), before)


def test_a_failure_midway_leaves_nothing_beside(stored: WarmPipeline) -> None:
    layers = some(stored, seed=4)
    plain = next(name for name in stored.layers() if name in stored._arena)
    broken = {**layers, plain: Factors(layers[plain].up, layers[plain].down[:-1])}
    stored.apply(alone(layers), key="whole")
    with pytest.raises(RuntimeError):
        stored.apply(alone(broken), key="broken")
    assert stored.is_golden()


def test_a_dora_is_refused_beside_and_nothing_changes(stored: WarmPipeline) -> None:
    layers = some(stored, seed=4)
    name = next(iter(stored._sidecars))
    part = layers[name]
    dora = {name: replace(part, magnitude=torch.ones(part.up.shape[0], 1))}
    with pytest.raises(IncompatibleBase, match="is a DoRA layer, whose effect depends on the base's exact"):
        stored.apply(alone(dora))
    assert stored.is_golden()


def test_it_is_calibrated_like_any_other(stored: WarmPipeline, rounded: WarmPipeline) -> None:
    settings = Settings(prompt="", seed=1, steps=1, guidance=3.0, width=32, height=32)
    ours, dense = (
        measure(warm, ["a star"], stack=(), settings=settings, listener=Silent())
        for warm in (stored, rounded)
    )
    assert ours.keys() == dense.keys()
    assert all(torch.equal(ours[read].diagonal, dense[read].diagonal) for read in ours)


def test_it_counts_with_what_it_takes(path: Path, stored: WarmPipeline, warm: WarmPipeline) -> None:
    base, full = replace(bases.find(str(path)), fp8=True), bases.find(str(path))
    residence = Residence(warm, [replace(base, name="small")])
    found = residence.warm("small")
    assert residence.ledger.used() == sum(held(warm).values()) + sum(held(found).values())
    assert sum(held(found).values()) == stored.weight_bytes() + stored.golden_bytes()
    assert sum(estimate(base, warm.device).values()) < sum(estimate(full, warm.device).values())
    assert isinstance(residence.ledger, Ledger)


def test_what_layerwise_casting_leaves_alone_is_known_from_the_headers(
    path: Path, stored: WarmPipeline
) -> None:
    base = replace(bases.find(str(path)), fp8=True)
    theirs = [p.numel() for p in stored.denoiser.parameters() if p.dtype != FP8]
    kept = [b.numel() for b in stored.denoiser.buffers() if b.numel() > 1]  # SD3's table of positions
    assert base.uncast == sum(theirs) + sum(kept)
    told, exact = estimate(base, stored.device), held(stored)
    tables = [encoder.rows.table for encoder in stored.prompts._encoders.values()]
    spare = sum(SPARE_ROWS * table.shape[1] * 4 for table in tables)  # for words, of which files know nothing
    assert told["bases"] + spare - exact["bases"] == sum(kept) * 4
    assert exact["golden"] <= told["golden"]
    assert sum(exact.values()) <= sum(told.values()) <= 1.35 * sum(exact.values())


class Int8Linear(nn.Linear):
    """A quantised layer as libraries make them: a Linear by type, its weight whole numbers and a scale."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.scale = float(like.weight.detach().abs().max()) / 127
        whole = (like.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_layers_of_any_quantised_kind_take_adapters_beside_them(warm: WarmPipeline) -> None:
    base = bases.find("pocket")
    pipeline = load(base, device="cpu", dtype=torch.float32)
    block = pipeline.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.to_q = Int8Linear(block.attn1.to_q)
    quantised = WarmPipeline(base, pipeline)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert [*quantised._sidecars] == [name]
    assert set(quantised.layers()) == set(warm.layers())
    d, k = warm.live(name).shape
    x = torch.randn(2, 7, k, generator=torch.Generator().manual_seed(0))
    bare = block.attn1.to_q(x)
    part = Factors(torch.randn(d, 4), torch.randn(4, k))
    quantised.apply([({name: part}, Weight(0.5))])
    wanted = bare + functional.linear(functional.linear(x, part.down), part.up * 0.5)
    assert torch.equal(block.attn1.to_q(x), wanted)
    half = block.attn1.to_q(x.half())
    assert half.dtype == torch.float16
    assert (half.float() - wanted).norm() < 5e-3 * wanted.norm()
    quantised.apply(())
    assert torch.equal(block.attn1.to_q(x), bare)
    assert name not in quantised.norms()  # packed
    with pytest.raises(IncompatibleBase, match=r"packed as torch\.int8"):
        quantised.live(name)
    with pytest.raises(IncompatibleBase, match="has no"):
        quantised.apply(alone({name: Factors(part.up[:-1], part.down)}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
        lambda: nn.Conv2d(6, 8, (1, 3), padding="same", dilation=2),
        lambda: nn.Linear(6, 8),
    ],
)
def test_what_is_beside_a_layer_is_its_update(make: Callable[[], nn.Linear | nn.Conv2d]) -> None:
    torch.manual_seed(0)
    layer = make().double().requires_grad_(False)
    sidecar = Sidecar(layer)
    d, k = sidecar.shape
    parts = [(Factors(torch.randn(d, r), torch.randn(r, k)), w) for r, w in ((2, 0.5), (3, -1.5))]
    x = torch.randn(2, 6, 9, 11) if isinstance(layer, nn.Conv2d) else torch.randn(2, 5, 6)
    x = x.double()
    bare = layer(x)
    sidecar.put(parts)
    found = layer(x)
    sidecar.put(())
    assert torch.equal(layer(x), bare)
    update = sum((f.up.double() @ f.down.double() * w for f, w in parts), torch.zeros(d, k).double())
    layer.weight.add_(update.view(layer.weight.shape))
    torch.testing.assert_close(found, layer(x), rtol=1e-6, atol=1e-6)


def test_a_grouped_convolution_that_is_quantised_is_refused_and_plain_layers_are_plain() -> None:
    grouped = Sidecar(nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(IncompatibleBase, match="quantised convolution of 2 groups"):
        grouped.check("unet.x", None)
    pipeline = load(bases.find("pocket"), device="cpu", dtype=torch.float32)
    assert all(is_plain(module) for _, module in adaptable("unet", pipeline.unet))
    assert not is_plain(Int8Linear(nn.Linear(4, 4)))
