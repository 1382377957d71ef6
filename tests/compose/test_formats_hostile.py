"""Headers that nobody meant: whatever a file says, it is read or refused, and every tensor has its place."""

import json
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compose import formats
from compose.errors import IncompatibleBase, UnsupportedLayout
from compose.factors import Factors
from compose.families import families
from compose.formats.forms import FORMS, form
from tests.adapters import Layers, assert_same, random_factors, read, sketch, write_kohya

MODULES = (
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.conv_in",
    "diffusion_model.double_blocks.0.img_attn.qkv",
    "double_blocks.0.processor.qkv_lora1",
    "base_model.model.conv_in",
    "unet:0",
    "bundle_emb.<w>",
    "x",
    "",
)
SUFFIXES = (
    ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha", ".dora_scale", ".lora_A.weight",
    ".lora_B.weight", ".lora_magnitude_vector", ".down.weight", ".up.weight", ".hada_w1_a", ".hada_w1_b",
    ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2", ".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2",
    ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2", ".diff", ".diff_b", ".oft_blocks", ":up", ":down", ".clip_l",
    ".string_to_param.*", "emb_params", "clip_g", "", ".weight",
)  # fmt: skip
SIDES = st.sampled_from((0, 1, 2, 4, 96, 128, 3072, 9216))
SHAPES = st.dictionaries(
    st.builds(str.__add__, st.sampled_from(MODULES), st.sampled_from(SUFFIXES)),
    st.lists(SIDES, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


@hypothesis.settings(max_examples=600, deadline=None)
@hypothesis.given(SHAPES, st.sampled_from(("", '{"r": 4, "lora_alpha": 8}')))
def test_any_header_is_read_whole_or_refused(shapes: dict[str, tuple[int, ...]], config: str) -> None:
    try:
        found = formats.recognise(shapes, {}, config)
    except UnsupportedLayout:
        return
    used = [key for entry in found.entries for key in entry.tensors.values()]
    used += [vectors.key for word in found.words for vectors in word.vectors.values()]
    assert sorted([*used, *found.leftovers]) == sorted(shapes)
    for family in families():
        binding = formats.binding._bind(found, family)
        assert all(entry.rank <= 1024 for entry in binding.bound.values())
        left = {entry.spelling for entry in found.entries} - {e.spelling for e in binding.bound.values()}
        assert left <= set(binding.unbound)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(*(st.integers(1, 5) for _ in range(6)), st.booleans(), st.booleans())
def test_any_lokr_and_loha_is_its_own_definition(
    a: int, b: int, c: int, e: int, r: int, q: int, first: bool, second: bool
) -> None:
    g = torch.Generator().manual_seed(a * 5 + b)
    A, B, C, D = (torch.randn(*shape, generator=g) for shape in ((a, r), (r, b), (c, q), (q, e)))
    left, right = A.double() @ B.double(), C.double() @ D.double()
    lokr = {"lokr_w1": left.float()} if first else {"lokr_w1_a": A, "lokr_w1_b": B}
    lokr |= {"lokr_w2": right.float()} if second else {"lokr_w2_a": C, "lokr_w2_b": D}
    check(lokr, torch.kron(left, right))
    E, F = torch.randn(a, q, generator=g), torch.randn(q, b, generator=g)
    hada = {"hada_w1_a": A, "hada_w1_b": B, "hada_w2_a": E, "hada_w2_b": F}
    check(hada, left * (E.double() @ F.double()))


def check(tensors: dict[str, torch.Tensor], dense: torch.Tensor) -> None:
    found = FORMS[form(tensors)]
    size = found.size({role: tuple(tensor.shape) for role, tensor in tensors.items()})
    up, down = found.rebuild(tensors)
    assert (up.shape, down.shape) == ((size.d, size.rank), (size.rank, size.k))
    assert size.rank <= min(size.d, size.k)
    assert float((up.double() @ down.double() - dense).norm()) <= 1e-5 * float(dense.norm()) + 1e-6


@pytest.fixture(scope="module")
def layers() -> Layers:
    return random_factors("pocket", seed=3, rank=4)


def test_a_negative_alpha_turns_an_adapter_around(tmp_path: Path, layers: Layers) -> None:
    write_kohya(tmp_path / "a", layers, alpha=lambda name: -2.0 if "attn1" in name else 4.0)
    told = load_file(tmp_path / "a")
    assert any(tensor < 0 for key, tensor in told.items() if key.endswith("alpha"))
    assert_same(read(tmp_path / "a"), layers)


def test_two_files_in_one_are_refused_where_they_meet_and_read_where_they_do_not(
    tmp_path: Path, layers: Layers
) -> None:
    half = len(layers) // 2
    one, two = dict(list(layers.items())[:half]), dict(list(layers.items())[half:])
    write_kohya(tmp_path / "one", one)
    as_peft = {
        f"{name}.lora_{side}.weight": tensor.contiguous()
        for name, f in two.items()
        for side, tensor in (("A", f.down), ("B", f.up))
    }
    save_file({**load_file(tmp_path / "one"), **as_peft}, tmp_path / "both")
    assert_same(read(tmp_path / "both"), layers)
    config = {f"{part}.{key}": 8 for part in ("unet", "text_encoder") for key in ("r", "lora_alpha")}
    told = {"lora_adapter_metadata": json.dumps(config)}  # of the PEFT half alone: rank 4, so twice as strong
    save_file({**load_file(tmp_path / "one"), **as_peft}, tmp_path / "told", metadata=told)
    assert_same(read(tmp_path / "told"), one | {n: Factors(f.up * 2, f.down) for n, f in two.items()})
    write_kohya(tmp_path / "all", layers)
    save_file({**load_file(tmp_path / "all"), **as_peft}, tmp_path / "twice")
    with pytest.raises(UnsupportedLayout, match="are the same layer of pocket: the file holds two adapters"):
        formats.infer(sketch(tmp_path / "twice"))


def test_a_file_for_another_base_is_told_with_what_it_is_for(tmp_path: Path) -> None:
    few = random_factors("sd1", seed=0, rank=1, where=lambda n: n.endswith("attn2.to_k"))
    write_kohya(tmp_path / "a", few, family="sd1")
    for family in ("flux", "sd3", "sd35-medium", "sd35-large", "sdxl"):
        with pytest.raises(IncompatibleBase, match=f"a is for sd1, not for {family}"):
            formats.require(sketch(tmp_path / "a"), family, what="a")
