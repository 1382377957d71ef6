"""What makes two files the same, computed by us: headers carry hashes too, and they lie (one trainer wrote
the same `sshs_model_hash` into every file).

The file's sha256 is its identity in the store. Two digests say what a header hides: `tensors` is over the
tensors alone, whatever their order in the file, over sorted (name, dtype, shape, sha256 of the tensor's
bytes); `body` over the bytes after the header (`registry.bodies`). `sample` is over (name, dtype, shape, the
first SAMPLE bytes), so that files without the same tensors are told apart before all of them is hashed.
"""

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from registry.headers import HEADER_LIMIT, Header
from registry.intake import Bytes

CHUNK, SAMPLE = 1 << 20, 64


@dataclass(frozen=True, slots=True)
class Digests:
    """`sha256:<hex>` each, or "" for one that is not known yet."""

    body: str = ""
    tensors: str = ""
    sample: str = ""


NO_DIGESTS = Digests()


class DigestStream:
    """The tensors' digest, and the sample's, of a file that goes by in pieces, so that it need not be read
    again; the sample's alone when it is not `whole`.

    It believes the file's own header, unchecked; `finish` is for a file that has passed the gate since.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._head: bytearray | None = bytearray()
        self._left: deque[tuple[str, int]] = deque()
        self._whole, self._hash, self._first = whole, hashlib.sha256(), b""
        self._found: dict[str, str] = {}
        self._samples: dict[str, str] = {}

    def update(self, data: Bytes) -> None:
        """The next bytes of the file."""
        if self._head is None:
            self._after(memoryview(data))
            return
        self._head += data
        size = 8 + int.from_bytes(self._head[:8], "little")
        if len(self._head) >= min(size, 8 + HEADER_LIMIT):
            head, self._head = bytes(self._head), None
            self._left = _sizes(head[8:size])
            self._after(memoryview(head)[size:])

    def finish(self, header: Header) -> Digests:
        """What is known once the whole file went by."""
        return Digests(
            tensors=_over(header, self._found) if self._whole else "", sample=_over(header, self._samples)
        )

    def _after(self, view: memoryview) -> None:
        while self._left and len(view) >= self._left[0][1]:
            name, size = self._left.popleft()
            self._take(view[:size])
            self._found[name], self._samples[name] = self._hash.hexdigest(), self._first.hex()
            view, self._hash, self._first = view[size:], hashlib.sha256(), b""
        if self._left:
            self._take(view)
            self._left[0] = (self._left[0][0], self._left[0][1] - len(view))

    def _take(self, view: memoryview) -> None:
        self._first += view[: SAMPLE - len(self._first)]
        if self._whole:
            self._hash.update(view)


def _over(header: Header, found: Mapping[str, str]) -> str:
    parts = sorted([name, t.dtype, t.shape, found[name]] for name, t in header.tensors.items())
    return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


def _sizes(text: bytes) -> deque[tuple[str, int]]:
    """Names and sizes in the order of the file; empty for a header that the gate will refuse."""
    try:
        found = {
            name: entry["data_offsets"] for name, entry in json.loads(text).items() if name != "__metadata__"
        }
        if not all(type(n) is int for offsets in found.values() for n in offsets):
            return deque()
        return deque(
            (name, stop - start) for name, (start, stop) in sorted(found.items(), key=lambda f: f[1])
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return deque()


def digests(path: Path, header: Header) -> Digests:
    """What is known of a file that is there once it was read."""
    stream = DigestStream()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            stream.update(data)
    return stream.finish(header)
