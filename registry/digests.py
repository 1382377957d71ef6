"""What makes two files the same, computed by us: headers carry hashes too, and they lie (one trainer wrote
the same `sshs_model_hash` into every file).

The file's sha256 is its identity in the store. The two digests here say what a header hides: `body` is over
the bytes after the header (kohya's `sshs_model_hash`, when honest), `tensors` over the tensors alone,
whatever their order in the file: over sorted (name, dtype, shape, sha256 of the tensor's bytes).
"""

import hashlib
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from registry.headers import HEADER_LIMIT, Header

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Digests:
    """`sha256:<hex>` each, or "" for versions made before digests were kept."""

    body: str = ""
    tensors: str = ""


NO_DIGESTS = Digests()


class DigestStream:
    """Both digests of a file that goes by in pieces, so that it need not be read again.

    It believes the file's own header, unchecked; `finish` is for a file that has passed the gate since.
    """

    def __init__(self) -> None:
        self._head: bytearray | None = bytearray()
        self._left: deque[tuple[str, int]] = deque()
        self._body, self._tensor = hashlib.sha256(), hashlib.sha256()
        self._found: dict[str, str] = {}

    def update(self, data: bytes) -> None:
        """The next bytes of the file."""
        view = memoryview(data)
        if self._head is not None:
            self._head += data
            size = 8 + int.from_bytes(self._head[:8], "little")
            if len(self._head) < min(size, 8 + HEADER_LIMIT):
                return
            self._left = _sizes(bytes(self._head[8:size]))
            view, self._head = memoryview(bytes(self._head[size:])), None
        self._body.update(view)
        while self._left and len(view) >= self._left[0][1]:
            name, size = self._left.popleft()
            self._tensor.update(view[:size])
            self._found[name] = self._tensor.hexdigest()
            view, self._tensor = view[size:], hashlib.sha256()
        if self._left:
            self._tensor.update(view)
            self._left[0] = (self._left[0][0], self._left[0][1] - len(view))

    def finish(self, header: Header) -> Digests:
        """The digests, once the whole file went by."""
        parts = [[name, t.dtype, t.shape, self._found[name]] for name, t in header.tensors.items()]
        tensors = hashlib.sha256(json.dumps(sorted(parts)).encode())
        return Digests(f"sha256:{self._body.hexdigest()}", f"sha256:{tensors.hexdigest()}")


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
    """Those of a file that is there. Reads it once."""
    stream = DigestStream()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            stream.update(data)
    return stream.finish(header)
