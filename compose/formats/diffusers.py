"""diffusers, new and old.

New: `unet.<module>.lora_A.weight`, with alphas in the header's `lora_adapter_metadata` (PEFT configurations
as one JSON object, keys prefixed by component); without it alpha is the rank. ai-toolkit and ComfyUI write
the same with `diffusion_model.` and the first code's names, and `.alpha` tensors. Old:
`unet.<attention>.processor.to_q_lora.down.weight`, `text_encoder.<module>.lora_linear_layer.down.weight`;
between the two: `unet.<module>.lora.down.weight`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compose.formats.gather import gather
from compose.formats.peft import parse, scaler
from compose.formats.sketch import Entry, Shapes, Sketch

_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer.")
_OLD = ("_lora.down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when no tensor is named this way."""
    del adapter_config
    new = any(".lora_A." in key for key in shapes)
    if not new and not any(key.endswith(_OLD) for key in shapes):
        return None
    entries, leftovers = gather(shapes)
    hints = {key: metadata[key] for key in ("modelspec.architecture",) if key in metadata}
    return Sketch("diffusers" if new else "diffusers-old", scaled(entries, metadata), leftovers, hints=hints)


def scaled(entries: Iterable[Entry], metadata: Mapping[str, str]) -> tuple[Entry, ...]:
    """The entries, those in PEFT's form with the scale that `lora_adapter_metadata` gives. Raises
    UnsupportedLayout.
    """
    found = list(entries)
    if text := metadata.get("lora_adapter_metadata"):
        told = parse(text, "lora_adapter_metadata")
        scales: dict[str, Callable[[Entry, str], Entry]] = {}
        for index, entry in enumerate(found):
            if ".lora_A." in entry.tensors.get("down", ""):  # an alpha tensor comes before this scale
                component = next((c for c in _COMPONENTS if entry.spelling.startswith(c)), "")
                if component not in scales:
                    scales[component] = scaler(_configuration(told, component))
                found[index] = scales[component](entry, entry.spelling.removeprefix(component))
    return tuple(found)


def _configuration(told: Mapping[str, Any], component: str) -> Mapping[str, Any]:
    """A component's part; all of it where none is named, as ModelMixin.save_lora_adapter writes it."""
    if not any(key.startswith(_COMPONENTS) for key in told):
        return told
    if not component:  # a bare module is the denoiser's
        component = "transformer." if any(key.startswith("transformer.") for key in told) else "unet."
    return {key.removeprefix(component): told[key] for key in told if key.startswith(component)}
