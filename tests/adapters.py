"""Adapter files for tests: random factors, written in each layout by hand or by the library that owns it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compose import formats
from compose.factors import Factors
from compose.families import table
from compose.groups import Adapter
from compose.merging import Merged, merge
from compose.weights import Weight
from registry.headers import read_header

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


def sketch(path: Path, config: str = "") -> formats.Sketch:
    """What a file's header says."""
    header = read_header(path)
    return formats.recognise({n: i.shape for n, i in header.tensors.items()}, header.metadata, config)


def read(path: Path, family: str = "pocket", config: str = "") -> Layers:
    """A file's factors, all of its tensors bound or the test fails."""
    binding = formats.require(sketch(path, config), family, what=path.name)
    assert binding.unbound == ()
    return formats.load(path, binding)


def assert_same(found: Mapping[str, Factors], meant: Mapping[str, Factors]) -> None:
    """The same layers with the same updates, to a millionth of each one's norm, which is not zero; in factor
    space, as dense ones of the large bases take minutes.
    """
    assert found.keys() == meant.keys()
    for name in meant:
        (up, down), (b, a) = ((f.up.double(), f.down.double()) for f in (found[name], meant[name]))
        assert (up.shape[0], down.shape[1]) == (b.shape[0], a.shape[1]), name
        apart, whole = norm(torch.cat([up, -b], 1), torch.cat([down, a])), norm(b, a)
        assert whole > 0
        assert apart < 1e-6 * whole, name


def norm(up: Tensor, down: Tensor) -> float:
    """||up @ down||_F by QR: no cancellation, as there is between Gram matrices."""
    left, right = torch.linalg.qr(up)[1], torch.linalg.qr(down.mT)[1]
    return float((left @ right.mT).norm())


def assert_updates(
    found: Mapping[str, Factors], meant: Mapping[str, Tensor], tolerance: float = 1e-6
) -> None:
    """The same layers, each update as near to the dense one as float32 allows, relative to its norm."""
    assert found.keys() == meant.keys()
    for name, dense in meant.items():
        dense = dense.double().flatten(1)
        assert delta(found[name]).shape == dense.shape, name
        assert float(dense.norm()) > 0
        assert float((delta(found[name]) - dense).norm() / dense.norm()) < tolerance, name


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
