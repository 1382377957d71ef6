"""Whether the layers of a file are scaled alike: where they are not, diffusers gives layers the alphas of
others (measured on 0.42: factors of 2 and 0.67), so who publishes such a file is told.

kohya's layouts have a scalar `<layer>.alpha` a layer, and `<layer>.lora_down.weight` of `[rank, …]`.
"""

import struct
from pathlib import Path

from registry.headers import TensorInfo, read_header

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


def mixed(path: Path) -> bool:
    """Whether alpha / rank differs between layers. Raises InvalidFile."""
    header, scales = read_header(path), set[float]()
    with path.open("rb") as file:
        for name, info in header.tensors.items():
            down = header.tensors.get(f"{name.removesuffix('.alpha')}.lora_down.weight")
            if name.endswith(".alpha") and down and down.shape and down.shape[0]:
                file.seek(header.data_offset + info.start)
                scales.add(round(_number(file.read(info.stop - info.start), info) / down.shape[0], 4))
    return len(scales) > 1


def _number(data: bytes, info: TensorInfo) -> float:
    """A scalar; 0 for what is none."""
    if info.dtype == "BF16" and len(data) == 2:
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    layout = _FORMATS.get(info.dtype, "")
    return float(struct.unpack(layout, data)[0]) if layout and struct.calcsize(layout) == len(data) else 0.0
