"""The header gate, against what safetensors writes and against what nobody should."""

import io
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from registry.errors import InvalidFile
from registry.headers import read_header


def file_with(tmp_path: Path, header: bytes, body: bytes = b"", length: int | None = None) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)
    return path


def one_tensor(**changes: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


def test_a_file_written_by_safetensors_passes_with_its_shapes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.float16)}, path, metadata={"k": "v"})
    header = read_header(path)
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", ()),
    }
    assert header.metadata == {"k": "v"}


@pytest.mark.parametrize(
    ("header", "body", "complaint"),
    [
        (one_tensor(), b"\0" * 7, "cut short"),
        (one_tensor(), b"\0" * 9, "padded"),
        (one_tensor(dtype="BOOL"), b"\0" * 8, "dtype"),
        (one_tensor(shape=[3]), b"\0" * 8, "do not make"),
        (one_tensor(shape=[-2]), b"\0" * 8, "whole numbers"),
        (one_tensor(shape=[True, 2]), b"\0" * 8, "whole numbers"),
        (one_tensor(data_offsets=[8, 16]), b"\0" * 16, "hole"),
        (one_tensor(extra=1), b"\0" * 8, "expected dtype"),
        (one_tensor().replace(b'"a"', b'"a\\u0000"'), b"\0" * 8, "printable"),
        (b'{"a":{},"a":{}}', b"", "twice"),
        (b"{}", b"", "no tensors"),
        (b"[]", b"", "start with"),
        (b"{" + b'"a":[' * 5000, b"", "JSON"),
        (b"{\xff}", b"", "JSON"),
        (b'{"__metadata__":{"a":1}}', b"", "strings to strings"),
        (b'{"__metadata__":{"a":"b"}}', b"", "no tensors"),
        (b'{"__metadata__":"a"}', b"", "strings to strings"),
        (one_tensor(dtype=3), b"\0" * 8, "dtype"),
        (one_tensor(dtype=None), b"\0" * 8, "dtype"),
        (one_tensor(shape="2"), b"\0" * 8, "whole numbers"),
        (one_tensor(shape=[2.0]), b"\0" * 8, "whole numbers"),
        (one_tensor(shape=[1 << 64]), b"\0" * 8, "do not make|whole numbers"),
        (one_tensor(shape=[1] * 100), b"\0" * 8, "do not make|whole numbers|dimensions"),
        (
            one_tensor(data_offsets=[8, 0]),
            b"\0" * 8,
            "data_offsets|whole numbers|hole|name|printable|characters|cut short|JSON|expected|do not make",
        ),
        (
            one_tensor(data_offsets=[-8, 0]),
            b"\0" * 8,
            "data_offsets|whole numbers|hole|name|printable|characters|cut short|JSON|expected",
        ),
        (
            one_tensor(data_offsets=[0]),
            b"\0" * 8,
            "data_offsets|whole numbers|hole|name|printable|characters|cut short|JSON|expected",
        ),
        (
            one_tensor(data_offsets=[0, 1 << 70]),
            b"\0" * 8,
            "data_offsets|whole numbers|hole|name|printable|characters|cut short|JSON|expected",
        ),
        (
            one_tensor(data_offsets="08"),
            b"\0" * 8,
            "data_offsets|whole numbers|hole|name|printable|characters|cut short|JSON|expected",
        ),
        (b'{"a":3}', b"", "expected dtype"),
        (b'{"a":null}', b"", "expected dtype"),
        (
            b'{"":' + one_tensor()[5:],
            b"\0" * 8,
            "data_offsets|whole numbers|hole|name|printable|characters|cut short|JSON|expected",
        ),
        (b'{"' + b"a" * 300 + one_tensor()[3:], b"\0" * 8, "characters|printable"),
        (b"{" + b" " * 100, b"", "JSON"),
        (b'{"a":NaN}', b"", "expected|JSON"),
    ],
)
def test_header_gate(tmp_path: Path, header: bytes, body: bytes, complaint: str) -> None:
    with pytest.raises(InvalidFile, match=complaint):
        read_header(file_with(tmp_path, header, body))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200 << 20])
def test_header_length_lie(tmp_path: Path, length: int) -> None:
    with pytest.raises(InvalidFile, match="claims"):
        read_header(file_with(tmp_path, one_tensor(), b"\0" * 8, length=length))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_refused_under_any_name(tmp_path: Path, zipped: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "hero.safetensors"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InvalidFile, match="pickle"):
        read_header(path)


@pytest.mark.parametrize("text", ["", "abc", "not a safetensors file at all\n" * 20])
def test_a_text_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text(text)
    with pytest.raises(InvalidFile):
        read_header(path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    save_file({"emb_params": torch.zeros(1, 4)}, path, metadata={"note": ""})
    (short,) = struct.unpack("<Q", path.read_bytes()[:8])
    save_file({"emb_params": torch.zeros(1, 4)}, path, metadata={"note": "x" * (length - short)})
    assert path.read_bytes()[0] == 0x80
    assert read_header(path).tensors["emb_params"].shape == (1, 4)
