"""Stability's generative-models (CompVis' before it): `input_blocks.4.1.…`, what kohya writes for SDXL.

With n resnets a block, block B's resnet L is

    down: input_blocks.(1 + B (n + 1) + L)     .0 resnet  .1 attention, the downsampler the last, .0.op
    mid:  middle_block                         .0 resnet  .1 attention  .2 resnet
    up:   output_blocks.(B (n + 1) + L)        .0 resnet  .1 attention, the upsampler behind the last, .conv

(up blocks have a resnet more). `_maybe_map_sgm_blocks_to_diffusers` of diffusers goes the same way back,
except that it drops these names where a file has both kinds.
"""

import re
from collections.abc import Iterator

from compose.families import Table
from compose.formats.naming.parts import Part

_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def paths(layers: Table) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """(sgm's path, the layer) for every layer of a UNet."""
    names = {name.removeprefix("unet."): name for name in layers}
    downs = len({path.split(".")[3] for path in names if path.startswith("down_blocks.0.resnets.")})
    attended = {path.split(".")[1] for path in names if re.match(r"up_blocks\.\d+\.attentions\.", path)}
    for path, name in names.items():
        if spelled := _path(path, downs, attended):
            yield spelled, (Part(name),)


def _path(path: str, downs: int, attended: set[str]) -> str:
    if path in _OUTER:
        return _OUTER[path]
    if middle := re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", path):
        return f"middle_block.{_MIDDLE[middle[1]]}.{_RESNET.get(middle[2], middle[2])}"
    found = _BLOCK.fullmatch(path)
    if not found:
        return ""
    kind, rest = found["kind"], _RESNET.get(found["rest"], found["rest"])
    block, layer = int(found["block"]), int(found["layer"])
    if found["side"] == "down":
        last = kind == "downsamplers"
        stage = 1 + block * (downs + 1) + (downs if last else layer)
        return f"input_blocks.{stage}.0.op" if last else f"input_blocks.{stage}.{kind != 'resnets':d}.{rest}"
    last = kind == "upsamplers"
    stage = block * (downs + 1) + (downs if last else layer)
    inner = 1 + (found["block"] in attended) if last else int(kind != "resnets")
    return f"output_blocks.{stage}.{inner}.{rest}"
