"""Adapter files for tests: random factors, written in each layout by hand or by the library that owns it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compose.bases import table
from compose.factors import Factors
from compose.groups import Adapter
from compose.merging import Merged, merge
from compose.weights import Weight

Layers = dict[str, Factors]


def attention(name: str) -> bool:
    """Whether a layer is one that LoRAs usually change."""
    return ".attn1." in name or ".attn2." in name or ".self_attn." in name


def random_factors(
    family: str, *, seed: int, rank: int, scale: float = 0.1, where: Callable[[str], bool] = attention
) -> Layers:
    """Random factors for the chosen layers of a family."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(module.d, rank, generator=g) * scale, torch.randn(rank, module.k, generator=g) * scale
        )
        for name, module in table(family).items()
        if where(name)
    }


def blend(stack: Sequence[tuple[Mapping[str, Factors], float]], **how: Any) -> Merged:
    """`merge` for plain weights."""
    return merge([Adapter(layers, Weight(weight)) for layers, weight in stack], **how)


def delta(factors: Factors) -> Tensor:
    """The dense update, float64."""
    return factors.up.double() @ factors.down.double()


def _tensors(layers: Mapping[str, Factors], family: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, f in layers.items():
        module = table(family)[name]
        up, down = f.up, f.down
        if module.kernel:
            up, down = up[:, :, None, None], down.reshape(f.rank, -1, *module.kernel)
        yield name, up.contiguous(), down.contiguous()


def write_kohya(
    path: Path,
    layers: Mapping[str, Factors],
    *,
    family: str = "pocket",
    alpha: Callable[[str], float] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """kohya's names; with `alpha`, `up` is divided by alpha / rank so that the effect is that of `layers`."""
    tensors = {}
    for name, up, down in _tensors(layers, family):
        component, path_in = name.split(".", 1)
        key = f"{'lora_unet' if component == 'unet' else 'lora_te'}_{path_in.replace('.', '_')}"
        if alpha:
            tensors[f"{key}.alpha"] = torch.tensor(alpha(name))
            up = up / (alpha(name) / layers[name].rank)
        tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"] = up, down
    save_file(tensors, path, metadata=metadata)


def write_old_diffusers(path: Path, layers: Mapping[str, Factors], *, family: str = "pocket") -> None:
    """`…processor.to_q_lora.down.weight` in the UNet, `….lora_linear_layer.…` in the text encoder."""
    tensors = {}
    for name, up, down in _tensors(layers, family):
        if name.startswith("unet."):
            block, leaf = name.removesuffix(".0").rsplit(".", 1)
            stem = f"{block}.processor.{leaf}_lora"
        else:
            stem = f"{name}.lora_linear_layer"
        tensors[f"{stem}.up.weight"], tensors[f"{stem}.down.weight"] = up, down
    save_file(tensors, path)


def write_lora_diffusion(path: Path, layers: Mapping[str, Factors], order: Mapping[str, str]) -> None:
    """`unet:<n>:up`; `order` maps numbered names to canonical ones."""
    tensors = {}
    for numbered, name in order.items():
        tensors[f"{numbered}:up"], tensors[f"{numbered}:down"] = layers[name].up, layers[name].down
    save_file(tensors, path)


def peft_config(**more: object) -> str:
    """An adapter_config.json."""
    return json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"], **more})
