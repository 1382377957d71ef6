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
    `body` and `tensors` each take every piece, in order; they share nothing, and may do so on two threads.
    """

    def __init__(self) -> None:
        self._body, self._tensors = _Body(), _Tensors()
        self.body, self.tensors = self._body.update, self._tensors.update

    def update(self, data: bytes) -> None:
        """The next bytes of the file, for both."""
        self.body(data)
        self.tensors(data)

    def finish(self, header: Header) -> Digests:
        """The digests, once the whole file went by."""
        found = self._tensors.found
        parts = [[name, t.dtype, t.shape, found[name]] for name, t in header.tensors.items()]
        tensors = hashlib.sha256(json.dumps(sorted(parts)).encode())
        return Digests(f"sha256:{self._body.hash.hexdigest()}", f"sha256:{tensors.hexdigest()}")


class _Body:
    """What comes after the header."""

    def __init__(self) -> None:
        self._head: bytearray | None = bytearray()
        self.hash = hashlib.sha256()

    def update(self, data: bytes) -> None:
        """The next bytes of the file."""
        if self._head is None:
            self._after(memoryview(data))
            return
        self._head += data
        size = 8 + int.from_bytes(self._head[:8], "little")
        if len(self._head) >= min(size, 8 + HEADER_LIMIT):
            head, self._head = bytes(self._head), None
            self._begin(head[8:size])
            self._after(memoryview(head)[size:])

    def _begin(self, text: bytes) -> None:
        """The header's text is there."""

    def _after(self, view: memoryview) -> None:
        self.hash.update(view)


class _Tensors(_Body):
    """The tensors one by one: `found` has the digest of each that went by."""

    def __init__(self) -> None:
        super().__init__()
        self._left: deque[tuple[str, int]] = deque()
        self.found: dict[str, str] = {}

    def _begin(self, text: bytes) -> None:
        self._left = _sizes(text)

    def _after(self, view: memoryview) -> None:
        while self._left and len(view) >= self._left[0][1]:
            name, size = self._left.popleft()
            self.hash.update(view[:size])
            self.found[name] = self.hash.hexdigest()
            view, self.hash = view[size:], hashlib.sha256()
        if self._left:
            self.hash.update(view)
            self._left[0] = (self._left[0][0], self._left[0][1] - len(view))


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
