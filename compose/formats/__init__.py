"""Any adapter file in the wild -> canonical factors, one module per family of layouts.

    sketch = recognise(shapes, metadata)     # from the header alone: which layout, which layers
    binding = require(sketch, "sd1")         # layer names of the file -> layers of the base
    factors = load(path, binding)            # float32, the scale inside `up`

Adding a layout is adding one module with a `recognise` and its line in `LAYOUTS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compose.errors import NonFinite, UnsupportedLayout
from compose.factors import Factors
from compose.formats import diffusers, embeddings, kohya, lora_diffusion, peft
from compose.formats.sketch import Binding, Entry, Shapes, Sketch, bind, infer, require

LAYOUTS: tuple[Callable[[Shapes, Mapping[str, str], str], Sketch | None], ...] = (
    lora_diffusion.recognise,
    kohya.recognise,
    peft.recognise,
    diffusers.recognise,
    embeddings.recognise,
)

_NOT_READ = (
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_w1", "LoHa"),
    ("lokr_w", "LoKr"),
    ("lora_mid", "LoCon in Tucker form"),
    ("oft_blocks", "OFT"),
    ("bundle_emb", "LoRA with bundled embeddings"),
    ("diff_b", "LyCORIS full difference"),
)


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str = "") -> Sketch:
    """The layout of a file, from its tensors' names and shapes. Raises UnsupportedLayout."""
    for part, name in _NOT_READ:
        if any(part in key for key in shapes):
            raise UnsupportedLayout(
                f"this is a {name} file, which Atelier does not read yet; convert it to a LoRA"
            )
    for layout in LAYOUTS:
        if sketch := layout(shapes, metadata, adapter_config):
            return sketch
    shown = ", ".join(repr(key[:80]) for key in list(shapes)[:3])
    raise UnsupportedLayout(f"no LoRA or textual inversion layout has tensors such as {shown}")


def load(path: Path, binding: Binding) -> dict[str, Factors]:
    """Canonical factors of the bound layers. Raises NonFinite with the first bad tensor."""
    layers = {}
    with safe_open(path, framework="pt") as file:
        for name, entry in binding.bound.items():
            up, down = _read(file, entry.up), _read(file, entry.down)
            scale = entry.scale
            if entry.alpha:
                alpha = float(_read(file, entry.alpha))
                scale = (alpha or entry.rank) / entry.rank
            layers[name] = Factors(up.reshape(entry.d, entry.rank) * scale, down.reshape(entry.rank, entry.k))
    return layers


def load_words(path: Path, sketch: Sketch) -> Tensor:
    """The word vectors of a textual inversion, `[n, width]`, float32. Raises NonFinite."""
    with safe_open(path, framework="pt") as file:
        return _read(file, sketch.vectors).reshape(sketch.vectors_shape)


def check_finite(path: Path) -> None:
    """Raises NonFinite with the first tensor that holds NaN or infinity; one tensor in memory at a time."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # a safe_open handle is no mapping
            _read(file, key)


def _read(file: safe_open, key: str) -> Tensor:
    tensor: Tensor = file.get_tensor(key).to(torch.float32)  # type: ignore[no-untyped-call]
    if not bool(torch.isfinite(tensor).all()):
        raise NonFinite(
            f"the tensor {key!r} holds NaN or infinity; the training went wrong, use an earlier checkpoint"
        )
    return tensor


__all__ = [
    "Binding", "Entry", "Sketch", "bind", "check_finite", "infer", "load", "load_words", "recognise",
    "require",
]  # fmt: skip
