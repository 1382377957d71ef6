"""What makes two files the same, computed by us: headers carry hashes too, and they lie (one trainer wrote
the same `sshs_model_hash` into every file).

The file's sha256 is its identity in the store. The two digests here say what a header hides: `body` is over
the bytes after the header (kohya's `sshs_model_hash`, when honest), `tensors` over the tensors alone,
whatever their order in the file.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from registry.headers import Header

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Digests:
    """`sha256:<hex>` each, or "" for versions made before digests were kept."""

    body: str = ""
    tensors: str = ""


NO_DIGESTS = Digests()


def digests(path: Path, header: Header) -> Digests:
    """Reads the file once. `tensors` is over sorted (name, dtype, shape, sha256 of the tensor's bytes)."""
    body, parts = hashlib.sha256(), []
    with path.open("rb") as file:
        file.seek(header.data_offset)
        for name, info in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            tensor, left = hashlib.sha256(), info.stop - info.start
            while left and (chunk := file.read(min(CHUNK, left))):
                body.update(chunk)
                tensor.update(chunk)
                left -= len(chunk)
            parts.append([name, info.dtype, info.shape, tensor.hexdigest()])
    tensors = hashlib.sha256(json.dumps(sorted(parts)).encode())
    return Digests(f"sha256:{body.hexdigest()}", f"sha256:{tensors.hexdigest()}")
