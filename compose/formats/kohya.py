"""kohya sd-scripts, LyCORIS, OneTrainer: `lora_unet_down_blocks_0_…_to_q.lora_down.weight`,
`.lora_up.weight`, `.alpha`; LyCORIS adds `.lora_mid.weight`, `.hada_…`, `.lokr_…` and `.dora_scale`; XLabs
writes `double_blocks.0.processor.qkv_lora1.down.weight`.

The update is alpha / rank times what the tensors make, and without an alpha 1 times. LyCORIS' own
`get_merged_weight` multiplies LoHa and LoKr by that scale twice; its forward pass, which trained them, once.
"""

import re
from collections.abc import Mapping

from compose.formats.diffusers import scaled
from compose.formats.gather import gather, unwrapped
from compose.formats.sketch import HINTS, Shapes, Sketch

_TELLS = (
    (re.compile(r"\.(hada_w1_|lokr_w1)"), "lycoris"),
    (re.compile(r"\.lora_down\.weight$", re.MULTILINE), "kohya"),
    (re.compile(r"(_lora\d|_blocks\.\d+\.processor\.\w+_lora)\.down\.weight$", re.MULTILINE), "xlabs"),
)
"""Searched for in all names of a file, a line each: no name holds a line break."""


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when no tensor is named this way, or PEFT has named one."""
    del adapter_config
    if any(unwrapped(key).startswith("base_model.model.") for key in shapes):
        return None
    names = "\n".join(shapes)
    layout = next((name for tell, name in _TELLS if tell.search(names)), "")
    if not layout:
        return None
    entries, leftovers = gather(shapes)
    hints = {key: metadata[key] for key in HINTS if key in metadata}
    return Sketch(layout, scaled(entries, metadata), leftovers, hints=hints)
