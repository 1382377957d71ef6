"""Tiny ControlNets and IP-Adapters with random weights for the tiny pipelines of tests.pipelines."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, FluxControlNetModel, SD3ControlNetModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from compose.warm import WarmPipeline


def tiny_control(warm: WarmPipeline, path: Path, *, seed: int = 0, **more: Any) -> Path:
    """Writes a ControlNet for a base, of which every weight is random: a new one would do nothing at all."""
    denoiser: Any = warm.denoiser
    levels = len(
        warm.pipeline.vae.config.get("encoder_block_out_channels")
        or warm.pipeline.vae.config.block_out_channels
    )
    if warm.base.family == "flux":
        config = {**denoiser.config, "num_layers": 1, "num_single_layers": 0}
        net: nn.Module = FluxControlNetModel.from_config(config | more)
    elif warm.base.family.startswith("sd3"):
        config = {**denoiser.config, "num_layers": 1, "extra_conditioning_channels": 0}
        net = SD3ControlNetModel.from_config(config | more)
    elif "num_control_type" in more:
        width = denoiser.config.block_out_channels[0]
        config = {**denoiser.config, "conditioning_embedding_out_channels": (4, 8, 8, 8)[:levels]}
        config |= {"num_trans_channel": width, "num_proj_channel": width, "num_trans_head": 2}
        net = ControlNetUnionModel.from_config(config | more)
    else:
        widths = (4, 8, 8, 8)[:levels]
        net = ControlNetModel.from_unet(denoiser, **({"conditioning_embedding_out_channels": widths} | more))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    net.save_pretrained(path)
    return path


def tiny_encoder(path: Path, *, seed: int = 0, **more: int) -> Path:
    """Writes an image encoder."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "projection_dim": 24, "intermediate_size": 37, "num_hidden_layers": 3}
    config = CLIPVisionConfig(num_attention_heads=4, image_size=32, patch_size=8, **(sizes | more))
    CLIPVisionModelWithProjection(config).save_pretrained(path)
    return path


def tiny_adapter(
    warm: WarmPipeline, path: Path, *, kind: str = "pooled", seed: int = 0, reads: int | None = None
) -> Path:
    """Writes an IP-Adapter for a base in the layout of its inventors: `pooled`, or `plus` and `full`, which
    read all of a picture's patches; one for FLUX.1, which is pooled, in the layout of XLabs.
    """
    unet: Any = warm.denoiser
    flux = warm.base.family == "flux"
    cross = int(unet.config.joint_attention_dim if flux else unet.config.cross_attention_dim)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pooled":
        shapes: dict[str, tuple[int, ...]] = {
            "proj.weight": (4 * cross, reads or 24),
            "proj.bias": (4 * cross,),
            "norm.weight": (cross,),
            "norm.bias": (cross,),
        }
    elif kind == "full":
        shapes = {"proj.0.weight": (reads or 32, reads or 32), "proj.0.bias": (reads or 32,)}
        shapes |= {"proj.2.weight": (cross, reads or 32), "proj.2.bias": (cross,)}
        shapes |= {"proj.3.weight": (cross,), "proj.3.bias": (cross,)}
    else:
        shapes = {"latents": (1, 5, 64), "proj_in.weight": (64, reads or 32), "proj_in.bias": (64,)}
        shapes |= {"proj_out.weight": (cross, 64), "proj_out.bias": (cross,)}
        shapes |= {"norm_out.weight": (cross,), "norm_out.bias": (cross,)}
        for layer in (f"layers.{i}" for i in range(4)):  # diffusers knows no other number
            shapes |= {f"{layer}.0.norm{n}.{part}": (64,) for n in (1, 2) for part in ("weight", "bias")}
            shapes |= {f"{layer}.0.to_q.weight": (64, 64), f"{layer}.0.to_kv.weight": (128, 64)}
            shapes |= {f"{layer}.0.to_out.weight": (64, 64)}
            shapes |= {f"{layer}.1.0.weight": (64,), f"{layer}.1.0.bias": (64,)}
            shapes |= {f"{layer}.1.1.weight": (256, 64), f"{layer}.1.3.weight": (64, 256)}
    if flux:
        found = {f"ip_adapter_proj_model.{name}": random(*shape) for name, shape in shapes.items()}
        for number in range(unet.config.num_layers):
            for which in ("k", "v"):
                name = f"double_blocks.{number}.processor.ip_adapter_double_stream_{which}_proj"
                found |= {f"{name}.weight": random(unet.inner_dim, cross)}
                found |= {f"{name}.bias": random(unet.inner_dim)}
        save_file(found, path)
        return path
    crossing = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    found = {f"image_proj.{name}": random(*shape) for name, shape in shapes.items()}
    for number, name in enumerate(crossing):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for which in ("k", "v"):
            found[f"ip_adapter.{2 * number + 1}.to_{which}_ip.weight"] = random(inner, cross)
    save_file(found, path)
    return path
