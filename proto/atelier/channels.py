"""How a server and its services are reached: `HOST:PORT` in clear, `grpcs://HOST:PORT` encrypted.

An encrypted server has to show a certificate that this machine trusts; ATELIER_CA names a PEM file of
authorities to trust in place of its usual ones.
"""

import os
from pathlib import Path
from typing import Any

import grpc

from atelier.messages import OPTIONS, AtelierError, on_the_wire
from atelier.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    compose_pb2_grpc,
    engine_pb2_grpc,
    hub_pb2_grpc,
    jobs_pb2_grpc,
    render_pb2_grpc,
    sweep_pb2_grpc,
)

SECURE = "grpcs://"
CHECK_IN = "/atelier.v1.CatalogService/CheckIn"


def channel(address: str) -> grpc.Channel:
    """A connection of the blocking client. Raises AtelierError."""
    if credentials := _credentials(address):
        return grpc.secure_channel(address.removeprefix(SECURE), credentials, options=OPTIONS)
    return grpc.insecure_channel(address, options=OPTIONS)


def aio_channel(address: str) -> grpc.aio.Channel:
    """A connection of the asynchronous client. Raises AtelierError."""
    if credentials := _credentials(address):
        return grpc.aio.secure_channel(address.removeprefix(SECURE), credentials, options=OPTIONS)
    return grpc.aio.insecure_channel(address, options=OPTIONS)


def stubs(connection: grpc.Channel | grpc.aio.Channel) -> dict[str, Any]:
    """What calls each service, by its name in `calls.Unary`."""
    return {
        "catalog": _catalog(connection),
        "compose": compose_pb2_grpc.ComposeServiceStub(connection),
        "engine": engine_pb2_grpc.EngineServiceStub(connection),
        "hub": hub_pb2_grpc.HubServiceStub(connection),
        "jobs": jobs_pb2_grpc.JobServiceStub(connection),
        "render": render_pb2_grpc.RenderServiceStub(connection),
        "sweeps": sweep_pb2_grpc.SweepServiceStub(connection),
    }


def _catalog(connection: grpc.Channel | grpc.aio.Channel) -> catalog_pb2_grpc.CatalogServiceStub:
    """The stub, but for how a check-in's chunks are written."""
    stub = catalog_pb2_grpc.CatalogServiceStub(connection)
    stub.CheckIn = connection.stream_unary(
        CHECK_IN,
        request_serializer=on_the_wire,
        response_deserializer=catalog_pb2.CheckInResponse.FromString,
    )
    return stub


def _credentials(address: str) -> grpc.ChannelCredentials | None:
    if not address.startswith(SECURE):
        if address.startswith(("http://", "https://", "grpc://")):
            raise AtelierError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{address} is no server's address: write HOST:PORT, or {SECURE}HOST:PORT for one with TLS",
            )
        return None
    authorities = os.environ.get("ATELIER_CA", "")
    try:
        return grpc.ssl_channel_credentials(Path(authorities).read_bytes() if authorities else None)
    except OSError as error:
        raise AtelierError(
            grpc.StatusCode.INVALID_ARGUMENT, f"ATELIER_CA={authorities} cannot be read: {error.strerror}"
        ) from None
