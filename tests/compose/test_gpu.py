"""The same code on CUDA: exact on the way back, the same merges, and what only a GPU has: the kernel, graphs,
memory that runs out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier.client import Client
from atelier.messages import AtelierError
from compose import bases, lapack
from compose.difference import differences, total
from compose.factors import to_device
from compose.formats.export import to_diffusers
from compose.formats.products import Product
from compose.groups import Adapter
from compose.interference import interference
from compose.merging import merge
from compose.methods import Parameters
from compose.projection import projection
from compose.render import Picture, render
from compose.settings import Settings
from compose.warm import WarmPipeline, alone, warm_up
from compose.weights import Weight
from tests.adapters import Layers, blend, delta, random_factors, write_kohya
from tests.conftest import serving
from tests.graphs import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moved(layers: Layers, device: str) -> Layers:
    return {name: factors.to(device) for name, factors in layers.items()}


def test_a_half_precision_base_is_rounded_once_and_restored_to_the_bit() -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    one = random_factors("pocket", seed=1, rank=4)
    golden = {name: warm.live(name).clone() for name in one}
    warm.apply(alone(one))
    for name, factors in one.items():
        meant = (golden[name].float() + factors.up.cuda() @ factors.down.cuda()).half()
        torch.testing.assert_close(warm.live(name), meant, rtol=1e-3, atol=1e-4)
    warm.apply(())
    assert warm.is_golden()


@pytest.mark.parametrize("kept", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["naive", "svd", "orthogonal"])
def test_a_merge_on_the_gpu_is_the_merge_on_the_cpu(method: str, kept: str) -> None:
    stack = [(random_factors("pocket", seed=seed, rank=6), 0.5 + seed) for seed in range(3)]
    told = Parameters(rank=8) if method == "svd" else Parameters()
    here = blend(stack, method=method, parameters=told)
    stack = [(moved(layers, kept), weight) for layers, weight in stack]
    there = blend(stack, method=method, parameters=told, device="cuda")
    for name, factors in here.layers.items():
        mine, theirs = delta(factors), delta(there.layers[name]).cpu()
        assert (mine - theirs).norm() < 1e-4 * mine.norm()


def test_factors_on_the_gpu_are_projected_compared_and_inspected_as_in_memory() -> None:
    here = [random_factors("pocket", seed=seed, rank=6) for seed in range(2)]
    there = [moved(layers, "cuda") for layers in here]
    meant, found = (np.frombuffer(projection(layers[0]), np.float32) for layers in (here, there))
    assert np.abs(found - meant).max() < 1e-4 * np.abs(meant).max()
    assert total(differences(*there)).change == pytest.approx(total(differences(*here)).change, rel=1e-5)
    reports = [interference([Adapter(layers) for layers in stack]) for stack in (here, there)]
    assert reports[1].crosstalk(0, 1) == pytest.approx(reports[0].crosstalk(0, 1), rel=1e-4)
    assert to_diffusers(there[0], "pocket") == to_diffusers(here[0], "pocket")


def test_a_product_on_the_gpu_is_the_product_in_memory() -> None:
    """A LoKr of whole matrices beside a LoRA: patched, cut to a rank, projected."""
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    g = torch.Generator().manual_seed(0)
    tensors = {"lokr_w1": torch.randn(8, 8, generator=g), "lokr_w2": torch.randn(16, 16, generator=g) / 10}
    product = Product("lokr", tensors, None, rank=128, shape=(128, 128))
    other = random_factors("pocket", seed=3, rank=4)
    warm = warm_up(bases.find("pocket"), device="cuda")
    golden = warm.live(name).double().cpu()
    warm.apply(
        [(to_device({name: product}.items(), "cuda"), Weight(0.5)), (moved(other, "cuda"), Weight(1.0))]
    )
    meant = golden + 0.5 * product.whole().double() + other[name].whole().double()
    assert (warm.live(name).double().cpu() - meant).norm() < 1e-3 * meant.norm()
    warm.apply(())
    assert warm.is_golden()
    here, there = (
        merge([Adapter({name: factors})], method="svd", parameters=Parameters(rank=8), device=device)
        for factors, device in ((product, "cpu"), (product.to("cuda"), "cuda"))
    )
    cut = here.layers[name].whole()
    assert (there.layers[name].whole().cpu() - cut).norm() < 1e-4 * cut.norm()
    assert np.allclose(
        np.frombuffer(projection({name: product.to("cuda")}), np.float32),
        np.frombuffer(projection({name: product}), np.float32),
        atol=1e-4,
    )


def test_a_stack_is_the_same_to_the_bit_whatever_was_applied_before() -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    one, two = (random_factors("pocket", seed=seed, rank=4) for seed in (1, 2))
    some = {name: f for i, (name, f) in enumerate(one.items()) if i % 3}
    warm.apply(alone(one))
    first = {name: warm.live(name).clone() for name in warm.layers()}
    for before in (some, two, {**two, **some}):
        warm.apply(alone(before))
        warm.apply(alone(one))
        assert all(torch.equal(warm.live(name), bits) for name, bits in first.items())


def test_golden_weights_in_host_memory_are_as_good() -> None:
    base = bases.find("pocket")
    for dtype in (torch.float16, torch.float32):
        pipeline = bases.load(base, device="cuda", dtype=dtype)
        warm = WarmPipeline(base, pipeline, golden_on_host=True)
        warm.apply(alone(random_factors("pocket", seed=1, rank=4)))
        assert not warm.is_golden()
        warm.apply(())
        assert warm.is_golden()


def some(name: str) -> bool:
    """Layers of the middle, and of the text encoder."""
    return "mid_block" in name or name.startswith("text")


TYPES = (torch.float16, torch.bfloat16, torch.float32)


def fresh(dtype: torch.dtype, *, golden_on_host: bool = False) -> WarmPipeline:
    base = bases.find("pocket")
    return WarmPipeline(base, bases.load(base, device="cuda", dtype=dtype), golden_on_host=golden_on_host)


@pytest.mark.parametrize("golden_on_host", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_kernel_rounds_once_what_float64_says(dtype: torch.dtype, golden_on_host: bool) -> None:
    warm = fresh(dtype, golden_on_host=golden_on_host)
    assert warm._board
    everything = random_factors("pocket", seed=1, rank=20, where=lambda _: True)
    stack = [
        (moved(everything, "cuda"), Weight(0.7)),
        (random_factors("pocket", seed=2, rank=7, where=some), Weight(-0.4)),
    ]
    golden = {name: warm.live(name).double() for name in warm.layers()}
    warm.apply(stack)
    unequal = total = 0
    for name in everything:
        meant = golden[name] + sum(w.of(name) * delta(a[name]).cuda() for a, w in stack if name in a)
        found = warm.live(name)
        rounding = torch.finfo(dtype).eps * meant.abs() + 1e-6
        assert ((found.double() - meant).abs() <= rounding).all(), name
        unequal += int((found != meant.to(dtype)).sum())
        total += found.numel()
    if dtype != torch.float32:
        assert unequal < 2e-3 * total  # but for sums that lie between two numbers
    warm.apply(())
    assert warm.is_golden()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_golden_minus_zero_is_one_again(dtype: torch.dtype) -> None:
    warm = fresh(dtype)
    assert warm._board
    everything = random_factors("pocket", seed=1, rank=4, where=lambda _: True)
    for name in everything:
        warm.live(name)[0] = -0.0
    warm.apply(alone(everything))
    warm.apply(())
    assert warm.is_golden()
    assert all(warm.live(name)[0].signbit().all() for name in everything)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_base_and_a_merge_on_another_gpu_are_as_on_the_first() -> None:
    one = random_factors("pocket", seed=1, rank=4)
    found = []
    for device in ("cuda:0", "cuda:1"):
        warm = warm_up(bases.find("pocket"), device=device)
        assert warm._board
        warm.apply(alone(one))
        merged = blend([(one, 1.0), (one, 0.5)], method="svd", parameters=Parameters(rank=2), device=device)
        here = [warm.live(name).cpu() for name in one]
        found.append(here + [delta(f).cpu() for f in merged.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("size", [1e-120, 1.0, 1e120])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 16, 33, 255])
def test_eigenvectors_of_any_size_are_those_of_the_library(n: int, size: float) -> None:
    jacobi = pytest.importorskip("compose.jacobi")
    g = torch.Generator().manual_seed(n)
    X = torch.randn(3, n, n + 4, generator=g, dtype=torch.float64)
    X[1] = X[1, :1]  # of rank 1
    X /= torch.linalg.matrix_norm(X, keepdim=True)
    X[2] = 0
    M = X @ X.mT * size
    values, vectors = (found.cpu() for found in jacobi.eigh(M.cuda()))
    meant = torch.linalg.eigvalsh(M)
    torch.testing.assert_close(values / size, meant / size, rtol=0, atol=1e-12)
    again = vectors * (values / size).unsqueeze(-2) @ vectors.mT
    torch.testing.assert_close(again, M / size, rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors[0].mT @ vectors[0], torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("least", [-3, -6, -14])
def test_eigenvectors_of_far_and_near_values_are_orthogonal(least: int) -> None:
    jacobi = pytest.importorskip("compose.jacobi")
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(256, 256, generator=g, dtype=torch.float64)).Q
    meant = torch.logspace(least, 0, 256, dtype=torch.float64)
    values, vectors = (found.cpu() for found in jacobi.eigh(((Q * meant) @ Q.mT)[None].cuda()))
    torch.testing.assert_close(values[0], meant, rtol=0, atol=1e-12)
    kept = vectors[0, :, meant > 2e-14]
    torch.testing.assert_close(kept.mT @ kept, torch.eye(kept.shape[1], dtype=torch.float64))


def test_what_does_not_compile_is_done_the_other_way_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fused, jacobi = (pytest.importorskip(f"compose.{name}") for name in ("fused", "jacobi"))

    def forget() -> None:
        for known in (lapack._jacobi, jacobi.ready, fused._goes):
            known.cache_clear()

    forget()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(jacobi, "_orthogonalise", None)
            patched.setattr(fused, "_write", None)
            boards = [fresh(torch.float16)._board for _ in "ab"]
            M = torch.eye(3, dtype=torch.float64, device="cuda").expand(2, 3, 3)
            values = [lapack.eigh(M)[0] for _ in "ab"]
    finally:
        forget()
    assert boards == [None, None]
    assert all(torch.equal(found, torch.ones_like(found)) for found in values)
    assert [record.name for record in caplog.records].count("compose.compiling") == 2
    assert fresh(torch.float16)._board


def test_at_once_is_layer_by_layer_to_rounding() -> None:
    board, layerwise = fresh(torch.float32), fresh(torch.float32)
    layerwise._board = None
    one, two = (
        random_factors("pocket", seed=seed, rank=4, where=w) for seed, w in ((1, some), (2, lambda _: True))
    )
    for stack in (alone(one), ((one, Weight(0.5, (("text_encoder", 0.0),))), (two, Weight(2.0))), ()):
        for warm in (board, layerwise):
            warm.apply(stack)
        for name in board.layers():
            torch.testing.assert_close(board.live(name), layerwise.live(name), rtol=1e-5, atol=1e-5)


class Kept:
    """A listener that keeps the pictures."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def check(self) -> None: ...
    def step(self, image: int, step: int) -> None: ...
    def preview(self, image: int, step: int, picture: Picture) -> None: ...
    def picture(self, image: int, picture: Picture) -> None:
        self.pictures.append(picture)


def test_pictures_are_repeated_to_the_bit_whatever_was_rendered_before() -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    settings = Settings(prompt="a red star", seed=3, steps=6, width=64, height=64)
    one, two = (alone(random_factors("pocket", seed=seed, rank=4)) for seed in (1, 2))

    def drawn(stack: object) -> bytes:
        kept = Kept()
        render(warm, settings, stack=stack, listener=kept)
        return kept.pictures[0].tobytes()

    first = [drawn(stack) for stack in (one, two, ())]
    assert len(set(first)) == 3
    assert [drawn(stack) for stack in ((), one, two)] == [first[2], first[0], first[1]]


def step_of(warm: WarmPipeline) -> tuple[Tensor, Tensor]:
    latent = torch.randn(
        2, warm.denoiser.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    words = warm.prompts.encode("a star").tensors["prompt_embeds"]
    return latent.to("cuda", warm.denoiser.dtype), words.expand(2, -1, -1).contiguous()


def test_a_captured_graph_goes_on_over_switches() -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    latent, words = step_of(warm)
    timestep = torch.tensor(500, device="cuda")
    stacks = [alone(random_factors("pocket", seed=seed, rank=1 + seed)) for seed in range(4)] + [()]

    def step() -> Tensor:
        found: Tensor = warm.denoiser(latent, timestep, words, return_dict=False)[0]
        return found

    with torch.no_grad():
        replay, found = captured(step)
        for stack in (*stacks, *stacks):
            warm.apply(stack)
            replay()
            torch.testing.assert_close(found, step(), rtol=1e-2, atol=1e-2)
    assert warm.is_golden()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_switches_compile_nothing_again(mode: str) -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    latent, words = step_of(warm)
    compiled = torch.compile(warm.denoiser, mode=mode, dynamic=False)
    stacks = [alone(random_factors("pocket", seed=seed, rank=1 + seed)) for seed in range(4)]
    seen = []
    try:
        with torch.no_grad():
            for _ in range(3):
                bare = compiled(latent, 500, words, return_dict=False)[0].clone()
            frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert frames
            for turn in range(8):
                warm.apply(stacks[turn % 4])
                seen.append(compiled(latent, 500, words, return_dict=False)[0].clone())
            warm.apply(())
            again = compiled(latent, 500, words, return_dict=False)[0].clone()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames
    finally:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    assert torch.equal(again, bare)
    assert torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[0], bare)


@contextmanager
def little_memory() -> Iterator[None]:
    """As if the GPU had hardly more memory than is taken."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_render_that_finds_no_memory_is_refused_and_the_next_one_right(tmp_path: Path) -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    write_kohya(tmp_path / "hero", random_factors("pocket", seed=1, rank=4), family="pocket")
    with (
        serving(tmp_path / "data", warm, device="cuda") as running,
        Client(running.address, timeout=60) as client,
    ):
        client.check_in(tmp_path / "hero", name="hero", base="pocket")

        def drawn() -> bytes:
            (picture,) = client.render("a red star", stack={"hero": 1.0}, seed=1, steps=4).pictures()
            return np.asarray(Image.open(BytesIO(picture.png))).tobytes()

        before = drawn()
        with little_memory(), pytest.raises(AtelierError) as refused:
            list(client.render("a red star", stack={"hero": 1.0}, steps=1, width=1024, height=1024))
        assert refused.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert drawn() == before
