"""Families of base models: which layers each has.

A table maps canonical layer names (`unet.down_blocks.0…to_q`,
`text_encoder.text_model.encoder.layers.0…q_proj`: diffusers' module paths under the pipeline component) to
shapes. It is built on the meta device from configurations, so that a file can be bound to a base whose
weights are not here. Canonical names keep `text_model`, as files in the wild do; transformers 5 dropped it
from CLIPTextModel's own paths.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from compose import pocket
from compose.errors import IncompatibleBase, InvalidRequest


@dataclass(frozen=True, slots=True)
class Module:
    """A Linear or Conv2d an adapter can change: weight `[d, k]`, k = in * kh * kw; `kernel` is () for a
    Linear.
    """

    d: int
    k: int
    kernel: tuple[int, ...] = ()


Table = Mapping[str, Module]


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline that adapters change: its name there, what it is (`unet`, `flux`, `mmdit`,
    `clip_l`, `clip_g`, `clip_h`, `t5`), and its configuration.
    """

    name: str
    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """Base models with the same layers. `words` is the size of the word vectors of each text encoder that
    takes them, by its kind, both of SD3's CLIP-Ls being `clip_l`; those of CLIPs are needed, T5's are not.
    """

    name: str
    components: tuple[Component, ...]
    words: Mapping[str, int] = field(default_factory=dict)

    def config(self, component: str) -> Mapping[str, Any]:
        """The configuration of a component; {} where the family has none of this name."""
        return next((c.config for c in self.components if c.name == component), {})


def _clip(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "projection_dim": width,
    }


def _config(directory: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise IncompatibleBase(f"{directory / 'config.json'} cannot be read: {error}", field="base") from None
    return loaded


_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD2 = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def _mmdit(layers: int) -> dict[str, Any]:
    """SD3's transformer: as wide as 64 times its layers."""
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": layers,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * layers,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }


_SD35_MEDIUM = {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384}
"""As wide and deep as SD3-medium, with a second attention of the picture to itself in its first blocks."""


@functools.cache
def families() -> Mapping[str, Family]:
    """The families whose layers are known, from the published configurations."""
    pocket_text = _config(pocket.WEIGHTS / "text_encoder")
    small, large = (
        Component("text_encoder", "clip_l", _clip(768, 12)),
        Component("text_encoder_2", "clip_g", _clip(1280, 32)),
    )
    sd3_text = (
        Component("text_encoder", "clip_l_projecting", _clip(768, 12)),
        large,
        Component("text_encoder_3", "t5", _T5_XXL),
    )
    sd3_words = {"clip_l": 768, "clip_g": 1280, "t5": 4096}
    known = (
        Family(
            "pocket",
            (
                Component("unet", "unet", _config(pocket.WEIGHTS / "unet")),
                Component("text_encoder", "clip_l", pocket_text),
            ),
            {"clip_l": int(pocket_text["hidden_size"])},
        ),
        Family(
            "sd1",
            (Component("unet", "unet", {"cross_attention_dim": 768, "sample_size": 64}), small),
            {"clip_l": 768},
        ),
        Family(
            "sd2",
            (Component("unet", "unet", _SD2), Component("text_encoder", "clip_h", _clip(1024, 23))),
            {"clip_h": 1024},
        ),
        Family("sdxl", (Component("unet", "unet", _SDXL), small, large), {"clip_l": 768, "clip_g": 1280}),
        Family("sd3", (Component("transformer", "mmdit", _mmdit(24)), *sd3_text), sd3_words),
        Family(
            "sd35-medium",
            (Component("transformer", "mmdit", _mmdit(24) | _SD35_MEDIUM), *sd3_text),
            sd3_words,
        ),
        Family("sd35-large", (Component("transformer", "mmdit", _mmdit(38)), *sd3_text), sd3_words),
        Family(
            "flux",
            (
                Component("transformer", "flux", {"guidance_embeds": True}),
                small,
                Component("text_encoder_2", "t5", _T5_XXL),
            ),
            {"clip_l": 768, "t5": 4096},
        ),
    )
    return {family.name: family for family in known}


_MODELS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "unet": lambda config: UNet2DConditionModel.from_config(dict(config)),
    "flux": lambda config: FluxTransformer2DModel.from_config(dict(config)),
    "mmdit": lambda config: SD3Transformer2DModel.from_config(dict(config)),
    "clip_l": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "clip_l_projecting": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "clip_h": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "clip_g": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "t5": lambda config: T5EncoderModel(T5Config(**config)),
}


@functools.cache
def _layers(family: str, component: str) -> Table:
    known = next(c for c in families()[family].components if c.name == component)
    with torch.device("meta"):  # no weights, only shapes
        model = _MODELS[known.kind](known.config)
    return {name: _module(module) for name, module in adaptable(component, model)}


def adaptable(component: str, model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """(canonical name, module) of every Linear and Conv2d of a component, in order of registration."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            inner = (
                "text_model." if component.startswith("text") and path.startswith("encoder.layers.") else ""
            )
            yield f"{component}.{inner}{path}", module


@functools.cache
def table(family: str) -> Table:
    """The layers of a family. Raises InvalidRequest for an unknown one."""
    if family not in families():
        raise InvalidRequest(f"unknown base {family!r}; known: {', '.join(families())}", field="base")
    parts = (_layers(family, component.name) for component in families()[family].components)
    return {name: module for part in parts for name, module in part.items()}


def _module(module: nn.Linear | nn.Conv2d) -> Module:
    d, *rest = module.weight.shape
    return Module(d, module.weight[0].numel(), tuple(rest[1:]))
