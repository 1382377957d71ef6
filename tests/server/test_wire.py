"""Chunks on the wire, written and read without protobuf's copies: the same bytes, the same meaning."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from atelier.messages import on_the_wire
from atelier.v1 import catalog_pb2
from server.wire import part


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, (1 << 21) - 1, 1 << 21])
def test_a_chunk_is_written_as_protobuf_does_and_read_where_it_lies(size: int) -> None:
    chunk = bytes(range(256)) * (size // 256) + bytes(size % 256)
    data = on_the_wire(chunk)
    assert data == catalog_pb2.CheckInRequest(chunk=chunk).SerializeToString()
    found = part(data)
    assert isinstance(found, memoryview)
    assert found.obj is data
    assert found == chunk


@pytest.mark.parametrize("message", [{"header": {"name": "a"}}, {"digest": "sha256:0"}, {}])
def test_other_messages_are_protobufs(message: dict[str, object]) -> None:
    told = catalog_pb2.CheckInRequest(**message)  # type: ignore[arg-type]
    assert part(on_the_wire(told)) == told


@given(st.binary(max_size=12).map(lambda rest: b"\x12" + rest) | st.binary(max_size=12))
def test_whatever_comes_means_what_protobuf_says(data: bytes) -> None:
    try:
        told = catalog_pb2.CheckInRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            part(data)
        return
    found = part(data)
    if told.WhichOneof("part") == "chunk":
        assert isinstance(found, memoryview)
        assert found == told.chunk
    else:
        assert found == told
