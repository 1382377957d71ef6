"""Tiny ControlNets and IP-Adapters with random weights for the tiny pipelines of tests.pipelines."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, FluxControlNetModel, SD3ControlNetModel
from torch import nn

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
    elif warm.base.family == "sd3":
        config = {**denoiser.config, "num_layers": 1, "extra_conditioning_channels": 0}
        net = SD3ControlNetModel.from_config(config | more)
    else:
        widths = (4, 8, 8, 8)[:levels]
        net = ControlNetModel.from_unet(denoiser, **({"conditioning_embedding_out_channels": widths} | more))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    net.save_pretrained(path)
    return path
