"""cloneofsimo/lora, the first of them: `unet:<n>:up`, `unet:<n>:down`, `text_encoder:<n>:…`, and no alpha.

Layers are counted, not named: see `compose.formats.naming`. Words trained along are tensors under their own
name, which the metadata marks `<embed>`.
"""

from collections.abc import Mapping

from compose.formats.gather import gather
from compose.formats.sketch import Shapes, Sketch


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when no tensor is named this way."""
    del metadata, adapter_config
    if "unet:0:up" not in shapes and "text_encoder:0:up" not in shapes:
        return None
    entries, leftovers = gather(shapes)
    return Sketch("lora_diffusion", tuple(entries), leftovers)
