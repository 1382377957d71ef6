"""The header gate: a safetensors header read and checked before a byte of any tensor is.

On disk: u64 little-endian length N, N bytes of JSON (`{"name": {"dtype", "shape", "data_offsets"},
"__metadata__": {...}}`), then the tensors' bytes. safetensors' own parser lets duplicate keys, 100,000 empty
tensors and control characters in names pass; a catalog must not. Invariant: a `Header` describes every byte
of its file, once, and nothing in it was unpickled.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from registry.errors import InvalidFile

HEADER_LIMIT = 8 << 20  # kohya's ss_tag_frequency reaches megabytes in published files
TENSOR_LIMIT = 20_000
NAME_LIMIT = 256
_FIELDS = {"dtype", "shape", "data_offsets"}
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,  # some trainers store alpha as an integer
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor; `start` and `stop` count from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `data_offset` is where the tensors' bytes begin in the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int


def read_header(path: Path) -> Header:
    """The checked header of a file. Raises InvalidFile with the first thing wrong in it."""
    with path.open("rb") as file:
        return header_of(file, path.stat().st_size)


def header_of(file: BinaryIO, size: int) -> Header:
    """The same of a file of `size` bytes, of which no more than the header need be there."""
    start = file.read(9)
    _refuse_pickles(start, size)
    if len(start) < 9:
        raise InvalidFile(f"the file has {size} bytes, too few to be safetensors")
    (length,) = struct.unpack("<Q", start[:8])
    if length > size - 8:
        raise InvalidFile(
            f"not safetensors, or cut short: the header claims {length} bytes and the file has {size}"
        )
    if length > HEADER_LIMIT:
        raise InvalidFile(f"the header has {length} bytes, the limit is {HEADER_LIMIT}; strip its metadata")
    text = start[8:] + file.read(length - 1) if length else b""
    if not text.startswith(b"{"):
        raise InvalidFile("not a safetensors file: the header does not start with '{'")
    entries = _parse(text)
    metadata = _metadata(entries.pop("__metadata__", {}))
    if len(entries) > TENSOR_LIMIT:
        raise InvalidFile(f"{len(entries)} tensors, the limit is {TENSOR_LIMIT}")
    if not entries:
        raise InvalidFile("the file holds no tensors")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_extent(tensors.items(), size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def _refuse_pickles(start: bytes, size: int) -> None:
    # By content, never by extension: zip is torch's format since 1.6, 0x80 the pickle opcode before it. A
    # header of
    # 640 bytes begins with 0x80 0x02 too, but then its length fits the file and a brace follows.
    if len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8:
        return
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        raise InvalidFile(
            "this is a torch pickle, which can run code when opened, so it was not read; "
            "`atelier convert FILE -o NEW.safetensors` makes a safe file of it; check that in"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise InvalidFile(f"the header names {key[:NAME_LIMIT]!r} twice")
        seen[key] = value
    return seen


def _parse(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise InvalidFile(f"the header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise InvalidFile("the header is not a JSON object")
    return entries


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InvalidFile("__metadata__ must map strings to strings")
    return value


def _are_whole(values: object) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _tensor(name: str, entry: object) -> TensorInfo:
    if not 0 < len(name) <= NAME_LIMIT or not name.isprintable():
        raise InvalidFile(
            f"tensor name {name[:40]!r} is empty, not printable, or longer than {NAME_LIMIT} characters"
        )
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise InvalidFile(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InvalidFile(f"tensor {name!r} has dtype {str(dtype)[:40]!r}; accepted: {', '.join(ITEM_BYTES)}")
    if not _are_whole(shape) or len(shape) > 8:
        raise InvalidFile(f"tensor {name!r}: shape must be at most 8 whole numbers")
    if not _are_whole(offsets) or len(offsets) != 2:
        raise InvalidFile(f"tensor {name!r}: data_offsets must be two whole numbers")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise InvalidFile(f"tensor {name!r}: {stop - start} bytes do not make {dtype} {shape}")
    return TensorInfo(dtype, tuple(shape), start, stop)


def _check_extent(tensors: Iterable[tuple[str, TensorInfo]], size: int) -> None:
    end = 0
    for name, info in sorted(tensors, key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise InvalidFile(
                f"tensor {name!r} starts at byte {info.start}, expected {end}: a hole or an overlap"
            )
        end = info.stop
    if end != size:
        raise InvalidFile(f"the tensors end at byte {end} and the file's data at {size}: cut short or padded")
