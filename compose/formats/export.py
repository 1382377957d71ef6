"""Canonical factors -> files that others read, at the same strength: float32, alpha = rank, so that the scale
is 1 for every reader.

    to_diffusers   `<canonical name>.lora_A.weight` `[r, …]`, `.lora_B.weight` `[d, r, …]`, what diffusers
                   writes today and everything else reads
    to_peft        one directory a component: `base_model.model.<path>.lora_A.weight`, adapter_config.json
    to_kohya       `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`, named as sd-scripts does

Same factors, same bytes: the header is written here because safetensors' own writer orders metadata by
chance. A DoRA keeps its magnitude in the first two; in kohya's it is `.dora_scale`.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compose.errors import InvalidRequest
from compose.factors import Factors
from compose.families import Module, families, table
from compose.formats.naming import Part, kohya
from compose.formats.sketch import RANK_LIMIT
from compose.groups import shape_of


@dataclass(frozen=True, slots=True)
class PeftDirectory:
    """adapter_model.safetensors and adapter_config.json, for one model of a pipeline."""

    weights: bytes
    config: str


def to_diffusers(layers: Mapping[str, Factors], family: str) -> bytes:
    """The bytes of `diffusers_parts`."""
    return b"".join(diffusers_parts(layers, family))


def diffusers_parts(layers: Mapping[str, Factors], family: str) -> Iterator[bytes]:
    """The file's bytes, a tensor at a time. Convolutions get their kernel back; text encoder names keep
    `text_model`, as `save_lora_weights` writes them. Raises InvalidRequest for a DoRA over columns, which
    diffusers lacks.
    """
    modules = table(family)
    _check_ranks(layers)
    told: dict[str, object] = {}
    for component, own in _by_component(layers):
        # Told without `text_model`: PEFT matches suffixes, so this names the module before and after
        # transformers 5.
        paths = {_path(name).removeprefix("text_model."): factors for name, factors in own.items()}
        config = _configuration(paths, [_path(n) for n in modules if n.startswith(f"{component}.")])
        told |= {f"{component}.{key}": value for key, value in config.items()}
    tensors = {
        f"{name}.{role}": tensor
        for name, factors in sorted(layers.items())
        for role, tensor in _pair(name, factors, modules[name])
    }
    told_so = {"format": "pt", "lora_adapter_metadata": json.dumps(told, sort_keys=True)}
    yield from serialised(tensors, told_so)


def to_peft(layers: Mapping[str, Factors], family: str) -> dict[str, PeftDirectory]:
    """By component, what `PeftModel.from_pretrained` takes for that model: module paths are transformers 5's,
    without `text_model` where CLIPTextModel has none. Raises InvalidRequest as `to_diffusers` does.
    """
    modules = table(family)
    _check_ranks(layers)
    kinds = {component.name: component.kind for component in families()[family].components}
    found = {}
    for component, own in _by_component(layers):
        bare = "text_model." if kinds[component] in {"clip_l", "clip_h"} else ""
        every = [_path(n).removeprefix(bare) for n in modules if n.startswith(f"{component}.")]
        paths = {_path(name).removeprefix(bare): factors for name, factors in own.items()}
        tensors = {
            f"base_model.model.{_path(name).removeprefix(bare)}.{role}": tensor
            for name, factors in own.items()
            for role, tensor in _pair(name, factors, modules[name])
        }
        config = _configuration(paths, every) | {"bias": "none", "task_type": None, "inference_mode": True}
        found[component] = PeftDirectory(
            serialise(tensors, {"format": "pt"}), json.dumps(config, indent=2, sort_keys=True)
        )
    return found


def to_kohya(layers: Mapping[str, Factors], family: str) -> bytes:
    """The file's bytes, every layer under the name of `compose.formats.naming.kohya`.

    Layers that kohya has as one projection become one: over the same `down` their ups are stacked, otherwise
    they stand side by side, block by block, in a summed rank; either way exactly. Raises InvalidRequest where
    that exceeds the rank limit, and for a DoRA in such a projection.
    """
    modules, left = table(family), dict(layers)
    _check_ranks(layers)
    tensors: dict[str, Tensor] = {}
    for key, parts in kohya(family).items():
        own = {part.name: left.pop(part.name) for part in parts if part.name in left}
        if not own:
            continue
        module = modules[parts[0].name]
        factors = next(iter(own.values())) if not parts[0].rows else _fused(key, parts, own, modules)
        up, down = _shaped(factors, module)
        tensors |= {
            f"{key}.lora_up.weight": up,
            f"{key}.lora_down.weight": down,
            f"{key}.alpha": torch.tensor(float(factors.rank)),
        }
        if factors.magnitude is not None:
            ones = [1] * len(module.kernel)
            tensors[f"{key}.dora_scale"] = factors.magnitude.reshape(*factors.magnitude.shape, *ones)
    if left:
        raise InvalidRequest(f"kohya has no name for {', '.join(sorted(left)[:3])}", field="format")
    return serialise(tensors, {"format": "pt"})


def _check_ranks(layers: Mapping[str, Factors]) -> None:
    """Raises InvalidRequest for a layer that no file may hold as factors, before any is formed: a LoKr or
    LoHa is read at its layer's full rank, and leaves at no more than any other file.
    """
    for name in layers:
        if (rank := shape_of(layers, name)[1]) > RANK_LIMIT:
            raise InvalidRequest(
                f"as a LoRA {name!r} has rank {rank}, and a file's limit is {RANK_LIMIT}; resize the adapter "
                "first (atelier resize --rank 64)",
                field="ref",
            )


def _by_component(layers: Mapping[str, Factors]) -> Iterator[tuple[str, dict[str, Factors]]]:
    for component in sorted({name.split(".", 1)[0] for name in layers}):
        yield component, {n: layers[n] for n in sorted(layers) if n.startswith(f"{component}.")}


def _path(name: str) -> str:
    return name.split(".", 1)[1]


def _configuration(layers: Mapping[str, Factors], every: list[str]) -> dict[str, Any]:
    """PEFT's configuration of layers by path, in a model whose layers are `every`.

    PEFT takes a path for the end of one: where another layer ends like this one (FLUX's proj_out), the
    pattern is tied to the start, and the targets become a regular expression.
    """
    ends = {
        path for path in layers if any(other.endswith(f".{path}") for other in every if other not in layers)
    }
    ends |= {path for path in layers if any(other.endswith(f".{path}") for other in layers)}
    ends = {path for path in ends if not path.startswith("encoder.layers.")}  # told without `text_model`
    top = max(factors.rank for factors in layers.values())
    pattern = {
        f"^{path}" if path in ends else path: factors.rank
        for path, factors in sorted(layers.items())
        if factors.rank != top
    }
    targets: object = sorted(layers)
    if ends:
        targets = "|".join(re.escape(path) for path in sorted(layers))
    decomposed = any(factors.magnitude is not None for factors in layers.values())
    return {
        "alpha_pattern": pattern,
        "lora_alpha": top,
        "peft_type": "LORA",
        "r": top,
        "rank_pattern": pattern,
        "target_modules": targets,
        **({"use_dora": True} if decomposed else {}),
    }


def _shaped(factors: Factors, module: Module) -> tuple[Tensor, Tensor]:
    """(up, down), of a convolution with its kernel."""
    factors = factors.formed()
    if not module.kernel:
        return factors.up, factors.down
    down = factors.down.reshape(factors.rank, -1, *module.kernel)
    return factors.up[:, :, None, None], down


def _pair(name: str, factors: Factors, module: Module) -> Iterator[tuple[str, Tensor]]:
    up, down = _shaped(factors, module)
    yield "lora_A.weight", down
    yield "lora_B.weight", up
    if factors.magnitude is not None:
        if factors.magnitude.shape != (module.d, 1):
            raise InvalidRequest(
                f"{name!r} is a DoRA layer over columns, which only kohya's layout can say", field="format"
            )
        shape = (1, module.d, 1, 1) if module.kernel else (module.d,)
        yield "lora_magnitude_vector", factors.magnitude.reshape(shape)


def _fused(
    key: str, parts: tuple[Part, ...], own: Mapping[str, Factors], modules: Mapping[str, Module]
) -> Factors:
    """One projection of several layers; those that are not there are zero rows."""
    if any(factors.magnitude is not None for factors in own.values()):
        raise InvalidRequest(f"{key!r} is one projection of several layers, and no DoRA", field="format")
    downs = [factors.down for factors in own.values()]
    shared = all(down.shape == downs[0].shape and torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if shared else torch.cat(downs)
    if len(down) > RANK_LIMIT:
        raise InvalidRequest(
            f"{key!r} would have the rank {len(down)}, the limit is {RANK_LIMIT}; resize the adapter first",
            field="format",
        )
    up = down.new_zeros(max(end for part in parts for _, end in part.rows), len(down))
    column = 0
    for part in parts:
        if part.name in own:
            factors, row = own[part.name], 0
            for start, end in part.rows:
                up[start:end, column : column + factors.rank] = factors.up[row : row + end - start]
                row += end - start
            column += 0 if shared else factors.rank
    return Factors(up, down)


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """float32 tensors as safetensors, keys sorted."""
    return b"".join(serialised(tensors, metadata))


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The same, a tensor at a time."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        size = 4 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in sorted(tensors.items()):
        yield tensor.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()
