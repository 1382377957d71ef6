"""FLUX.1 in the names of kohya, BFL, ai-toolkit, XLabs, OneTrainer and diffusers: one projection of a file is
the right rows of several layers. Against diffusers' converters where those are right, and by hand.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import save_file
from torch import Tensor

from compose import formats
from compose.errors import IncompatibleBase, UnsupportedLayout
from compose.factors import Factors
from tests.adapters import assert_same, assert_updates, peft_config, read, sketch

D = 3072
DOUBLE = {
    "img_attn.qkv": (3 * D, D),
    "img_attn.proj": (D, D),
    "img_mlp.0": (4 * D, D),
    "img_mlp.2": (D, 4 * D),
    "img_mod.lin": (6 * D, D),
    "txt_attn.qkv": (3 * D, D),
    "txt_attn.proj": (D, D),
    "txt_mlp.0": (4 * D, D),
    "txt_mlp.2": (D, 4 * D),
    "txt_mod.lin": (6 * D, D),
}
SINGLE = {"linear1": (7 * D, D), "linear2": (D, 5 * D), "modulation.lin": (3 * D, D)}
OUTER = {
    "img_in": (D, 64),
    "txt_in": (D, 4096),
    "time_in.in_layer": (D, 256),
    "time_in.out_layer": (D, D),
    "guidance_in.in_layer": (D, 256),
    "guidance_in.out_layer": (D, D),
    "vector_in.in_layer": (D, 768),
    "vector_in.out_layer": (D, D),
    "final_layer.linear": (64, D),
    "final_layer.adaLN_modulation.1": (2 * D, D),
}
BLOCKS = {f"double_blocks.{i}.{n}": s for i in (18,) for n, s in DOUBLE.items()} | {
    f"single_blocks.{i}.{n}": s for i in (0, 37) for n, s in SINGLE.items()
}
CLIP = "text_model.encoder.layers.11.self_attn.q_proj"


def pair(shape: tuple[int, int], seed: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    """(up, down)"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=g), torch.randn(rank, shape[1], generator=g)


def kohya(
    shapes: Mapping[str, tuple[int, int]], *, alpha: float | None, prefix: str = "lora_unet_"
) -> dict[str, Tensor]:
    """sd-scripts' flux_lora: flattened names; `prefix` with a dot keeps the dots."""
    tensors = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        up, down = pair(shape, seed)
        key = prefix + (path if prefix.endswith(".") else path.replace(".", "_"))
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def as_factors(converted: Mapping[str, Tensor]) -> dict[str, Factors]:
    """lora_A and lora_B of diffusers."""
    names = [key.removesuffix(".lora_A.weight") for key in converted if key.endswith(".lora_A.weight")]
    return {n: Factors(converted[f"{n}.lora_B.weight"], converted[f"{n}.lora_A.weight"]) for n in names}


@pytest.mark.parametrize("alpha", [1.0, 6.0, None])
def test_kohyas_blocks_are_what_diffusers_makes_of_them(tmp_path: Path, alpha: float | None) -> None:
    tensors = kohya(BLOCKS, alpha=alpha)
    save_file(tensors, tmp_path / "a")
    found = read(tmp_path / "a", "flux")
    assert formats.infer(sketch(tmp_path / "a")).family == "flux"
    assert_same(found, as_factors(theirs._convert_kohya_flux_lora_to_diffusers(dict(tensors))))


def test_the_outer_layers_have_their_alpha_and_the_last_modulation_is_turned_around(tmp_path: Path) -> None:
    """diffusers drops both alphas of final_layer, and writes the embedders where no model looks for them."""
    tensors = kohya(OUTER, alpha=1.0)
    save_file(tensors, tmp_path / "a")
    found = read(tmp_path / "a", "flux")
    meant = {path: Factors(0.5 * up, down) for path, (up, down) in outer_pairs().items()}
    assert len(found) == len(OUTER)
    assert_same({"t": found["transformer.x_embedder"]}, {"t": meant["img_in"]})
    assert_same({"t": found["transformer.proj_out"]}, {"t": meant["final_layer.linear"]})
    turned = turn(*outer_pairs()["final_layer.adaLN_modulation.1"])
    assert_same({"t": found["transformer.norm_out.linear"]}, {"t": Factors(0.5 * turned.up, turned.down)})
    text = "transformer.time_text_embed."
    for ours, path in (
        ("text_embedder.linear_1", "vector_in.in_layer"),
        ("timestep_embedder.linear_2", "time_in.out_layer"),
        ("guidance_embedder.linear_1", "guidance_in.in_layer"),
    ):
        assert_same({"t": found[text + ours]}, {"t": meant[path]})


def turn(up: Tensor, down: Tensor) -> Factors:
    """shift, scale -> scale, shift"""
    shift, scale = up.chunk(2)
    return Factors(torch.cat([scale, shift]), down)


def outer_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    return {path: pair(shape, seed) for seed, (path, shape) in enumerate(OUTER.items())}


def test_every_prefix_and_suffix_means_the_same(tmp_path: Path) -> None:
    names = ("double_blocks.18.txt_attn.qkv", "double_blocks.18.img_mlp.2", "single_blocks.0.linear1")
    few = {name: BLOCKS[name] for name in names}
    plain = kohya(few, alpha=None)
    save_file(plain, tmp_path / "kohya")
    meant = read(tmp_path / "kohya", "flux")
    for prefix in ("diffusion_model.", "model.diffusion_model.", "transformer."):
        dotted = kohya(few, alpha=None, prefix=prefix)
        save_file(dotted, tmp_path / "a")
        assert_same(read(tmp_path / "a", "flux"), meant)
        new = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in dotted.items()}
        save_file(new, tmp_path / "b")
        assert sketch(tmp_path / "b").layout == "diffusers"
        assert_same(read(tmp_path / "b", "flux"), meant)


@pytest.mark.parametrize(
    "spelled",
    [
        "lora_unet_single_transformer_blocks_3_proj_mlp_.lora_{down,up}.weight",
        "transformer.base_model.model.single_transformer_blocks.3.proj_mlp.lora_{A,B}.weight",
        "transformer.single_transformer_blocks.3.proj_mlp.lora_{A,B}.my-style.weight",
    ],
)
def test_names_with_more_in_them_than_their_module(tmp_path: Path, spelled: str) -> None:
    """Of early trainers (ComfyUI #4347), and of state dicts with the adapter's name in them."""
    up, down = pair((4 * D, D), 0)
    stem, rest = spelled.split("{")
    (one, other), end = rest.split("}")[0].split(","), rest.split("}")[1]
    save_file({stem + one + end: down, stem + other + end: up}, tmp_path / "a")
    name = "transformer.single_transformer_blocks.3.proj_mlp"
    assert_same(read(tmp_path / "a", "flux"), {name: Factors(up, down)})


def test_alphas_beside_lora_a_count(tmp_path: Path) -> None:
    key = "diffusion_model.double_blocks.3.img_attn.proj"
    up, down = pair((D, D), 0, rank=4)
    save_file(
        {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(1.0)},
        tmp_path / "a",
    )
    found = read(tmp_path / "a", "flux")
    assert_same(found, {"transformer.transformer_blocks.3.attn.to_out.0": Factors(up / 4, down)})


def test_the_split_projections_of_kohya_and_of_onetrainer(tmp_path: Path) -> None:
    """split_qkv trains three side by side and saves one block-diagonal up; OMI saves them one by one."""
    ups, downs = zip(*(pair((D, D), seed) for seed in range(3)), strict=True)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{key}.lora_up.weight": torch.block_diag(*ups), f"{key}.lora_down.weight": torch.cat(downs)},
        tmp_path / "kohya",
    )
    names = [f"transformer.transformer_blocks.0.attn.to_{p}" for p in "qkv"]
    meant = {n: Factors(up, down) for n, up, down in zip(names, ups, downs, strict=True)}
    assert_same(read(tmp_path / "kohya", "flux"), meant)
    omi = {
        f"transformer.double_blocks.0.img_attn.qkv.{i}.lora_{side}.weight": tensor
        for side, tensors in (("up", ups), ("down", downs))
        for i, tensor in enumerate(tensors)
    }
    save_file(omi, tmp_path / "omi")
    assert_same(read(tmp_path / "omi", "flux"), meant)


def test_onetrainers_diffusers_names_with_feed_forwards(tmp_path: Path) -> None:
    """diffusers' converter collapses all of a block but its attention into one key."""
    paths = {
        "transformer_blocks.0.attn.to_q": (D, D),
        "transformer_blocks.0.ff.net.0.proj": (4 * D, D),
        "transformer_blocks.0.norm1_context.linear": (6 * D, D),
        "single_transformer_blocks.37.proj_mlp": (4 * D, D),
        "single_transformer_blocks.37.proj_out": (D, 5 * D),
        "norm_out.linear": (2 * D, D),
    }
    save_file(kohya(paths, alpha=1.0, prefix="lora_transformer_"), tmp_path / "a")
    meant = {}
    for seed, (path, shape) in enumerate(paths.items()):
        up, down = pair(shape, seed)
        meant[f"transformer.{path}"] = Factors(up / 2, down)
    assert_same(read(tmp_path / "a", "flux"), meant)


def test_text_encoders_of_kohya_onetrainer_and_comfyui(tmp_path: Path) -> None:
    t5 = "encoder.block.23.layer.1.DenseReluDense.wi_0"
    (clip_up, clip_down), (t5_up, t5_down) = pair((768, 768), 0), pair((10240, 4096), 1)
    meant = {
        f"text_encoder.{CLIP}": Factors(clip_up, clip_down),
        f"text_encoder_2.{t5}": Factors(t5_up, t5_down),
    }
    flat_clip, flat_t5 = CLIP.replace(".", "_"), t5.replace(".", "_")
    for clip_key, t5_key in (
        (f"lora_te1_{flat_clip}", f"lora_te3_{flat_t5}"),
        (f"lora_te1_{flat_clip}", f"lora_te2_{flat_t5}"),
        (f"text_encoders.clip_l.transformer.{CLIP}", f"text_encoders.t5xxl.transformer.{t5}"),
        (f"clip_l.{CLIP}", f"t5.{t5}"),
        (f"text_encoder.{CLIP}", f"text_encoder_2.{t5}"),
    ):
        save_file(
            {
                f"{clip_key}.lora_up.weight": clip_up,
                f"{clip_key}.lora_down.weight": clip_down,
                f"{t5_key}.lora_up.weight": t5_up,
                f"{t5_key}.lora_down.weight": t5_down,
            },
            tmp_path / "a",
        )
        assert_same(read(tmp_path / "a", "flux"), meant)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_processors_are_what_diffusers_makes_of_them(tmp_path: Path, prefix: str) -> None:
    shapes = {
        f"double_blocks.{i}.processor.{kind}_lora{stream}": ((3 if kind == "qkv" else 1) * D, D)
        for i in (0, 18)
        for kind in ("qkv", "proj")
        for stream in (1, 2)
    } | {"single_blocks.5.processor.qkv_lora": (3 * D, D), "single_blocks.5.processor.proj_lora": (D, 5 * D)}
    tensors = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        up, down = pair(shape, seed)
        tensors |= {f"{prefix}{path}.up.weight": up, f"{prefix}{path}.down.weight": down}
    save_file(tensors, tmp_path / "a")
    assert sketch(tmp_path / "a").layout == "xlabs"
    found = read(tmp_path / "a", "flux")
    assert_same(found, as_factors(theirs._convert_xlabs_flux_lora_to_diffusers(dict(tensors))))
    assert formats.infer(sketch(tmp_path / "a")).family == "flux"


def test_fals_files_without_a_configuration_are_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    shapes = {f"double_blocks.{i}.{n}": s for i in range(19) for n, s in DOUBLE.items()}
    shapes |= {f"single_blocks.{i}.{n}": s for i in range(38) for n, s in SINGLE.items()}
    shapes["final_layer.linear"] = OUTER["final_layer.linear"]
    tensors = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        up, down = pair(shape, seed, rank=1)
        tensors |= {
            f"base_model.model.{path}.lora_B.weight": up,
            f"base_model.model.{path}.lora_A.weight": down,
        }
    save_file(tensors, tmp_path / "a")
    converted = theirs._convert_fal_kontext_lora_to_diffusers(dict(tensors))
    assert_same(read(tmp_path / "a", "flux"), as_factors(converted))
    config = peft_config(r=1, lora_alpha=3)
    key = "transformer.proj_out"
    assert_same(
        {key: read(tmp_path / "a", "flux", config)[key]},
        {key: Factors(3 * converted[f"{key}.lora_B.weight"], converted[f"{key}.lora_A.weight"])},
    )


def test_a_file_for_flux_2_is_for_no_base_we_know(tmp_path: Path) -> None:
    """Its layers have the same names and are wider."""
    up, down = pair((3 * 6144, 6144), 0)
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    told = {"modelspec.architecture": "flux-2-dev/lora"}
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / "a", metadata=told)
    binding = formats.infer(sketch(tmp_path / "a"))
    assert (binding.family, binding.bound, binding.unbound) == ("", {}, (key,))
    with pytest.raises(IncompatibleBase, match=r"a fits no base we know .*: 0 of its 1 layers fit flux"):
        formats.require(sketch(tmp_path / "a"), "flux", what="a")


def test_a_projection_of_more_rows_than_its_layers_have_is_named(tmp_path: Path) -> None:
    """XLabs' single qkv has no rows for the feed-forward; a file that has them means something else."""
    up, down = pair((7 * D, D), 0)
    key = "single_blocks.0.processor.qkv_lora"
    save_file({f"{key}.up.weight": up, f"{key}.down.weight": down}, tmp_path / "a")
    binding = formats.bind(sketch(tmp_path / "a"), "flux")
    assert (binding.bound, binding.unbound) == ({}, ("single_blocks.0.processor.qkv",))


def test_bfls_control_lora_is_read_and_its_norms_are_named(tmp_path: Path) -> None:
    """A control LoRA widens x_embedder and replaces norms, which is no low-rank update: told, not dropped."""
    shapes = {f"double_blocks.{i}.{n}": s for i in range(1) for n, s in DOUBLE.items()}
    shapes |= {f"single_blocks.{i}.{n}": s for i in range(1) for n, s in SINGLE.items()}
    shapes["img_in"] = (D, 128)
    tensors = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        up, down = pair(shape, seed)
        tensors |= {
            f"{path}.lora_B.weight": up,
            f"{path}.lora_A.weight": down,
            f"{path}.lora_B.bias": up[:, 0].clone(),
        }
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(128)
    save_file(tensors, tmp_path / "a")
    binding = formats.bind(sketch(tmp_path / "a"), "flux")
    strangers = {key for key in tensors if key.endswith((".bias", ".scale"))} | {"img_in"}
    assert set(binding.unbound) == strangers
    assert len(binding.bound) == 14 + 6


def test_the_last_modulation_of_a_control_lora_keeps_its_ranks_apart(tmp_path: Path) -> None:
    """diffusers swaps the halves of the down as well, so that every rank meets another's up."""
    up, down = pair((2 * D, D), 0, rank=4)
    key = "final_layer.adaLN_modulation.1"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / "a")
    assert_same(read(tmp_path / "a", "flux"), {"transformer.norm_out.linear": turn(up, down)})
    wrong = Factors(theirs.swap_scale_shift(up), theirs.swap_scale_shift(down))
    with pytest.raises(AssertionError):
        assert_same({"t": wrong}, {"t": turn(up, down)})


def test_a_layer_named_twice_is_refused_and_two_kinds_of_names_are_not(tmp_path: Path) -> None:
    qkv = kohya({"double_blocks.0.img_attn.qkv": (3 * D, D)}, alpha=None)
    up, down = pair((D, D), 9)

    def plain(path: str) -> dict[str, Tensor]:
        return {f"transformer.{path}.lora_B.weight": up, f"transformer.{path}.lora_A.weight": down}

    save_file({**qkv, **plain("transformer_blocks.0.attn.to_out.0")}, tmp_path / "a")
    assert len(read(tmp_path / "a", "flux")) == 4
    save_file({**qkv, **plain("transformer_blocks.0.attn.to_k")}, tmp_path / "b")
    for ask in (lambda s: formats.bind(s, "flux"), formats.infer):
        with pytest.raises(UnsupportedLayout, match="are the same layer of flux"):
            ask(sketch(tmp_path / "b"))


def test_a_file_of_another_base_does_not_fit_flux(tmp_path: Path) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down = pair((320, 768), 0)
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, tmp_path / "a")
    with pytest.raises(IncompatibleBase, match="a is for sd1, not for flux: 0 of its 1 layers fit flux"):
        formats.require(sketch(tmp_path / "a"), "flux", what="a")


def test_a_lokr_of_a_fused_projection_gives_each_layer_its_rows(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    w1, a, b = (
        torch.randn(8, 4, generator=g),
        torch.randn(3 * D // 8, 2, generator=g),
        torch.randn(2, D // 4, generator=g),
    )
    key = "lora_unet_double_blocks_0_txt_attn_qkv"
    save_file({f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}, tmp_path / "a")
    parts = torch.kron(w1.double(), a.double() @ b.double()).chunk(3)
    names = [f"transformer.transformer_blocks.0.attn.add_{p}_proj" for p in "qkv"]
    assert_updates(read(tmp_path / "a", "flux"), dict(zip(names, parts, strict=True)))
