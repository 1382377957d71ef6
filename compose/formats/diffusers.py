"""diffusers, new and old.

New: `unet.<module>.lora_A.weight`, with alphas in the header's `lora_adapter_metadata` (PEFT configurations
as one JSON object, keys prefixed by component); without it alpha is the rank. Old:
`unet.<attention>.processor.to_q_lora.down.weight`, `text_encoder.<module>.lora_linear_layer.down.weight`;
between the two: `unet.<module>.lora.down.weight`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compose.formats.peft import PAIRS, parse, scaler
from compose.formats.sketch import Shapes, Sketch, pair

_OLD_PAIRS = [
    (rf"(?P<module>.+){lora}\.down\.weight", rf"(?P<module>.+){lora}\.up\.weight")
    for lora in (r"\.lora_linear_layer", r"\.lora", "_lora")
]
_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.", "transformer.")


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when no tensor is named this way."""
    del adapter_config
    if any(re.fullmatch(PAIRS[0][0], key) for key in shapes):
        return _new(shapes, metadata)
    if any(re.fullmatch(down, key) for key in shapes for down, _ in _OLD_PAIRS):
        return _old(shapes)
    return None


def _component(spelling: str) -> str:
    # Single-model files (UNet2DConditionModel.save_lora_adapter) carry no component.
    return spelling if spelling.startswith(_COMPONENTS) else f"unet.{spelling}"


def _new(shapes: Shapes, metadata: Mapping[str, str]) -> Sketch:
    entries, leftovers = pair(shapes, PAIRS)
    entries = [replace(entry, spelling=_component(entry.spelling)) for entry in entries]
    if text := metadata.get("lora_adapter_metadata"):
        told = parse(text, "lora_adapter_metadata")
        components = {entry.spelling.split(".", 1)[0] for entry in entries}
        scales = {component: scaler(_configuration(told, component)) for component in components}
        for index, entry in enumerate(entries):
            component, path = entry.spelling.split(".", 1)
            entries[index] = scales[component](entry, path)
    return Sketch("diffusers", tuple(entries), leftovers, hints=_hints(metadata))


def _configuration(told: Mapping[str, Any], component: str) -> Mapping[str, Any]:
    """A component's part; all of it where none is named, as ModelMixin.save_lora_adapter writes it."""
    if not any(key.startswith(_COMPONENTS) for key in told):
        return told
    return {k.removeprefix(f"{component}."): v for k, v in told.items() if k.startswith(f"{component}.")}


def _old(shapes: Shapes) -> Sketch:
    entries, leftovers = pair(shapes, _OLD_PAIRS)
    named = [
        replace(entry, spelling=_component(entry.spelling.replace(".processor.", "."))) for entry in entries
    ]
    return Sketch("diffusers-old", tuple(named), leftovers)


def _hints(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: metadata[key] for key in ("modelspec.architecture",) if key in metadata}
