"""Writes the file layouts of the demo adapters: four of low-rank adapters, two of textual inversions.

    diffusers       unet.<module>.lora_A.weight, text_encoder.text_model.<module>.lora_A.weight;
                    header `lora_adapter_metadata`
    kohya           lora_unet_<module_with_underscores>.lora_down.weight, .lora_up.weight, .alpha; header ss_*
    diffusers_old   unet.<attention>.processor.to_q_lora.down.weight,
                    text_encoder.text_model.<attention>.q_proj.lora_linear_layer.down.weight
    peft            base_model.model.<module>.lora_A.weight, and adapter_config.json beside it
    learned_embeds  {"<word>": [vectors, 96]}        emb_params  {"emb_params": [vectors, 96]}

A layer is named as in `compose.families`: `unet.<module>` or `text_encoder.text_model.<module>`. Scales
differ on purpose (an alpha that is not the rank, alphas mixed within a file); `up` is divided by the scale
that a reader must multiply back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from compose.factors import Factors

Layers = Mapping[str, Factors]


def halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.float16).contiguous() for name, value in tensors.items()}


def ranks(layers: Layers) -> int:
    return next(iter(layers.values())).rank


def write_diffusers(layers: Layers, path: Path, *, alpha: float) -> None:
    """As `StableDiffusionPipeline.save_lora_weights` writes today; alpha only in the header's metadata."""
    rank = ranks(layers)
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}}
    for name, layer in layers.items():
        component, module = name.split(".", 1)
        parts[component][f"{module}.lora_A.weight"] = layer.down
        parts[component][f"{module}.lora_B.weight"] = layer.up * (rank / alpha)
    targets = {
        part: sorted({name.rsplit(".lora_", 1)[0] for name in tensors}) for part, tensors in parts.items()
    }
    metadata = {
        part: LoraConfig(r=rank, lora_alpha=alpha, target_modules=short(names)).to_dict()
        for part, names in targets.items()
    }
    for values in metadata.values():
        values["target_modules"] = sorted(values["target_modules"])  # a set in memory, a list in every file
    StableDiffusionPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers=halves(parts["unet"]),
        text_encoder_lora_layers=halves(parts["text_encoder"]) or None,
        weight_name=path.name,
        unet_lora_adapter_metadata=metadata["unet"],
        text_encoder_lora_adapter_metadata=metadata["text_encoder"] if parts["text_encoder"] else None,
    )


def short(modules: list[str]) -> list[str]:
    """The endings peft is given as target modules: `to_q`, `to_out.0`, `net.2`."""
    endings = (re.search(r"[a-z_]\w*(\.\d+(\.proj)?)?$", module) for module in modules)
    return sorted({ending.group() for ending in endings if ending})


def write_kohya(
    layers: Layers, path: Path, *, alphas: tuple[float, ...], metadata: Mapping[str, str]
) -> None:
    """As sd-scripts writes; layers take `alphas` in turn, so no single scale fits the file."""
    tensors = {}
    for index, (name, layer) in enumerate(layers.items()):
        alpha = alphas[index % len(alphas)]
        component, module = name.split(".", 1)
        key = f"{'lora_unet' if component == 'unet' else 'lora_te'}_{module.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = layer.down
        tensors[f"{key}.lora_up.weight"] = layer.up * (layer.rank / alpha)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(halves(tensors), path, metadata=dict(metadata))


def write_diffusers_old(layers: Layers, path: Path) -> None:
    """As diffusers wrote until 0.21: no alpha at all, attention only."""
    tensors = {}
    for name, layer in layers.items():
        if name.startswith("unet."):
            attention, module = re.fullmatch(r"(.+\.attn[12])\.(to_\w+)(?:\.0)?", name).groups()  # type: ignore[union-attr]
            key = f"{attention}.processor.{module}_lora"
        else:
            key = f"{name}.lora_linear_layer"
        tensors[f"{key}.down.weight"] = layer.down
        tensors[f"{key}.up.weight"] = layer.up
    save_file(halves(tensors), path, metadata={"format": "pt"})


def write_peft(layers: Layers, path: Path, *, alpha: float) -> None:
    """As `PeftModel.save_pretrained` writes a UNet's adapter; scale = alpha / r is only in the
    configuration.
    """
    tensors, rank = {}, ranks(layers)
    for name, layer in layers.items():
        module = name.removeprefix("unet.")
        tensors[f"base_model.model.{module}.lora_A.weight"] = layer.down
        tensors[f"base_model.model.{module}.lora_B.weight"] = layer.up * (rank / alpha)
    save_file(halves(tensors), path, metadata={"format": "pt"})
    modules = short([name.removeprefix("unet.") for name in layers])
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=modules, base_model_name_or_path="atelier/pocket"
    ).to_dict()
    config["target_modules"] = modules
    beside(path).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.adapter_config.json")


def write_embedding(vectors: Tensor, path: Path, *, key: str) -> None:
    save_file({key: vectors.half().contiguous()}, path)
