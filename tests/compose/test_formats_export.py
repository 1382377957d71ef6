"""What goes out comes back the same, and does the same in diffusers and PEFT."""

from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from compose import pocket
from compose.errors import InvalidRequest
from compose.factors import Factors
from compose.families import table
from compose.formats.export import to_diffusers, to_kohya, to_peft
from compose.formats.naming import kohya
from tests.adapters import Layers, assert_same, delta, random_factors, read, sketch

FLUX, JOINT = "transformer.single_transformer_blocks.0.", "transformer.transformer_blocks."
TEXT, TEXT_2 = (f"text_encoder{i}.text_model.encoder.layers." for i in ("", "_2"))
SOME: dict[str, tuple[str, ...]] = {
    "pocket": (
        "unet.conv_in",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        f"{TEXT}1.mlp.fc2",
    ),
    "sd1": (
        "unet.down_blocks.0.downsamplers.0.conv",
        "unet.up_blocks.3.resnets.2.conv_shortcut",
        f"{TEXT}11.self_attn.q_proj",
    ),
    "sd2": ("unet.mid_block.attentions.0.proj_in", f"{TEXT}22.self_attn.q_proj"),
    "sdxl": (
        "unet.conv_out",
        "unet.add_embedding.linear_1",
        "unet.up_blocks.0.upsamplers.0.conv",
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        f"{TEXT}0.mlp.fc1",
        "text_encoder_2.text_projection",
        f"{TEXT_2}31.self_attn.v_proj",
    ),
    "sd3": (
        "transformer.pos_embed.proj",
        f"{JOINT}0.attn.to_q",
        f"{JOINT}0.attn.to_v",
        f"{JOINT}23.norm1_context.linear",
        "transformer.norm_out.linear",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.o",
    ),
    "sd35-medium": (f"{JOINT}12.attn2.to_k", f"{JOINT}12.attn2.to_out.0", f"{JOINT}0.norm1.linear"),
    "sd35-large": (f"{JOINT}37.attn.add_k_proj", "transformer.proj_out"),
    "flux": (
        "transformer.proj_out",
        "transformer.norm_out.linear",
        f"{FLUX}proj_out",
        f"{FLUX}proj_mlp",
        f"{FLUX}attn.to_k",
        f"{JOINT}18.attn.add_q_proj",
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo",
    ),
}


def some(family: str) -> Layers:
    """A layer of each kind, every one with another rank."""
    layers: Layers = {}
    for rank, name in enumerate(SOME[family], start=2):
        layers |= random_factors(family, seed=rank, rank=rank, where=name.__eq__)
    assert layers.keys() == set(SOME[family])
    return layers


def without_zeros(layers: Layers) -> Layers:
    """A fused projection has rows for all its layers; those that were not there are zero."""
    return {name: f for name, f in layers.items() if bool(f.up.any())}


@pytest.mark.parametrize("family", SOME)
def test_every_layout_comes_back_exactly(tmp_path: Path, family: str) -> None:
    layers = some(family)
    (tmp_path / "diffusers").write_bytes(to_diffusers(layers, family))
    found = read(tmp_path / "diffusers", family)
    assert found.keys() == layers.keys()
    for name, factors in layers.items():
        assert torch.equal(found[name].up, factors.up)
        assert torch.equal(found[name].down, factors.down)
    (tmp_path / "kohya").write_bytes(to_kohya(layers, family))
    assert sketch(tmp_path / "kohya").layout == "kohya"
    assert_same(without_zeros(read(tmp_path / "kohya", family)), layers)
    together: Layers = {}
    for component, directory in to_peft(layers, family).items():
        (tmp_path / component).write_bytes(directory.weights)
        part = read(tmp_path / component, family, config=directory.config)
        assert {name.split(".")[0] for name in part} == {component}
        together |= part
    for name, factors in layers.items():
        assert torch.equal(together[name].up, factors.up)
        assert torch.equal(together[name].down, factors.down)


def test_a_fused_projection_that_came_fused_goes_out_with_its_rank(tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    told = {
        f"{key}.lora_up.weight": torch.randn(9216, 4),
        f"{key}.lora_down.weight": torch.randn(4, 3072),
        f"{key}.alpha": torch.tensor(4.0),
    }
    save_file(told, tmp_path / "a")
    (tmp_path / "b").write_bytes(to_kohya(read(tmp_path / "a", "flux"), "flux"))
    again = load_file(tmp_path / "b")
    assert again.keys() == told.keys()
    assert all(torch.equal(again[k], told[k]) for k in told)


def test_equal_factors_give_equal_bytes() -> None:
    layers = some("pocket")
    turned = dict(reversed(layers.items()))
    assert to_kohya(layers, "pocket") == to_kohya(turned, "pocket")
    assert to_peft(layers, "pocket") == to_peft(turned, "pocket")


def test_kohyas_sdxl_names_are_sgms(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(to_kohya(some("sdxl"), "sdxl"))
    stems = {key.split(".")[0] for key in load_file(tmp_path / "a")}
    assert stems == {
        "lora_unet_out_2",
        "lora_unet_label_emb_0_0",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_projection",
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj",
    }


def test_a_dora_goes_out_with_its_magnitude(tmp_path: Path) -> None:
    layers = {
        name: Factors(f.up, f.down, torch.rand(len(f.up), 1) + 1)
        for name, f in random_factors(
            "pocket", seed=1, rank=2, where=lambda n: n in SOME["pocket"][:2]
        ).items()
    }
    (tmp_path / "diffusers").write_bytes(to_diffusers(layers, "pocket"))
    (tmp_path / "kohya").write_bytes(to_kohya(layers, "pocket"))
    directory = to_peft(layers, "pocket")["unet"]
    (tmp_path / "peft").write_bytes(directory.weights)
    for found in (
        read(tmp_path / "diffusers"),
        read(tmp_path / "kohya"),
        read(tmp_path / "peft", config=directory.config),
    ):
        assert_same(found, layers)
        for name, factors in layers.items():
            assert torch.equal(found[name].magnitude, factors.magnitude)
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None).to(torch.float32)
    pipeline.load_lora_weights(load_file(tmp_path / "diffusers"))
    magnitudes = [
        m.lora_magnitude_vector for m in pipeline.unet.modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    ]
    assert len(magnitudes) == 2
    assert all(len(m) == 1 for m in magnitudes)
    columns = {n: Factors(f.up, f.down, torch.ones(1, f.down.shape[1])) for n, f in layers.items()}
    for write in (to_diffusers, to_peft):
        with pytest.raises(InvalidRequest, match="DoRA layer over columns"):
            write(columns, "pocket")


def test_what_kohya_cannot_say_is_refused() -> None:
    q, k = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k"
    wide = {
        name: Factors(torch.ones(3072, 600), torch.full((600, 3072), float(i)))
        for i, name in enumerate((q, k))
    }
    with pytest.raises(InvalidRequest, match="would have the rank 1200, the limit is 1024"):
        to_kohya(wide, "flux")
    with pytest.raises(InvalidRequest, match="kohya has no name for unet"):
        to_kohya({"unet.nowhere": wide[q]}, "flux")


def clip(kind: type, width: int) -> nn.Module:
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            vocab_size=64,
        )
    )


def others() -> dict[str, object]:
    """What a pipeline has besides layers that adapters change."""
    text = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=32)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        "t5": T5EncoderModel(text),
    }


def sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    rest = others()
    rest.pop("t5")
    text, text_2 = clip(CLIPTextModel, 16), clip(CLIPTextModelWithProjection, 32)
    return StableDiffusionXLPipeline(
        unet=unet, text_encoder=text, text_encoder_2=text_2, tokenizer=None, tokenizer_2=None, **rest
    )


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    rest = others()
    t5, text = rest.pop("t5"), clip(CLIPTextModel, 16)
    return FluxPipeline(
        transformer=transformer,
        text_encoder=text,
        text_encoder_2=t5,
        tokenizer=None,
        tokenizer_2=None,
        **rest,
    )


def sd3(**more: object) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        **more,
    )
    rest = others()
    t5 = rest.pop("t5")
    texts = {f"text_encoder{i}": clip(CLIPTextModelWithProjection, 16) for i in ("", "_2")}
    none = {f"tokenizer{i}": None for i in ("", "_2", "_3")}
    return StableDiffusion3Pipeline(transformer=transformer, text_encoder_3=t5, **texts, **none, **rest)


def sd35_medium() -> StableDiffusion3Pipeline:
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def modules(pipeline: object, family: str) -> Iterator[tuple[str, nn.Module]]:
    """(canonical name, layer) of a tiny pipeline, whose names are the family's; diffusers loads no T5."""
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        if isinstance(getattr(pipeline, component, None), T5EncoderModel):
            continue
        for path, module in getattr(pipeline, component, nn.Module()).named_modules():
            for spelled in (f"{component}.{path}", f"{component}.text_model.{path}"):
                if spelled in table(family):
                    yield spelled, module


@pytest.mark.parametrize(
    ("build", "family"), [(sdxl, "sdxl"), (flux, "flux"), (sd3, "sd3"), (sd35_medium, "sd35-medium")]
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*CLIP.*")
def test_diffusers_loads_every_layer_with_the_same_effect(
    tmp_path: Path, build: Callable[[], object], family: str
) -> None:
    pipeline = build()
    layers = {n: m for n, m in modules(pipeline, family) if isinstance(m, nn.Linear | nn.Conv2d)}
    assert len(layers) > 40
    g = torch.Generator().manual_seed(0)
    mine: Layers = {}
    for index, (name, module) in enumerate(layers.items()):
        rank, d, k = 1 + index % 3, len(module.weight), module.weight[0].numel()
        mine[name] = Factors(torch.randn(d, rank, generator=g), torch.randn(rank, k, generator=g))
    (tmp_path / "a.safetensors").write_bytes(to_diffusers(mine, family))
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    found = {n: m for n, m in modules(pipeline, family) if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert found.keys() == mine.keys()
    for name, module in found.items():
        update = module.get_delta_weight(next(iter(module.lora_A))).detach().double().flatten(1)
        meant = mine[name].up.double() @ mine[name].down.double()
        assert float((update - meant).norm() / meant.norm()) < 1e-6, name


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*CLIP.*")
def test_a_layer_whose_name_ends_others_is_the_only_one_that_changes(tmp_path: Path) -> None:
    """PEFT takes FLUX's `proj_out` for that of every single block too."""
    pipeline = flux()
    module = pipeline.transformer.proj_out
    mine = {
        "transformer.proj_out": Factors(
            torch.randn(len(module.weight), 2), torch.randn(2, module.in_features)
        )
    }
    (tmp_path / "a.safetensors").write_bytes(to_diffusers(mine, "flux"))
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    changed = [n for n, m in modules(pipeline, "flux") if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert changed == list(mine)


@pytest.mark.parametrize(("build", "family"), [(sdxl, "sdxl"), (flux, "flux")])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*CLIP.*")
def test_diffusers_loads_kohyas_layout_with_the_same_effect(
    tmp_path: Path, build: Callable[[], object], family: str
) -> None:
    """Of the blocks: it loses what is around them in FLUX. Of one rank: it mixes up several."""
    pipeline = build()
    layers = {n: m for n, m in modules(pipeline, family) if isinstance(m, nn.Linear | nn.Conv2d)}
    inner = {n: m for n, m in layers.items() if "blocks." in n or "text_encoder." in n}
    g = torch.Generator().manual_seed(0)
    mine = {
        n: Factors(
            torch.randn(len(m.weight), 2, generator=g), torch.randn(2, m.weight[0].numel(), generator=g)
        )
        for n, m in inner.items()
    }
    if family == "flux":  # kohya's rows are those of the real model
        fused = {part.name for parts in kohya("flux").values() for part in parts if part.rows}
        mine = {name: factors for name, factors in mine.items() if name not in fused}
    (tmp_path / "a.safetensors").write_bytes(to_kohya(mine, family))
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    found = {n: m for n, m in modules(pipeline, family) if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert found.keys() == mine.keys()
    for name, module in found.items():
        update = module.get_delta_weight(next(iter(module.lora_A))).detach().double().flatten(1)
        meant = mine[name].up.double() @ mine[name].down.double()
        assert float((update - meant).norm() / meant.norm()) < 1e-6, name


def test_peft_loads_each_directory_with_the_same_effect(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None).to(torch.float32)
    layers = some("pocket") | random_factors("pocket", seed=1, rank=3, where=lambda n: ".attn2." in n)
    found = 0
    for component, directory in to_peft(layers, "pocket").items():
        folder = tmp_path / component
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(directory.weights)
        (folder / "adapter_config.json").write_text(directory.config)
        wrapped = peft.PeftModel.from_pretrained(getattr(pipeline, component), folder)
        for path, module in wrapped.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                inner = "text_model." if component == "text_encoder" else ""
                factors = layers[f"{component}.{inner}{path}"]
                update = module.get_delta_weight("default").double().flatten(1)
                assert float((update - delta(factors)).norm() / delta(factors).norm()) < 1e-6
                found += 1
    assert found == len(layers)
