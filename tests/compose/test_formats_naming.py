"""The first code's names, against diffusers' own converters of whole checkpoints: every layer there is."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from compose import formats
from compose.families import families, table
from compose.formats.export import to_diffusers
from compose.formats.naming import bfl, mmdit, sgm, spellings
from compose.formats.naming.parts import Part
from tests.adapters import assert_same, peft_config, random_factors, read, sketch, write_kohya

Paths = dict[str, tuple[Part, ...]]


def checkpoint(paths: Paths, family: str) -> dict[str, Tensor]:
    """A checkpoint under the first code's names, every row of every layer another number."""
    tensors, start = {}, 0
    for path, parts in paths.items():
        d = sum(table(family)[part.name].d for part in parts)
        tensors[f"{path}.weight"] = torch.arange(start, start + d, dtype=torch.float64)[:, None]
        tensors[f"{path}.bias"] = tensors[f"{path}.weight"][:, 0].clone()
        start += d
    return tensors


def rows(tensor: Tensor, part: Part) -> Tensor:
    return torch.cat([tensor[a:b] for a, b in part.rows]) if part.rows else tensor


def assert_renamed(
    paths: Paths, tensors: dict[str, Tensor], converted: dict[str, Tensor], prefix: str
) -> None:
    covered = set()
    for path, parts in paths.items():
        for part in parts:
            name = part.name.removeprefix(prefix)
            assert torch.equal(converted[f"{name}.weight"], rows(tensors[f"{path}.weight"], part)), path
            covered.add(part.name)
    assert {f"{name.removeprefix(prefix)}.weight" for name in covered} == set(converted)


@pytest.mark.parametrize("family", ["pocket", "sd1", "sd2", "sdxl"])
def test_sgms_names_are_those_of_the_checkpoints(family: str) -> None:
    unet = {name: module for name, module in table(family).items() if name.startswith("unet.")}
    paths = dict(sgm.paths(unet))
    tensors = checkpoint(paths, family)
    config = {"layers_per_block": 2, **families()[family].config("unet")}
    converted = single_file_utils.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}, config
    )
    weights = {key: tensor for key, tensor in converted.items() if key.endswith(".weight")}
    assert_renamed(paths, tensors, weights, "unet.")
    assert len(paths) == len(unet)


@pytest.mark.parametrize("family", ["sd3", "sd35-medium", "sd35-large"])
def test_mmdits_names_and_rows_are_those_of_the_checkpoints(family: str) -> None:
    transformer = {name: module for name, module in table(family).items() if name.startswith("transformer.")}
    paths = whole(mmdit.paths, transformer)
    tensors = checkpoint(paths, family)
    extra = {"pos_embed": torch.zeros(1)}
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers({**tensors, **extra})
    weights = {key: tensor for key, tensor in converted.items() if key.endswith(".weight")}
    assert_renamed(paths, tensors, weights, "transformer.")
    assert {part.name for parts in paths.values() for part in parts} == set(transformer)


def test_bfls_names_and_rows_are_those_of_the_checkpoints() -> None:
    transformer = {name: module for name, module in table("flux").items() if name.startswith("transformer.")}
    paths = whole(bfl.paths, transformer)
    tensors = checkpoint(paths, "flux")
    norms = {
        f"double_blocks.{i}.{stream}_attn.norm.{of}_norm.scale": torch.zeros(1)
        for i in range(19)
        for stream in ("img", "txt")
        for of in ("query", "key")
    } | {
        f"single_blocks.{i}.norm.{of}_norm.scale": torch.zeros(1)
        for i in range(38)
        for of in ("query", "key")
    }
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers({**tensors, **norms})
    normed = re.compile(r".*\.norm_(q|k|added_q|added_k)\.weight")
    weights = {k: t for k, t in converted.items() if k.endswith(".weight") and not normed.fullmatch(k)}
    assert_renamed(paths, tensors, weights, "transformer.")
    assert {part.name for parts in paths.values() for part in parts} == set(transformer)


def whole(paths: Callable[..., object], layers: dict[str, object]) -> Paths:
    """The checkpoint's own names: without XLabs' and without projections taken apart."""
    odd = ("_lora", ".qkv.0", ".qkv.1", ".qkv.2", "linear1.", "img_in.proj")
    found = {p: parts for p, parts in paths(layers) if not any(o in p for o in odd)}
    return {
        p: t
        for p, t in found.items()
        if not (p.startswith("single_blocks") and p.endswith((".qkv", ".proj")))
    }


def test_kohyas_sdxl_names_are_what_diffusers_makes_of_them() -> None:
    """Of all attention layers, in sgm's names, through both of diffusers' converters."""

    class Config:
        layers_per_block = 2

    names = {
        spelled: parts[0].name
        for spelled, parts in spellings("sdxl").items()
        if spelled.startswith(("lora_unet_input", "lora_unet_middle", "lora_unet_output"))
        and ".attn" in parts[0].name
    }
    assert len(names) == sum(".attn" in name for name in table("sdxl") if name.startswith("unet."))
    tensors = {
        f"{n}.lora_{side}.weight": torch.tensor([float(i)])
        for i, n in enumerate(names)
        for side in ("up", "down")
    }
    mapped = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(dict(tensors), Config())
    converted, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(mapped)
    for i, name in enumerate(names.values()):
        old = f"{name.removesuffix('.0')}_lora".replace(".attn1.", ".attn1.processor.").replace(
            ".attn2.", ".attn2.processor."
        )
        assert converted[f"{old}.up.weight"].item() == i


def test_names_of_both_kinds_in_one_file_are_both_read(tmp_path: Path) -> None:
    """diffusers drops sgm's names where there are others."""
    few = ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.conv_in")
    layers = random_factors("sdxl", seed=0, rank=2, where=lambda name: name in few)
    write_kohya(tmp_path / "a", layers, family="sdxl")
    told = load_file(tmp_path / "a")
    mixed = {key.replace("mid_block_attentions_0", "middle_block_1"): told[key] for key in told}
    save_file(mixed, tmp_path / "b")
    assert any("middle_block_1" in key for key in mixed)
    assert any("conv_in" in key for key in mixed)
    assert_same(read(tmp_path / "b", "sdxl"), layers)


@pytest.mark.parametrize(
    ("key", "family", "name"),
    [
        ("lora_te2_text_projection", "sdxl", "text_encoder_2.text_projection"),
        (
            "lora_te1_text_model_encoder_layers_11_mlp_fc2",
            "sdxl",
            "text_encoder.text_model.encoder.layers.11.mlp.fc2",
        ),
        ("lora_unet_label_emb_0_2", "sdxl", "unet.add_embedding.linear_2"),
        ("lora_unet_output_blocks_2_2_conv", "sdxl", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_2_1_conv", "sd1", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_out_2", "sdxl", "unet.conv_out"),
        (
            "clip_g.text_model.encoder.layers.31.mlp.fc1",
            "sdxl",
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
        ),
        (
            "unet.input_blocks.4.1.transformer_blocks.1.attn2.to_out.0",
            "sdxl",
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
        ),
        (
            "diffusion_model.joint_blocks.37.x_block.mlp.fc2",
            "sd35-large",
            "transformer.transformer_blocks.37.ff.net.2",
        ),
        (
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "sd3",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        ),
        (
            "lora_unet_joint_blocks_12_x_block_attn2_proj",
            "sd35-medium",
            "transformer.transformer_blocks.12.attn2.to_out.0",
        ),
        (
            "clip_l.text_model.encoder.layers.22.mlp.fc1",
            "sd2",
            "text_encoder.text_model.encoder.layers.22.mlp.fc1",
        ),
        ("lycoris_transformer_blocks_0_attn_to_q", "sd3", "transformer.transformer_blocks.0.attn.to_q"),
    ],
)
def test_a_name_of_the_wild(key: str, family: str, name: str) -> None:
    assert [part.name for part in spellings(family)[key]] == [name]


@pytest.mark.parametrize(
    ("plain", "wrapped"),
    [
        (r"^unet\.", "unet._orig_mod."),  # torch.compile
        (r"^unet\.", "module.unet._orig_mod.module."),  # DDP around it
        (r"(?<=transformer_blocks\.0)\.", "._checkpoint_wrapped_module."),
        (r"^unet\.", "base_model.model._orig_mod."),
    ],
)
def test_what_a_model_is_wrapped_in_is_no_part_of_a_name(tmp_path: Path, plain: str, wrapped: str) -> None:
    layers = random_factors("pocket", seed=1, rank=2, where=lambda name: ".attn2." in name)
    (tmp_path / "a").write_bytes(to_diffusers(layers, "pocket"))
    named = {re.sub(plain, wrapped, key): tensor for key, tensor in load_file(tmp_path / "a").items()}
    save_file(named, tmp_path / "b")
    assert all("_orig_mod" in key or "_wrapped_module" in key for key in named)
    config = peft_config(lora_alpha=2) if wrapped.startswith("base_model") else ""
    assert_same(read(tmp_path / "b", config=config), layers)


def test_kohyas_names_of_a_compiled_model(tmp_path: Path) -> None:
    layers = random_factors("pocket", seed=1, rank=2, where=lambda name: ".attn2." in name)
    write_kohya(tmp_path / "a", layers)
    named = {
        key.replace("unet_", "unet__orig_mod_"): tensor for key, tensor in load_file(tmp_path / "a").items()
    }
    save_file(named, tmp_path / "b")
    assert_same(read(tmp_path / "b"), layers)


def test_a_text_encoder_alone_is_of_a_base_with_one_where_kohya_says_so(tmp_path: Path) -> None:
    layers = random_factors("sd1", seed=0, rank=1, where=lambda name: name.endswith("layers.0.mlp.fc1"))
    write_kohya(tmp_path / "a", layers, family="sd1")
    assert formats.infer(sketch(tmp_path / "a")).family == "sd1"
    several = {
        key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in load_file(tmp_path / "a").items()
    }
    save_file(several, tmp_path / "b")
    assert formats.infer(sketch(tmp_path / "b")).family == ""
    assert_same(read(tmp_path / "b", "sdxl"), layers)


@pytest.mark.parametrize(("family", "width"), [("sd3", 1536), ("sd35-large", 2432)])
def test_kohyas_sd3_names_bind_by_their_width(tmp_path: Path, family: str, width: int) -> None:
    """diffusers loads nothing of such a file (#9950)."""
    last = {"sd3": 23, "sd35-large": 37}[family]
    sizes = {
        "x_block_attn_qkv": 3,
        "context_block_attn_qkv": 3,
        "x_block_mlp_fc1": 4,
        "context_block_adaLN_modulation_1": 2,
    }
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for part, times in sizes.items():
        key = f"lora_unet_joint_blocks_{last}_{part}"
        tensors[f"{key}.lora_up.weight"] = torch.randn(times * width, 4, generator=g)
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=g)
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a")
    binding = formats.infer(sketch(tmp_path / "a"))
    assert (binding.family, len(binding.bound), binding.unbound) == (family, 8, ())
    found = read(tmp_path / "a", family)
    block = f"transformer.transformer_blocks.{last}"
    up = tensors[f"lora_unet_joint_blocks_{last}_context_block_attn_qkv.lora_up.weight"]
    assert torch.equal(found[f"{block}.attn.add_v_proj"].up, up[2 * width :] * 0.5)
    up = tensors[f"lora_unet_joint_blocks_{last}_context_block_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(found[f"{block}.norm1_context.linear"].up, torch.cat([up[width:], up[:width]]) * 0.5)


def test_sd35_medium_is_told_by_its_second_attention_or_by_metadata(tmp_path: Path) -> None:
    """Elsewhere it has SD3-medium's layers."""
    attention = re.compile(r"transformer\.transformer_blocks\.\d+\.attn2?\.to_[qkv]")

    def inferred(family: str, *, second: bool, **metadata: str) -> str:
        layers = random_factors(
            family, seed=0, rank=1, where=lambda n: bool(attention.fullmatch(n)) and (second or ".attn." in n)
        )
        (tmp_path / "a").write_bytes(to_diffusers(layers, family))
        if metadata:
            save_file(load_file(tmp_path / "a"), tmp_path / "a", metadata=metadata)
        assert_same(read(tmp_path / "a", family), layers)
        return formats.infer(sketch(tmp_path / "a")).family

    assert inferred("sd35-medium", second=True) == "sd35-medium"
    assert inferred("sd35-medium", second=False) == inferred("sd3", second=False) == ""
    medium = {"modelspec.architecture": "stable-diffusion-3.5-medium/lora"}
    assert inferred("sd35-medium", second=False, **medium) == "sd35-medium"
    assert (
        inferred("sd3", second=False, **{"modelspec.architecture": "stable-diffusion-3-medium/lora"}) == "sd3"
    )


def test_every_family_has_the_layers_that_are_published() -> None:
    """Numbers of Linear and Conv2d layers, from the models' own configurations."""
    assert {name: len(table(name)) for name in families()} == {
        "pocket": 131, "sd1": 354, "sd2": 420, "sdxl": 1059, "sd3": 775,
        "sd35-medium": 827, "sd35-large": 971, "flux": 744,
    }  # fmt: skip
    assert table("flux")["transformer.single_transformer_blocks.37.proj_out"].k == 15360
    assert table("sd35-large")["transformer.transformer_blocks.37.attn.to_q"].d == 2432
    dual = {n for n in table("sd35-medium") if ".attn2." in n}
    assert table("sd35-medium").keys() - table("sd3").keys() == dual
    assert {n.split(".")[2] for n in dual} == set(map(str, range(13)))
    assert table("sd35-medium")["transformer.transformer_blocks.12.norm1.linear"].d == 9 * 1536
    assert not any(module.kernel for module in table("flux").values())
