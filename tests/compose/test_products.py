"""LoKr and LoHa that would be larger as factors than their layer: kept as the file has them, and exact."""

from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from compose import factors, formats
from compose.arenas import decomposed
from compose.difference import differences
from compose.errors import InvalidRequest
from compose.factors import Factors, to_device
from compose.factors import Layers as Kept
from compose.formats.export import to_diffusers, to_kohya, to_peft
from compose.formats.products import Product, inner_product, is_smaller, products
from compose.groups import Adapter
from compose.interference import interference
from compose.merging import merge
from compose.methods import Parameters
from compose.projection import cosine, projection
from compose.sidecars import Sidecar
from compose.switchboard import Switchboard
from compose.warm import WarmPipeline
from compose.weights import Weight
from tests.adapters import random_factors, sketch

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LINEAR = f"unet.{ATTENTION}"
CONV = "unet.down_blocks.0.resnets.0.conv1"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lokr(a: int, b: int, c: int, e: int, *, seed: int = 0, magnitude: Tensor | None = None) -> Product:
    tensors = {"lokr_w1": numbers(a, b, seed=seed), "lokr_w2": numbers(c, e, seed=seed + 1)}
    rank = min(a, b) * min(c, e)
    return Product("lokr", tensors, magnitude, rank=rank, shape=(a * c, b * e))


def loha(d: int, k: int, r: int, *, seed: int = 0) -> Product:
    shapes = {"hada_w1_a": (d, r), "hada_w1_b": (r, k), "hada_w2_a": (d, r), "hada_w2_b": (r, k)}
    tensors = {role: numbers(*shape, seed=seed + i) for i, (role, shape) in enumerate(shapes.items())}
    return Product("loha", tensors, None, rank=min(d, k, r * r), shape=(d, k))


def dense(product: Product) -> Tensor:
    """By the definition, float64."""
    t = {role: tensor.double() for role, tensor in product._tensors.items()}
    if product.form == "lokr":
        A, B = t["lokr_w1"], t["lokr_w2"]
        return torch.einsum("ab,ce->acbe", A, B).reshape(len(A) * len(B), -1)
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def assert_close(found: Tensor, meant: Tensor, error: float = 1e-6) -> None:
    assert found.shape == meant.shape
    assert float((found.double() - meant.double()).norm()) <= error * float(meant.double().norm())


SIDES = st.integers(1, 7)
MADE = st.builds(lokr, SIDES, SIDES, SIDES, SIDES, seed=st.integers(0, 99)) | st.builds(
    loha, SIDES, SIDES, SIDES, seed=st.integers(0, 99)
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(MADE, st.integers(1, 3), st.integers(1, 3))
@hypothesis.example(loha(1, 1, 1, seed=48), 1, 1)  # all but -1
def test_a_product_is_its_definition_however_it_is_asked(product: Product, m: int, n: int) -> None:
    meant = dense(product)
    d, k = product.shape
    formed = product.formed()
    assert formed.rank == product.rank
    assert torch.equal(product.up, formed.up)
    assert torch.equal(product.down, formed.down)
    assert_close(formed.whole(), meant)
    assert_close(product.whole(), meant)
    weight = torch.where(meant < 0, -1.0, 1.0)  # no float32 has what is left where the two cancel
    assert_close(product.onto(weight), meant + weight)
    left, right = numbers(d, m, seed=5), numbers(k, n, seed=6)
    between = product.between(left, right)
    bound = 1e-5 * float(left.norm() * meant.norm() * right.norm())
    assert float((between.double() - left.mT.double() @ meant @ right.double()).norm()) <= bound
    rows = [(0, 1), (d // 2, d)]
    part = product.of_rows(rows)
    picked = torch.cat([meant[start:end] for start, end in rows])
    assert part.shape == tuple(picked.shape)
    assert_close(part.whole(), picked)
    assert_close(part.formed().whole(), picked)
    again = product.made_of([tensor.clone() for tensor in product.held])
    assert torch.equal(again.whole(), product.whole())
    assert again.shape == product.shape


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(MADE, MADE, st.integers(1, 4))
def test_inner_products_are_those_of_the_updates(one: Product, other: Product, rank: int) -> None:
    d, k = one.shape
    plain = Factors(numbers(d, rank, seed=7), numbers(rank, k, seed=8))
    pairs: list[tuple[Factors, Factors, Tensor]] = [
        (one, one, dense(one)),
        (one, plain, plain.whole().double()),
    ]
    if other.shape == one.shape:
        pairs.append((one, other, dense(other)))
    for a, b, second in pairs:
        meant = float((dense(one) * second).sum())
        bound = 1e-5 * float(dense(one).norm() * second.norm())
        assert abs(inner_product(a, b) - meant) <= bound
        assert abs(inner_product(b, a) - meant) <= bound


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.builds(lokr, SIDES, SIDES, SIDES, SIDES, seed=st.integers(0, 99)),
    st.sampled_from((1.0, 0.7, -2.0)),
    st.sampled_from(({"rank": 1}, {"rank": 3}, {"rank": 60}, {"energy": 0.8}, {"ratio": 4.0})),
)
def test_a_lokr_is_cut_as_its_matrix_is(product: Product, weight: float, how: dict[str, float]) -> None:
    parameters = Parameters(**how)  # type: ignore[arg-type]
    named = {"x": product}, {"x": Factors(dense(product).float(), torch.eye(product.shape[1]))}
    found, meant = (
        merge([Adapter(layers, Weight(weight))], method="svd", parameters=parameters) for layers in named
    )
    values = torch.linalg.svdvals(dense(product))
    hypothesis.assume(
        not bool((values[1:] > values[:-1] * 0.999).any())
    )  # which of two equal ones is anyone's
    assert found.layers["x"].rank == min(meant.layers["x"].rank, product.rank)
    assert_close(found.layers["x"].whole(), meant.layers["x"].whole(), 1e-4)
    assert abs(found.truncation_error - meant.truncation_error) < 1e-4


def test_a_lokr_in_a_stack_of_two_is_merged_as_its_factors() -> None:
    product, other = lokr(4, 4, 8, 8), random_pair(32, 32, 4)
    stack = [Adapter({"x": product}, Weight(0.5)), Adapter({"x": other, "y": other}, Weight(-1.0))]
    meant = 0.5 * dense(product) - other.whole().double()
    found = merge(stack, method="naive")
    assert_close(found.layers["x"].whole(), meant)
    assert_close(found.layers["y"].whole(), -other.whole().double())
    cut = merge(stack, method="svd", parameters=Parameters(rank=32))
    assert_close(cut.layers["x"].whole(), meant, 1e-5)
    one, same = (
        interference([Adapter({LINEAR: first}), Adapter({LINEAR: other})])
        for first in (product, product.formed())
    )
    assert one == same


def test_what_goes_to_a_gpu_at_once_comes_apart_as_it_was() -> None:
    dora = Factors(numbers(7, 3), numbers(3, 5, seed=1), numbers(7, 1, seed=2))
    sent = {"odd": dora, "product": lokr(3, 5, 7, 9), "even": Factors(numbers(8, 4), numbers(4, 12))}
    found = factors._sent(Kept(sent), "cpu")
    assert list(found) == list(sent)
    for name, one in sent.items():
        assert type(found[name]) is type(one)
        for there, here in zip(found[name].held, one.held, strict=True):
            assert torch.equal(there, here)
            assert there.data_ptr() % 16 == 0


def random_pair(d: int, k: int, rank: int) -> Factors:
    return Factors(numbers(d, rank, seed=20), numbers(rank, k, seed=21))


def written(path: Path, *, magnitude: Tensor | None = None) -> dict[str, Tensor]:
    """A LoKr of whole matrices of an attention layer and a convolution of pocket, as LyCORIS writes it."""
    linear, conv = (f"lycoris_{name.removeprefix('unet.').replace('.', '_')}" for name in (LINEAR, CONV))
    tensors = {
        f"{linear}.lokr_w1": numbers(8, 8, seed=1) / 10,
        f"{linear}.lokr_w2": numbers(16, 16, seed=2) / 10,
        f"{conv}.lokr_w1": numbers(8, 8, seed=3) / 10,
        f"{conv}.lokr_w2": numbers(10, 10, 3, 3, seed=4) / 10,
    }
    if magnitude is not None:
        tensors[f"{linear}.dora_scale"] = magnitude
    save_file(tensors, path)
    return {
        LINEAR: torch.kron(tensors[f"{linear}.lokr_w1"], tensors[f"{linear}.lokr_w2"]),
        CONV: torch.kron(tensors[f"{conv}.lokr_w1"].reshape(8, 8, 1, 1), tensors[f"{conv}.lokr_w2"]).flatten(
            1
        ),
    }


def opened(path: Path) -> dict[str, Factors]:
    return formats.load(path, formats.bind(sketch(path), "pocket"))


def test_it_is_what_a_product_in_a_file_becomes_and_takes_what_the_file_takes(tmp_path: Path) -> None:
    meant = written(tmp_path / "a")
    found = opened(tmp_path / "a")
    assert {name: type(factors) for name, factors in found.items()} == dict.fromkeys(meant, Product)
    for name, delta in meant.items():
        assert_close(found[name].whole(), delta)
    with formats.layers(tmp_path / "a", formats.bind(sketch(tmp_path / "a"), "pocket")) as layers:
        assert products(layers) == list(layers) == products(found)
        for name in layers:
            assert layers.nbytes(name) == sum(tensor.nbytes for tensor in found[name].held)
            assert layers.nbytes(name) < 4 * meant[name].numel() / 15
    assert is_smaller("lokr", 3072, 3072, 3072)
    assert not is_smaller("lokr", 3072, 3072, 128)  # of thin halves
    assert not is_smaller("lora", 64, 64, 64)
    moved = to_device(found.items(), "cpu")
    assert torch.equal(moved[CONV].whole(), found[CONV].whole())


@pytest.mark.parametrize("layout", [to_diffusers, to_kohya, to_peft])
@pytest.mark.parametrize("product", [lokr(64, 64, 20, 20), loha(1280, 1280, 36)])
def test_what_no_file_may_hold_as_factors_leaves_in_no_layout_and_is_never_formed(
    layout: Callable[..., object], product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert (product.shape, product.rank) == ((1280, 1280), 1280)
    with monkeypatch.context() as patched:
        patched.setattr(Product, "formed", None)
        with pytest.raises(InvalidRequest, match=f"as a LoRA '{name}' has rank 1280, .*1024; resize"):
            layout({name: product}, "sd1")
    layout({name: Factors(product.up[:, :1024], product.down[:1024])}, "sd1")


def test_the_scale_is_inside_a_product(tmp_path: Path) -> None:
    w1, a, b = numbers(8, 8), numbers(16, 20, seed=1), numbers(20, 16, seed=2)
    key = f"lora_unet_{ATTENTION.replace('.', '_')}"
    tensors = {
        f"{key}.lokr_w1": w1,
        f"{key}.lokr_w2_a": a,
        f"{key}.lokr_w2_b": b,
        f"{key}.alpha": torch.tensor(5.0),
    }
    save_file(tensors, tmp_path / "a")
    (found,) = opened(tmp_path / "a").values()
    assert isinstance(found, Product)
    assert_close(found.whole(), torch.kron(w1.double(), a.double() @ b.double()) * 5 / 20)


def live(warm: WarmPipeline, name: str) -> Tensor:
    weight = warm.pipeline.unet.get_submodule(name.removeprefix("unet.")).weight
    return weight.detach().flatten(1).clone()


def test_it_is_applied_with_others_and_taken_off_again(bare: WarmPipeline, tmp_path: Path) -> None:
    meant = written(tmp_path / "a")
    product, other = Kept(opened(tmp_path / "a")), Kept(random_factors("pocket", seed=1, rank=4))
    golden = {name: live(bare, name).double() for name in meant}
    bare.apply([(product, Weight(0.6)), (other, Weight(-0.4))])
    for name, delta in meant.items():
        total = golden[name] + 0.6 * delta.double()
        if name in other:
            total = total - 0.4 * other[name].whole().double()
        assert_close(live(bare, name), total)
    bare.apply([(product, Weight(1.0))])
    alone = {name: live(bare, name) for name in meant}
    bare.apply([(other, Weight(1.0))])
    bare.apply([(product, Weight(1.0))])
    assert all(torch.equal(live(bare, name), alone[name]) for name in meant)


def test_a_dora_of_a_product_is_normed_as_a_dora(bare: WarmPipeline, tmp_path: Path) -> None:
    magnitude = numbers(128, 1, seed=9).abs() + 0.5
    meant = written(tmp_path / "a", magnitude=magnitude)
    found = opened(tmp_path / "a")
    golden = live(bare, LINEAR)
    W = golden.double() + meant[LINEAR].double()
    normed = W / W.norm(dim=1, keepdim=True) * magnitude
    assert_close(decomposed(golden, found[LINEAR]), normed)
    bare.apply([(found, Weight(1.0))])
    assert_close(live(bare, LINEAR), normed)
    with pytest.raises(InvalidRequest, match="DoRA"):
        merge([Adapter(found)], method="svd", parameters=Parameters(rank=2))


def test_the_switchboard_leaves_it_to_the_other_way(warm: WarmPipeline, tmp_path: Path) -> None:
    written(tmp_path / "a")

    def writes_nothing(
        table: Tensor, owner: Tensor, dtype: torch.dtype, *, aligned: bool, even: bool
    ) -> None:
        raise AssertionError("nothing was to be launched")

    writes_nothing.tile = (64, 64)  # type: ignore[attr-defined]
    board = Switchboard("pocket", warm._arenas, writes_nothing)  # type: ignore[arg-type]
    assert board.bound([(Kept(opened(tmp_path / "a")), Weight(1.0))]) is None


@pytest.mark.parametrize("layer", [nn.Linear(12, 6), nn.Conv2d(4, 6, 3, stride=2, padding=1)])
def test_beside_a_layer_it_is_what_it_adds_to_the_weight(layer: nn.Linear | nn.Conv2d) -> None:
    conv = isinstance(layer, nn.Conv2d)
    product = lokr(2, 4, 3, 9 if conv else 3)
    plain = random_pair(6, 36 if conv else 12, 2)
    x = numbers(2, 4, 8, 8, seed=3) if conv else numbers(5, 12, seed=3)
    sidecar, bare = Sidecar(layer), layer(x)
    for parts in ([(product, 0.5)], [(plain, 2.0), (product, -1.5)]):
        sidecar.put(parts)
        update = sum((weight * factors.whole() for factors, weight in parts), torch.zeros(product.shape))
        beside = (
            nn.functional.linear(x, update)
            if not conv
            else nn.functional.conv2d(x, update.view(6, 4, 3, 3), None, layer.stride, layer.padding)
        )
        assert_close((layer(x) - bare).detach(), beside.detach(), 1e-5)
    sidecar.put(())
    assert torch.equal(layer(x), bare)


def test_it_is_recognised_by_its_weights(tmp_path: Path) -> None:
    written(tmp_path / "a")
    found = opened(tmp_path / "a")
    formed = {name: factors.formed() for name, factors in found.items()}
    one, other = (np.frombuffer(projection(layers), np.float32) for layers in (found, formed))
    assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()
    assert cosine(found, formed) == pytest.approx(1.0, abs=1e-6)
    doubled = {
        name: factors.made_of([factors.held[0] * 2, *factors.held[1:]]) for name, factors in found.items()
    }
    (conv,) = (change for change in differences(found, doubled) if change.layer == CONV)
    assert conv.change == pytest.approx(conv.before) == pytest.approx(conv.after / 2)
    (gone,) = differences({LINEAR: found[LINEAR]}, {})
    assert gone.change == pytest.approx(float(found[LINEAR].whole().norm()))
