"""Painting within a mask where diffusers has no pipeline for it: after every step of image to image, what is
black in the mask is the source again, as noisy as that step is (Blended Latent Diffusion, arXiv 2206.02779,
algorithm 1; what diffusers does with four latent channels).
"""

from typing import Any

import torch
from torch import Tensor

from compose.source import Source
from compose.warm import WarmPipeline


def by_blending(warm: WarmPipeline) -> bool:
    """Whether diffusers' inpainting refuses this base: its UNet has neither 4 nor 9 input channels."""
    unet = getattr(warm.pipeline, "unet", None)
    return unet is not None and unet.config.in_channels not in {4, 9}


class Blend:
    """The source's latents `[1, c, h, w]`, a mask `[1, 1, h, w]` of where to paint, and the noise of each
    picture.
    """

    def __init__(self, warm: WarmPipeline, source: Source, seeds: list[int]) -> None:
        vae = warm.pipeline.vae
        pixels = torch.tensor(source.picture, device=warm.device, dtype=vae.dtype)
        encoded = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        self._clean: Tensor = (latents * vae.config.scaling_factor).to(warm.denoiser.dtype)
        mask = torch.tensor(source.mask, device=warm.device, dtype=self._clean.dtype)[None, None] / 255
        self._mask = torch.nn.functional.interpolate(mask, self._clean.shape[-2:], mode="area")
        noise = [torch.randn(self._clean.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self._noise = torch.cat(noise).to(self._clean)

    def __call__(self, pipeline: Any, index: int, latents: Tensor) -> Tensor:
        """The latents after step `index`, the source around what is painted."""
        steps = pipeline.scheduler.timesteps
        after = len(steps) - pipeline.num_timesteps + index + 1
        around = self._clean.expand_as(latents)
        if after < len(steps):
            around = pipeline.scheduler.add_noise(around, self._noise, steps[after : after + 1])
        return around + (latents - around) * self._mask
