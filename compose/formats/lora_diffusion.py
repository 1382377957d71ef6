"""cloneofsimo/lora, the first of them: `unet:<n>:up`, `unet:<n>:down`, `text_encoder:<n>:…`, and no alpha.

Layers are counted, not named: see `compose.formats.naming`. With `--use_extended_lora` the resnets count too,
whose convolutions tell. Words trained along are tensors under their own name, which the metadata marks
`<embed>`.
"""

from collections.abc import Mapping
from dataclasses import replace

from compose.formats.gather import gather
from compose.formats.naming import EXTENDED
from compose.formats.sketch import Shapes, Sketch


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when no tensor is named this way."""
    del metadata, adapter_config
    if "unet:0:up" not in shapes and "text_encoder:0:up" not in shapes:
        return None
    entries, leftovers = gather(shapes)
    if any(key.startswith("unet:") and len(shape) == 4 for key, shape in shapes.items()):
        entries = [
            replace(entry, spelling=entry.spelling.replace("unet:", f"{EXTENDED}:")) for entry in entries
        ]
    return Sketch("lora_diffusion", tuple(entries), leftovers)
