"""Every layout gives the factors it means, the scale inside, and every tensor is accounted for."""

import json
import os
import re
from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import nn

from compose import formats, pocket
from compose.errors import IncompatibleBase, InvalidRequest, NonFinite, UnsupportedLayout
from compose.factors import Factors
from compose.families import families, table
from compose.formats.export import to_diffusers
from compose.formats.naming import spellings
from tests.adapters import (
    Layers,
    assert_same,
    delta,
    peft_config,
    random_factors,
    read,
    sketch,
    write_kohya,
    write_lora_diffusion,
    write_old_diffusers,
)

NUMBERED = re.compile(r"(unet|text_encoder):\d+")


def plain_pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None).to(torch.float32)


@pytest.fixture(scope="module")
def layers() -> Layers:
    return random_factors("pocket", seed=3, rank=4)


def test_kohya_with_mixed_alphas_is_scaled_layer_by_layer(tmp_path: Path, layers: Layers) -> None:
    write_kohya(tmp_path / "a", layers, alpha=lambda name: 2.0 if "attn1" in name else 7.0)
    assert sketch(tmp_path / "a").layout == "kohya"
    assert_same(read(tmp_path / "a"), layers)


def test_kohya_without_alpha_and_with_alpha_zero_mean_the_rank(tmp_path: Path, layers: Layers) -> None:
    write_kohya(tmp_path / "none", layers)
    assert_same(read(tmp_path / "none"), layers)
    tensors = load_file(tmp_path / "none")
    zeros = {
        f"{k.removesuffix('.lora_up.weight')}.alpha": torch.tensor(0.0) for k in tensors if "lora_up" in k
    }
    save_file({**tensors, **zeros}, tmp_path / "zero")
    assert_same(read(tmp_path / "zero"), layers)


def test_convolutions_are_flattened_and_get_their_kernel_back(tmp_path: Path) -> None:
    convolutions = random_factors(
        "pocket", seed=1, rank=3, where=lambda name: bool(table("pocket")[name].kernel)
    )
    assert any(table("pocket")[name].kernel == (3, 3) for name in convolutions)
    write_kohya(tmp_path / "a", convolutions)
    assert_same(read(tmp_path / "a"), convolutions)
    (tmp_path / "b").write_bytes(to_diffusers(convolutions, "pocket"))
    assert_same(read(tmp_path / "b"), convolutions)


def test_old_diffusers_names(tmp_path: Path, layers: Layers) -> None:
    write_old_diffusers(tmp_path / "a", layers)
    assert sketch(tmp_path / "a").layout == "diffusers-old"
    assert_same(read(tmp_path / "a"), layers)


def test_lora_diffusion_counts_its_layers(tmp_path: Path, layers: Layers) -> None:
    named = {n: part.name for n, (part, *_) in spellings("pocket").items() if NUMBERED.match(n)}
    order = {n: name for n, name in named.items() if name in layers}
    write_lora_diffusion(tmp_path / "a", layers, order)
    assert sketch(tmp_path / "a").layout == "lora_diffusion"
    assert_same(read(tmp_path / "a"), layers)


def test_text_encoders_of_old_diffusers_have_a_unets_names(tmp_path: Path, layers: Layers) -> None:
    """As diffusers reads them."""
    text = {name: f for name, f in layers.items() if name.startswith("text_encoder.")}
    write_old_diffusers(tmp_path / "a", text)
    named = load_file(tmp_path / "a")
    old = {re.sub(r"(q|k|v|out)_proj.lora_linear_layer", r"to_\1_lora", key): named[key] for key in named}
    assert all("self_attn.to_" in key for key in old)
    save_file(old, tmp_path / "b")
    theirs = convert_state_dict_to_peft(load_file(tmp_path / "b"))
    assert {key.rsplit(".lora_", 1)[0] for key in theirs} == text.keys()
    assert_same(read(tmp_path / "b"), text)


@pytest.mark.parametrize("family", ["pocket", "sd1", "sd2"])
def test_lora_diffusion_counts_resnets_where_they_were_trained(tmp_path: Path, family: str) -> None:
    """The order is that of a walk through the model, but for the feed forward, which has moved since."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(families()[family].config("unet"))
    targets = [
        n for n, m in unet.named_modules() if type(m).__name__ in {"Attention", "GEGLU", "ResnetBlock2D"}
    ]
    targets.sort(key=lambda n: n.startswith("mid_block"))  # registered last
    walked = [
        f"unet.{target}.{inner}"
        for target in targets
        for inner, module in unet.get_submodule(target).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    shift = {".attn1.": 0, ".ff.": 1, ".attn2.": 2}
    blocks = {
        name: i for i, name in reversed(list(enumerate(n.rsplit(".transformer_blocks.")[0] for n in walked)))
    }
    walked.sort(
        key=lambda n: (blocks[n.rsplit(".transformer_blocks.")[0]], *(v for k, v in shift.items() if k in n))
    )
    layers = random_factors(family, seed=0, rank=1, where=lambda n: n in set(walked))
    tensors = {}
    for i, name in enumerate(walked):
        kernel = table(family)[name].kernel
        up, down = layers[name].up, layers[name].down
        tensors[f"unet:{i}:up"] = up[:, :, None, None] if kernel else up
        tensors[f"unet:{i}:down"] = down.reshape(1, -1, *kernel) if kernel else down
    save_file(tensors, tmp_path / "a", metadata={"unet": '["ResnetBlock2D", "CrossAttention", "GEGLU"]'})
    assert_same(read(tmp_path / "a", family), layers)


def test_what_diffusers_saves_itself_with_alpha_in_its_metadata(tmp_path: Path) -> None:
    pipeline = plain_pipeline()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    found = read(tmp_path / "pytorch_lora_weights.safetensors")
    modules = {n: m for n, m in pipeline.unet.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(modules) == len(found) > 0
    for name, module in modules.items():
        meant = module.get_delta_weight("default").double()
        torch.testing.assert_close(delta(found[f"unet.{name}"]), meant, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_directory_with_patterns(tmp_path: Path, rslora: bool) -> None:
    model = plain_pipeline().unet
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k"],
        rank_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 6},
        alpha_pattern={
            r"down_blocks\.[12]\..*attn1\.to_(q|k)": 2,
            "attn2.to_k": 3,
            "^mid_block.attentions.0.transformer_blocks.0.attn2.to_q": 5,
        },
        use_rslora=rslora,
        init_lora_weights=False,
    )
    wrapped = peft.PeftModel(model, config)
    wrapped.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    found = read(tmp_path / "adapter_model.safetensors", config=text)
    modules = {n: m for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(modules) == len(found) > 0
    for name, module in modules.items():
        meant = module.get_delta_weight("default").double()
        canonical = name.replace("base_model.model.", "unet.")
        torch.testing.assert_close(delta(found[canonical]), meant, rtol=1e-5, atol=1e-7)


def test_a_pattern_without_end_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compose.formats.peft._PATTERN_SECONDS", 0.2)
    name = f"base_model.model.{'a' * 200}"
    shapes = {f"{name}.lora_A.weight": (4, 8), f"{name}.lora_B.weight": (8, 4)}
    with pytest.raises(UnsupportedLayout, match=r"alpha_pattern '\(a\|aa\)\+\[b-c\]' is too intricate"):
        formats.recognise(shapes, {}, peft_config(alpha_pattern={"(a|aa)+[b-c]": 2}))
    monkeypatch.setattr("compose.formats.peft._PATTERN_SECONDS", 0)
    several = {f"base_model.model.{i}.lora_{s}.weight": (4, 4) for i in range(2) for s in "AB"}
    with pytest.raises(UnsupportedLayout, match="the 1 entries of alpha_pattern take too long"):
        formats.recognise(several, {}, peft_config(alpha_pattern={"q": 2}))


def test_a_layer_of_more_than_lora_is_refused() -> None:
    """LoRA-XS has a matrix between the two, which would be left out."""
    more = {"base_model.model.x.default_lora_latent_mapping.weight": (4, 4)}
    with pytest.raises(UnsupportedLayout, match=r"latent_mapping\.weight' is a part of its layer's update"):
        formats.recognise({**PEFT_PAIR, **more}, {}, peft_config())
    bias = {"base_model.model.x.lora_B.bias": (8,)}  # its own part of the output, and named
    assert formats.recognise({**PEFT_PAIR, **bias}, {}, peft_config()).leftovers == tuple(bias)


def test_what_a_configuration_leaves_out_is_pefts_default() -> None:
    (entry,) = formats.recognise(PEFT_PAIR, {}, '{"r": 4}').entries
    assert entry.scale == peft.LoraConfig(r=4).lora_alpha / 4 == 2
    kron = {"base_model.model.x.lokr_w1": (2, 2), "base_model.model.x.lokr_w2": (4, 4)}
    (entry,) = formats.recognise(kron, {}, '{"peft_type": "LOKR"}').entries
    assert entry.scale == peft.LoKrConfig().alpha / peft.LoKrConfig().r


def test_what_we_export_does_the_same_in_diffusers(tmp_path: Path, layers: Layers) -> None:
    layers = {
        **layers,
        "unet.conv_in": random_factors("pocket", seed=1, rank=2, where="unet.conv_in".__eq__)["unet.conv_in"],
    }
    (tmp_path / "a.safetensors").write_bytes(to_diffusers(layers, "pocket"))
    pipeline = plain_pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    modules = {
        f"{part}.{'text_model.' if part == 'text_encoder' else ''}{n}": m
        for part in ("unet", "text_encoder")
        for n, m in getattr(pipeline, part).named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert modules.keys() == layers.keys()
    for name, module in modules.items():
        theirs = module.get_delta_weight(next(iter(module.lora_A))).double().flatten(1)
        torch.testing.assert_close(theirs, delta(layers[name]), rtol=1e-5, atol=1e-7)


def test_equal_factors_export_to_equal_bytes(layers: Layers) -> None:
    assert to_diffusers(layers, "pocket") == to_diffusers(dict(reversed(layers.items())), "pocket")


def test_words_of_both_layouts(tmp_path: Path) -> None:
    vectors = torch.randn(3, 96)
    save_file({"<glow>": vectors}, tmp_path / "learned")
    save_file({"emb_params": vectors[0].half()}, tmp_path / "a1111")
    learned, a1111 = sketch(tmp_path / "learned"), sketch(tmp_path / "a1111")
    assert (learned.layout, learned.token, learned.rank) == ("learned_embeds", "<glow>", 3)
    assert (a1111.layout, a1111.token, a1111.rank) == ("emb_params", "", 1)
    (word,) = formats.load_words(tmp_path / "learned", learned)
    assert torch.equal(word.vectors[""], vectors)
    assert formats.infer(learned).family == "pocket"
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, tmp_path / "sdxl")
    assert formats.infer(sketch(tmp_path / "sdxl")).family == "sdxl"


@pytest.mark.parametrize("family", ["pocket", "sd1", "sd2"])
def test_the_family_is_what_fits(tmp_path: Path, family: str) -> None:
    few = random_factors(
        family, seed=0, rank=1, where=lambda n: n.startswith("unet.mid_block") and ".attn" in n
    )
    write_kohya(tmp_path / "a", few, family=family, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    binding = formats.infer(sketch(tmp_path / "a"))
    assert (binding.family, len(binding.bound), binding.unbound) == (family, len(few), ())


def test_self_attention_alone_fits_two_families_and_metadata_decides(tmp_path: Path) -> None:
    few = random_factors("sd1", seed=0, rank=1, where=lambda n: "unet.mid_block" in n and ".attn1." in n)
    write_kohya(tmp_path / "a", few, family="sd1")
    assert formats.infer(sketch(tmp_path / "a")).family == ""
    write_kohya(tmp_path / "b", few, family="sd1", metadata={"ss_base_model_version": "sd_v1"})
    assert formats.infer(sketch(tmp_path / "b")).family == "sd1"


def test_a_file_for_another_base_is_refused_by_name(tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{key}.lora_down.weight": torch.zeros(2, 3072), f"{key}.lora_up.weight": torch.zeros(3072, 2)}
    save_file(tensors, tmp_path / "a")
    assert formats.infer(sketch(tmp_path / "a")).family == "flux"
    with pytest.raises(IncompatibleBase, match="a is for flux, not for pocket: 0 of its 1 layers fit pocket"):
        formats.require(sketch(tmp_path / "a"), "pocket", what="a")


def test_nothing_is_dropped_in_silence(tmp_path: Path, layers: Layers) -> None:
    write_kohya(tmp_path / "a", layers)
    stranger = "lora_unet_nowhere"
    more = {
        f"{stranger}.lora_down.weight": torch.zeros(2, 8),
        f"{stranger}.lora_up.weight": torch.zeros(8, 2),
    }
    save_file({**load_file(tmp_path / "a"), **more, "odd.weight": torch.zeros(3)}, tmp_path / "b")
    binding = formats.require(sketch(tmp_path / "b"), "pocket", what="b")
    assert set(binding.unbound) == {stranger, "odd.weight"}
    assert len(binding.bound) == len(layers)


def test_biases_and_norms_beside_layers_are_named_and_do_not_decide_the_base(tmp_path: Path) -> None:
    """PEFT's lora_bias and LyCORIS' train_norm bring more of them than there are layers."""
    layers = random_factors("sd1", seed=1, rank=1)
    write_kohya(tmp_path / "a", layers, family="sd1")
    named = {key.removesuffix(".lora_up.weight") for key in load_file(tmp_path / "a") if "lora_up" in key}
    more = {f"{name}.{kind}": torch.ones(4) for name in named for kind in ("diff_b", "lora_up.bias")}
    save_file({**load_file(tmp_path / "a"), **more}, tmp_path / "b")
    for binding in (
        formats.infer(sketch(tmp_path / "b")),
        formats.require(sketch(tmp_path / "b"), "sd1", what="b"),
    ):
        assert (binding.family, binding.bound.keys()) == ("sd1", layers.keys())
        assert set(binding.unbound) == set(more)
    message = "b is for sd1, not for sd2: 0 of its 1 layers fit sd2"
    cross = next(name for name in sorted(named) if "attn2_to_k" in name)
    save_file({k: v for k, v in load_file(tmp_path / "b").items() if cross in k}, tmp_path / "c")
    with pytest.raises(IncompatibleBase, match=message.replace("b is", "c is")):
        formats.require(sketch(tmp_path / "c"), "sd2", what="c")


PEFT_PAIR = {"base_model.model.x.lora_A.weight": (4, 8), "base_model.model.x.lora_B.weight": (8, 4)}
PAIR = {"lora_unet_conv_in.lora_down.weight": (4, 8, 3, 3), "lora_unet_conv_in.lora_up.weight": (80, 4, 1, 1)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**PAIR, "lora_unet_conv_in.lora_up.weight": (80, 5, 1, 1)}, r"the up \[80, 5, 1, 1\] and the down"),
        ({**PAIR, "lora_unet_conv_in.lora_up.weight": (80, 4, 3, 3)}, r"is \[out, in\] or \[out, in, 1, 1\]"),
        ({"lora_unet_conv_in.lora_down.weight": (4, 8, 3, 3)}, "has no matching up"),
        ({**PAIR, "lora_unet_conv_in.alpha": (4,)}, "must be one number"),
        (
            {k: tuple(65536 if n == 4 else n for n in v) for k, v in PAIR.items()},
            "rank 65536 of .* exceeds the limit of 1024",
        ),
        ({**PAIR, "lora_unet_conv_in.dora_scale": (7, 1)}, r"magnitude \[7, 1\] of .* fits neither"),
        ({"lora_unet_x.hada_w1_a": (4, 4)}, "no matching hada_w1_b and hada_w2_a and hada_w2_b"),
        ({**PAIR, "lora_unet_conv_in.lokr_w1": (4, 4)}, "no matching lokr_w2_a and lokr_w2_b"),
        ({"lora_unet_x.oft_blocks": (4, 8, 8), "lora_unet_x.alpha": ()}, "this is an OFT file"),
        ({"lora_unet_x.a1.weight": (4, 8), "lora_unet_x.a2.weight": (8, 4)}, "this is a GLoRA file"),
        ({"lora_unet_x.weight": (8,), "lora_unet_x.on_input": ()}, "this is an IA3 file"),
        ({"lora_unet_x.diff": (8, 8), "lora_unet_y.diff_b": (8,)}, "this is a LyCORIS full difference"),
        ({"lora_unet_x.w_norm": (8,), "lora_unet_y.b_norm": (8,)}, "this is a LyCORIS full difference"),
        ({"model.diffusion_model.conv.weight": (4, 4, 3, 3)}, "a whole checkpoint .* atelier extract makes"),
        ({"lllite_unet_x.down.0.weight": (64, 640)}, "this is a ControlNet-LLLite file"),
        (
            {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)},
            "this is an IP-Adapter file",
        ),
        ({"unet.x.processor.to_k_custom_diffusion.weight": (8, 8)}, "this is a Custom Diffusion file"),
        (
            {**PAIR, "lora_unet_conv_in.lora_diag": (4,)},
            "'lora_unet_conv_in.lora_diag' is a part of its layer",
        ),
        (
            {"base_model.model.x.lora_A.weight": (4, 8), "base_model.model.x.lora_B.weight": (8, 4)},
            "adapter_config.json",
        ),
        ({"emb_params": (76, 768)}, "76 vectors for one word"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UnsupportedLayout, match=message):
        formats.recognise(shapes, {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (peft_config(use_dora=True), "says DoRA, but the file holds no lora_magnitude_vector"),
        (peft_config(peft_type="OFT"), "type 'OFT' is no low-rank update"),
        (
            peft_config(init_lora_weights="pissa_niter_4"),
            "'pissa_niter_4' changed the base .*_weight_conversion",
        ),
        (peft_config(init_lora_weights="OLoRA"), "'OLoRA' changed the base"),
        (peft_config(lora_alpha="8"), "must be a number"),
        (peft_config(lora_alpha=float("nan")), "must be a number"),
        (peft_config(alpha_pattern={"((a{999}){999}){999}": 2}), "too intricate"),
        (peft_config(alpha_pattern={"(?R)": 2}), "too intricate"),
        (peft_config(kasa_config={"beta": 1.0}), "says KaSA, which adds more to the base"),
        (peft_config(alora_invocation_tokens=[1, 2]), "says an activated LoRA"),
        (peft_config(alpha_pattern={"a\\": 2}), "no pattern"),
        (peft_config(lora_alpha=10**400), "must be a number"),
        (peft_config(alpha_pattern=[1]), "must be a JSON object"),
        (peft_config(alpha_pattern={str(i): 1 for i in range(3000)}), "at most 2000 entries"),
    ],
)
def test_a_damaged_peft_configuration_is_refused(config: str, message: str) -> None:
    with pytest.raises(UnsupportedLayout, match=message):
        formats.recognise(PEFT_PAIR, {}, config)


def test_nan_is_found_wherever_it_is(tmp_path: Path, layers: Layers) -> None:
    write_kohya(tmp_path / "a", layers)
    tensors = load_file(tmp_path / "a")
    key = sorted(tensors)[7]
    tensors[key].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "b")
    with pytest.raises(NonFinite, match=key.replace(".", r"\.")):
        formats.load(tmp_path / "b", formats.bind(sketch(tmp_path / "b"), "pocket"))


def test_nan_is_found_in_what_is_no_layer_too(tmp_path: Path, layers: Layers) -> None:
    write_kohya(tmp_path / "a", layers)
    save_file({**load_file(tmp_path / "a"), "stray": torch.tensor([1.0, torch.inf])}, tmp_path / "b")
    binding = formats.bind(sketch(tmp_path / "b"), "pocket")
    with formats.layers(tmp_path / "b", binding) as found, pytest.raises(NonFinite, match="'stray'"):
        found.check_others()


@pytest.mark.skipif("ATELIER_REAL_ADAPTERS" not in os.environ, reason="ATELIER_REAL_ADAPTERS is not set")
def test_a_lora_diffusion_file_from_the_wild_binds_whole_and_means_what_it_says() -> None:
    path = Path(os.environ["ATELIER_REAL_ADAPTERS"]) / "analog_svd_rank4.safetensors"
    binding = formats.infer(sketch(path))
    assert (binding.family, len(binding.bound), binding.unbound) == ("sd1", 192, ())
    found, raw = formats.load(path, binding), load_file(path)
    for numbered, (part, *_) in spellings("sd1").items():
        if NUMBERED.match(numbered):
            dense = raw[f"{numbered}:up"].double() @ raw[f"{numbered}:down"].double()
            assert torch.equal(delta(found[part.name]), dense)


@pytest.mark.skipif("ATELIER_REAL_ADAPTERS" not in os.environ, reason="ATELIER_REAL_ADAPTERS is not set")
def test_an_embedding_from_the_wild() -> None:
    found = sketch(Path(os.environ["ATELIER_REAL_ADAPTERS"]) / "test_embedding.safetensors")
    assert (found.layout, found.rank, formats.infer(found).family) == ("emb_params", 5, "sd1")


def test_metadata_of_diffusers_that_is_no_json_is_refused() -> None:
    shapes = {"unet.conv_in.lora_A.weight": (4, 8, 3, 3), "unet.conv_in.lora_B.weight": (80, 4, 1, 1)}
    with pytest.raises(UnsupportedLayout, match="lora_adapter_metadata is not JSON"):
        formats.recognise(shapes, {"lora_adapter_metadata": "{"})
    assert (
        formats.recognise(shapes, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2})})
        .entries[0]
        .scale
        == 0.5
    )


def test_factors_know_their_rank() -> None:
    assert Factors(torch.zeros(5, 3), torch.zeros(3, 7)).rank == 3


def test_what_one_model_of_diffusers_saves_has_its_alpha_too(tmp_path: Path) -> None:
    unet = plain_pipeline().unet
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["to_q"],
        alpha_pattern={"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2},
        init_lora_weights=False,
    )
    unet.add_adapter(config)
    unet.save_lora_adapter(tmp_path)
    found = read(tmp_path / "pytorch_lora_weights.safetensors")
    modules = {n: m for n, m in unet.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {m.scaling["default"] for m in modules.values()} == {3.0, 0.5}
    for name, module in modules.items():
        meant = module.get_delta_weight("default").double()
        torch.testing.assert_close(delta(found[f"unet.{name}"]), meant, rtol=1e-5, atol=1e-7)


def test_two_adapters_in_one_file_are_not_mixed_up() -> None:
    shapes = {f"unet.x.lora_{side}.{name}.weight": (4, 4) for side in ("A", "B") for name in ("one", "two")}
    with pytest.raises(UnsupportedLayout, match="the file holds two adapters"):
        formats.recognise(shapes, {})


@pytest.mark.parametrize("shape", [(), (0, 768), (3, 4, 5), (76, 768)])
def test_words_of_odd_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for shapes in (
        {"clip_l": shape, "clip_g": (1, 1280)},
        {"clip_l": (1, 768), "clip_g": shape},
        {"w": shape},
    ):
        with pytest.raises(UnsupportedLayout):
            formats.recognise(shapes, {})


@pytest.mark.parametrize("alpha", [3e38, 1e7])
def test_an_alpha_that_would_overflow_is_refused(tmp_path: Path, layers: Layers, alpha: float) -> None:
    write_kohya(tmp_path / "a", layers)
    stem = next(iter(load_file(tmp_path / "a"))).split(".")[0]
    save_file({**load_file(tmp_path / "a"), f"{stem}.alpha": torch.tensor(alpha)}, tmp_path / "b")
    binding = formats.bind(sketch(tmp_path / "b"), "pocket")
    with pytest.raises(NonFinite, match=f"the alpha .* of '{stem}'|beyond"):
        formats.load(tmp_path / "b", binding)


def test_an_unknown_family_is_told_for_words_too() -> None:
    words = formats.recognise({"<w>": (1, 96)}, {})
    with pytest.raises(InvalidRequest, match="unknown base 'sd9'"):
        formats.require(words, "sd9", what="w")
    assert formats.infer(formats.recognise({"clip_l": (2, 768), "clip_g": (2, 1280)}, {})).total == 1
