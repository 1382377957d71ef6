"""Digests of a file that goes by in pieces, however it is cut."""

import json
import random
import struct
from pathlib import Path

import pytest

from registry.digests import CHUNK, DigestStream, digests
from registry.headers import HEADER_LIMIT, read_header


def file_of(path: Path, *, padding: int = 0) -> Path:
    entries, start = {}, 0
    for name, size in {"empty": 0, "b": 8, "a": 400, "none": 0, "c": 4, "last": 0}.items():
        entries[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps({"__metadata__": {"k": "v"}, **entries}).encode()
    text += b" " * (padding - len(text))
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(256)) * (start // 256 + 1))
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + start)
    return path


@pytest.mark.parametrize("seed", range(200))
def test_pieces_of_any_size_give_the_same_digests(tmp_path: Path, seed: int) -> None:
    path, rng, stream = file_of(tmp_path / "x"), random.Random(seed), DigestStream()
    data, header = path.read_bytes(), read_header(path)
    while data:
        size = rng.choice((1, 3, 8, 50, 400, 5000))
        stream.update(data[:size])
        data = data[size:]
    found = stream.finish(header)
    assert found == digests(path, header)
    assert found.tensors.startswith("sha256:")


@pytest.mark.parametrize("length", [HEADER_LIMIT - 8, HEADER_LIMIT - 7, HEADER_LIMIT - 1, HEADER_LIMIT])
def test_the_longest_headers_change_no_digest(tmp_path: Path, length: int) -> None:
    short, long = file_of(tmp_path / "short"), file_of(tmp_path / "long", padding=length)
    stream = DigestStream()
    with long.open("rb") as file:
        while data := file.read(CHUNK):
            stream.update(data)
    assert stream.finish(read_header(long)) == digests(short, read_header(short))


@pytest.mark.parametrize(
    "offsets", ["[0,4.0]", "[0]", '"04"', "{}", "null", "[0,true]", "[8,4]", "[0,1e400]"]
)
def test_headers_that_the_gate_will_refuse_harm_nothing(offsets: str) -> None:
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":' + offsets.encode() + b"}}"
    DigestStream().update(struct.pack("<Q", len(text)) + text + b"1234")
