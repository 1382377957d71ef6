"""kohya sd-scripts: `lora_unet_down_blocks_0_…_to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Module paths are flattened with `_`; the update is alpha / rank * up @ down, and without an alpha it is up @
down.
"""

from collections.abc import Mapping

from compose.formats.sketch import Shapes, Sketch, pair

_HINTS = ("modelspec.architecture", "ss_base_model_version")


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when no tensor is named this way."""
    del adapter_config
    if not any(key.endswith(".lora_down.weight") for key in shapes):
        return None
    entries, leftovers = pair(
        shapes, [(r"(?P<module>.+)\.lora_down\.weight", r"(?P<module>.+)\.lora_up\.weight")]
    )
    hints = {key: metadata[key] for key in _HINTS if key in metadata}
    return Sketch("kohya", tuple(entries), leftovers, hints=hints)
