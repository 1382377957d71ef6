"""cloneofsimo/lora, the first of them: `unet:<n>:up`, `unet:<n>:down`, `text_encoder:<n>:…`, and no alpha.

Layers are counted, not named: see `sketch.spellings`.
"""

from collections.abc import Mapping

from compose.formats.sketch import Shapes, Sketch, pair


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when no tensor is named this way."""
    del metadata, adapter_config
    if "unet:0:up" not in shapes and "text_encoder:0:up" not in shapes:
        return None
    module = r"(?P<module>(unet|text_encoder):\d+)"
    entries, leftovers = pair(shapes, [(rf"{module}:down", rf"{module}:up")])
    return Sketch("lora_diffusion", tuple(entries), leftovers)
