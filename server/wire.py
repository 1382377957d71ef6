"""The messages of a check-in as gRPC hands them over: a chunk is looked at where it lies. protobuf would copy
it into a message and again out of that, a tenth of what an upload costs.
"""

from collections.abc import Awaitable, Callable

import grpc

from atelier.v1 import catalog_pb2

CHECK_IN = "/atelier.v1.CatalogService/CheckIn"
Part = catalog_pb2.CheckInRequest | memoryview
"""A message of a check-in, or the bytes of a chunk."""
_CHUNK = bytes([catalog_pb2.CheckInRequest.CHUNK_FIELD_NUMBER << 3 | 2])
"""How a field of bytes begins: its number, and that a length follows."""


class Chunks(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Has CheckIn read its messages with `part`."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler."""
        handler = await continuation(details)
        if handler is None or details.method != CHECK_IN:
            return handler
        return grpc.stream_unary_rpc_method_handler(handler.stream_unary, part, handler.response_serializer)


def part(data: bytes) -> Part:
    """What a message says. Raises DecodeError."""
    if data.startswith(_CHUNK):
        size = 0
        for place, byte in enumerate(data[1:6]):  # the length, seven bits a byte, the lowest first
            size |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                start = place + 2
                if start + size == len(data):
                    return memoryview(data)[start:]
                break
    message = catalog_pb2.CheckInRequest.FromString(data)
    return memoryview(message.chunk) if message.WhichOneof("part") == "chunk" else message
