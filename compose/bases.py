"""Base models: which layers each family has, and where their weights are.

A table maps canonical layer names (`unet.down_blocks.0…to_q`,
`text_encoder.text_model.encoder.layers.0…q_proj`: diffusers' module paths under the pipeline component) to
shapes. It is built on the meta device from configurations, so that a file can be bound to a base whose
weights are not here. Canonical names keep `text_model`, as files in the wild do; transformers 5 dropped it
from CLIPTextModel's own paths.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from compose import pocket
from compose.errors import IncompatibleBase, InvalidRequest

_LOADING = threading.Lock()  # from_pretrained patches register_parameter process-wide (diffusers #14347)


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
class Family:
    """Base models with the same layers. `word_width` is the size of its word vectors, 0 where words need two
    of them.
    """

    name: str
    word_width: int
    unet: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]


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


@functools.cache
def families() -> Mapping[str, Family]:
    """The families whose layers are known, from the published configurations."""
    sdxl = {
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
    sd2 = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
    known = (
        Family("pocket", 96, _config(pocket.WEIGHTS / "unet"), (_config(pocket.WEIGHTS / "text_encoder"),)),
        Family("sd1", 768, {"cross_attention_dim": 768, "sample_size": 64}, (_clip(768, 12),)),
        Family("sd2", 1024, sd2, (_clip(1024, 23),)),
        Family("sdxl", 768 + 1280, sdxl, (_clip(768, 12), _clip(1280, 32))),
    )
    return {family.name: family for family in known}


def components(family: Family) -> Iterator[tuple[str, nn.Module]]:
    """The family's adaptable components on the meta device: no weights, only shapes."""
    with torch.device("meta"):
        yield "unet", UNet2DConditionModel.from_config(dict(family.unet))
        for index, config in enumerate(family.text_encoders):
            model = CLIPTextModel if index == 0 else CLIPTextModelWithProjection
            yield f"text_encoder{f'_{index + 1}' if index else ''}", model(CLIPTextConfig(**config))


def adaptable(component: str, model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """(canonical name, module) of every Linear and Conv2d of a component, in order of registration."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            inner = "text_model." if component.startswith("text") and path.startswith("encoder.") else ""
            yield f"{component}.{inner}{path}", module


@functools.cache
def table(family: str) -> Table:
    """The layers of a family. Raises InvalidRequest for an unknown one."""
    if family not in families():
        raise InvalidRequest(f"unknown base {family!r}; known: {', '.join(families())}", field="base")
    return {
        name: _module(module)
        for component, model in components(families()[family])
        for name, module in adaptable(component, model)
    }


def _module(module: nn.Linear | nn.Conv2d) -> Module:
    d, *rest = module.weight.shape
    return Module(d, module.weight[0].numel(), tuple(rest[1:]))


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on disk: a diffusers Stable Diffusion directory, and what a render does when not told
    otherwise.
    """

    name: str
    family: str
    path: Path
    digest: str
    steps: int
    guidance: float


def find(name: str) -> Base:
    """`pocket`, or a directory that holds a Stable Diffusion 1 or 2 pipeline. Raises InvalidRequest,
    IncompatibleBase.
    """
    if name == "pocket":
        return Base("pocket", "pocket", pocket.WEIGHTS, _digest(pocket.WEIGHTS), steps=20, guidance=4.0)
    path = Path(name)
    if not (path / "unet" / "config.json").is_file():
        raise InvalidRequest(
            f"{name!r} is no base: say pocket, or a directory with a diffusers pipeline in it", field="base"
        )
    width = _config(path / "unet").get("cross_attention_dim")
    for family in families().values():
        if len(family.text_encoders) == 1 and family.unet["cross_attention_dim"] == width:
            return Base(path.name, family.name, path, _digest(path), steps=30, guidance=7.5)
    raise IncompatibleBase(
        f"{name!r} is no Stable Diffusion 1 or 2 pipeline (cross attention {width})", field="base"
    )


def load(base: Base, *, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The base's pipeline, on its device, frozen. Raises IncompatibleBase when its layers are not its
    family's.
    """
    with _LOADING:
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                base.path, local_files_only=True, use_safetensors=True, safety_checker=None
            )
        except Exception as error:  # whatever the loaders stumble over is wrong with the directory
            first = str(error).strip().splitlines()[0]
            raise IncompatibleBase(f"{base.path} cannot be loaded: {first}", field="base") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device, dtype)
    for component in ("unet", "text_encoder", "vae"):
        getattr(pipeline, component).requires_grad_(False).eval()
    found = {
        name: _module(module)
        for component in ("unet", "text_encoder")
        for name, module in adaptable(component, getattr(pipeline, component))
    }
    if found != dict(table(base.family)):
        raise IncompatibleBase(f"the layers of {base.name!r} are not those of {base.family}", field="base")
    return pipeline


def _digest(path: Path) -> str:
    """sha256 over the names and bytes of a pipeline's weight and configuration files, in order of name."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in {".safetensors", ".json", ".txt"}:
            with file.open("rb") as opened:
                inner = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(f"{inner}  {file.relative_to(path).as_posix()}\n".encode())
    return f"sha256:{total.hexdigest()}"
