"""Canonical factors -> a file in the layout diffusers writes today, which everything else reads.

`<canonical name>.lora_A.weight` `[r, …]` and `.lora_B.weight` `[d, r, …]`, float32, alpha = rank, so that the
scale is 1 for every reader. The text encoder's names keep `text_model`, as `save_lora_weights` writes them.
Same factors, same bytes: the header is written here because safetensors' own writer orders metadata by
chance.
"""

import json
import struct
from collections.abc import Mapping

from torch import Tensor

from compose.bases import table
from compose.factors import Factors


def to_diffusers(layers: Mapping[str, Factors], family: str) -> bytes:
    """The file's bytes. Convolutions get their kernel back."""
    modules = table(family)
    tensors: dict[str, Tensor] = {}
    told: dict[str, object] = {}
    for component in sorted({name.split(".", 1)[0] for name in layers}):
        # Told without `text_model`: PEFT matches suffixes, so this names the module before and after
        # transformers 5.
        own = {
            name.split(".", 1)[1].removeprefix("text_model."): factors.rank
            for name, factors in layers.items()
            if name.startswith(f"{component}.")
        }
        top = max(own.values())
        pattern = {name: rank for name, rank in sorted(own.items()) if rank != top}
        config = {
            "alpha_pattern": pattern,
            "lora_alpha": top,
            "peft_type": "LORA",
            "r": top,
            "rank_pattern": pattern,
            "target_modules": sorted(own),
        }
        told |= {f"{component}.{key}": value for key, value in config.items()}
    for name, factors in sorted(layers.items()):
        module, up, down = modules[name], factors.up, factors.down
        if module.kernel:
            down = down.reshape(factors.rank, -1, *module.kernel)
            up = up.reshape(module.d, factors.rank, 1, 1)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    return serialise(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(told, sort_keys=True)})


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """float32 tensors as safetensors, keys sorted."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks, offset = [], 0
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *chunks))
