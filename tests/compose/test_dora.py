"""DoRA is applied where the base's weights are known, to what PEFT and LyCORIS make of them; nowhere else."""

from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lycoris import LoConModule, LohaModule, LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compose import formats, pocket
from compose.difference import differences
from compose.errors import IncompatibleBase, InvalidRequest, NonFinite, UnsupportedLayout
from compose.factors import Factors
from compose.warm import WarmPipeline
from compose.weights import Weight
from tests.adapters import Layers, blend, random_factors, read, sketch

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
CONV = "unet.down_blocks.0.resnets.0.conv1"
WIDE = "unet.conv_in"


def base_layer(warm: WarmPipeline, name: str) -> nn.Linear | nn.Conv2d:
    component, path = name.split(".", 1)
    return getattr(warm.pipeline, component).get_submodule(path.removeprefix("text_model."))


def flat(name: str) -> str:
    component, path = name.split(".", 1)
    return f"{'lora_unet' if component == 'unet' else 'lora_te'}_{path.replace('.', '_')}"


def doras(layers: Layers) -> Layers:
    assert all(factors.magnitude is not None for factors in layers.values())
    return layers


def assert_close(found: Tensor, meant: Tensor) -> None:
    meant = meant.detach().double().flatten(1)
    assert float((found.double() - meant).norm() / meant.norm()) < 1e-6


@pytest.mark.parametrize("module", [LoConModule, LohaModule, LokrModule])
@pytest.mark.parametrize("rows", [True, False])
def test_one_adapter_is_what_lycoris_computes(
    bare: WarmPipeline, tmp_path: Path, module: type[nn.Module], rows: bool
) -> None:
    """For rows (wd_on_out) and for columns, of linears and convolutions."""
    torch.manual_seed(1)
    tensors, meant = {}, {}
    for name in (LINEAR, TEXT, CONV, WIDE):
        layer = base_layer(bare, name)
        made = module(
            flat(name), layer, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=rows, bypass_mode=False
        )
        for key, parameter in made.named_parameters():
            if not key.startswith("org"):
                parameter.data = (
                    parameter.data * 1.1 if key == "dora_scale" else 0.2 * torch.randn_like(parameter)
                )
        tensors |= {
            f"{flat(name)}.{k}": v.detach().clone().contiguous() for k, v in made.state_dict().items()
        }
        with torch.no_grad():
            changed = made._current_weight() + made_update(made)
            meant[name] = made.apply_weight_decompose(changed, 1)
    save_file(tensors, tmp_path / "a")
    found = doras(read(tmp_path / "a"))
    bare.apply([(found, Weight(1.0))])
    for name, weight in meant.items():
        assert_close(bare.live(name), weight)
        assert not torch.equal(bare.live(name), bare.golden(name))


def made_update(made: nn.Module) -> Tensor:
    """What the modules' forward passes add to the weight before it is decomposed."""
    if isinstance(made, LoConModule):
        return made.make_weight() * made.scale
    return made.get_weight(made.shape) * made.scalar


def test_one_adapter_is_what_peft_merges(bare: WarmPipeline, tmp_path: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None).to(torch.float32)
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules=["to_q", "conv_in", "conv1"], init_lora_weights=False
    )
    wrapped = peft.PeftModel(theirs.unet, config)
    for key, parameter in wrapped.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    wrapped.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith("lora_magnitude_vector") for key in keys)
    text = (tmp_path / "adapter_config.json").read_text()
    found = doras(read(tmp_path / "adapter_model.safetensors", config=text))
    bare.apply([(found, Weight(1.0))])
    modules = {n: m for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert len(modules) == len(found) > 20
    for name, module in modules.items():
        module.merge()
        assert_close(bare.live(name.replace("base_model.model.", "unet.")), module.get_base_layer().weight)


def test_one_adapter_is_what_ai_toolkit_computes(bare: WarmPipeline, tmp_path: Path) -> None:
    """W x + B A x + (m / ||W + B A|| - 1) (W + B A) x (its toolkit/models/DoRA.py), and no alpha."""
    torch.manual_seed(3)
    W = base_layer(bare, LINEAR).weight.detach().clone()
    up, down = 0.2 * torch.randn(len(W), 4), torch.randn(4, W.shape[1])
    m = W.norm(dim=1) * (1 + 0.2 * torch.rand(len(W)))
    key = f"{LINEAR}.lora_"
    save_file({f"{key}A.weight": down, f"{key}B.weight": up, f"{LINEAR}.magnitude": m}, tmp_path / "a")
    bare.apply([(doras(read(tmp_path / "a")), Weight(1.0))])
    x = torch.randn(5, W.shape[1], dtype=torch.float64)
    changed = W.double() + up.double() @ down.double()
    meant = x @ W.double().T + x @ (up.double() @ down.double()).T
    meant += (m.double() / changed.norm(dim=1) - 1) * (x @ changed.T)
    assert_close(x @ bare.live(LINEAR).double().T, meant)


def test_what_diffusers_saves_and_loads_renders_the_same(bare: WarmPipeline, tmp_path: Path) -> None:
    """One UNet step with the file loaded by `load_lora_weights`, its DoRA computed at run time."""
    theirs = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None).to(torch.float32)
    torch.manual_seed(3)
    theirs.unet.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=4, use_dora=True, target_modules=["to_q", "to_v"], init_lora_weights=False
        )
    )
    state = peft.get_peft_model_state_dict(theirs.unet)
    theirs.save_lora_weights(tmp_path, unet_lora_layers=state)
    found = doras(read(tmp_path / "pytorch_lora_weights.safetensors"))
    bare.apply([(found, Weight(1.0))])
    latent = torch.randn(1, theirs.unet.config.in_channels, 8, 8)
    words = torch.randn(1, 8, theirs.unet.config.cross_attention_dim)
    with torch.no_grad():
        mine = bare.pipeline.unet(latent, 500, words, return_dict=False)[0]
        other = theirs.unet(latent, 500, words, return_dict=False)[0]
        bare.apply(())
        plain = bare.pipeline.unet(latent, 500, words, return_dict=False)[0]
    assert float((mine - other).norm() / other.norm()) < 1e-5
    assert float((plain - other).norm() / other.norm()) > 1e-2


def test_a_weight_blends_from_the_base_and_adapters_add_up(bare: WarmPipeline) -> None:
    plain = random_factors("pocket", seed=1, rank=2, where=lambda n: n in {LINEAR, TEXT})
    one, two = (with_magnitude(bare, seed) for seed in (2, 3))
    golden = bare.golden(LINEAR).double()

    def alone(dora: Layers) -> Tensor:
        f = dora[LINEAR]
        W = golden + f.up.double() @ f.down.double()
        return f.magnitude.double() * W / W.norm(dim=1, keepdim=True) - golden

    bare.apply([(plain, Weight()), (one, Weight(0.3)), (two, Weight(-1.5))])
    update = plain[LINEAR].up.double() @ plain[LINEAR].down.double()
    assert_close(bare.live(LINEAR), golden + update + 0.3 * alone(one) - 1.5 * alone(two))
    text = plain[TEXT].up.double() @ plain[TEXT].down.double()
    assert_close(bare.live(TEXT), bare.golden(TEXT).double() + text)
    bare.apply([(one, Weight(0.0))])
    assert torch.equal(bare.live(LINEAR), bare.golden(LINEAR))


def with_magnitude(warm: WarmPipeline, seed: int) -> Layers:
    layers = random_factors("pocket", seed=seed, rank=2, where=LINEAR.__eq__)
    f = layers[LINEAR]
    norm = warm.golden(LINEAR).norm(dim=1, keepdim=True)
    return {LINEAR: Factors(f.up, f.down, norm * 1.5)}


def test_a_dora_that_does_not_fit_changes_nothing(bare: WarmPipeline) -> None:
    (f,) = with_magnitude(bare, 1).values()
    with pytest.raises(IncompatibleBase, match=r"unet\.nowhere"):
        bare.apply([({"unet.nowhere": f}, Weight(1.0))])
    assert bare.is_golden()


@pytest.mark.parametrize("method", ["naive", "svd", "orthogonal"])
def test_a_merge_in_factor_space_refuses_a_dora(warm: WarmPipeline, method: str) -> None:
    plain = random_factors("pocket", seed=1, rank=2, where=LINEAR.__eq__)
    with pytest.raises(InvalidRequest, match="is a DoRA layer, which is not merged in factor space"):
        blend([(plain, 1.0), (with_magnitude(warm, 2), 1.0)], method=method)
    with pytest.raises(InvalidRequest, match="is a DoRA layer"):
        differences(plain, with_magnitude(warm, 2))


def test_a_fused_projection_shares_its_magnitude_out_by_rows_and_not_by_columns(tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    g = torch.Generator().manual_seed(0)
    pair = {
        f"{key}.lora_up.weight": torch.randn(9216, 2, generator=g),
        f"{key}.lora_down.weight": torch.randn(2, 3072, generator=g),
    }
    magnitude = torch.rand(9216, 1, generator=g)
    save_file({**pair, f"{key}.dora_scale": magnitude}, tmp_path / "rows")
    found = read(tmp_path / "rows", "flux")
    assert torch.equal(found["transformer.transformer_blocks.0.attn.to_k"].magnitude, magnitude[3072:6144])
    save_file({**pair, f"{key}.dora_scale": torch.rand(1, 3072)}, tmp_path / "columns")
    binding = formats.bind(sketch(tmp_path / "columns"), "flux")
    assert (binding.bound, binding.unbound) == ({}, (key,))


def test_a_magnitude_of_nan_is_refused(tmp_path: Path) -> None:
    key = flat(LINEAR)
    d, k = 128, 128
    tensors = {f"{key}.lora_up.weight": torch.ones(d, 1), f"{key}.lora_down.weight": torch.ones(1, k)}
    save_file({**tensors, f"{key}.dora_scale": torch.full((d, 1), torch.nan)}, tmp_path / "a")
    with pytest.raises(NonFinite, match="dora_scale"):
        read(tmp_path / "a")
    save_file({**tensors, f"{key}.dora_scale": torch.ones(d - 1, 1)}, tmp_path / "b")
    with pytest.raises(UnsupportedLayout, match="fits neither its 128 rows nor its 128 columns"):
        sketch(tmp_path / "b")
    save_file({f"{key}.dora_scale": torch.ones(d, 1)}, tmp_path / "c")
    with pytest.raises(UnsupportedLayout, match="no LoRA or textual inversion layout"):
        sketch(tmp_path / "c")
