"""CatalogService: the catalog over gRPC. Disk work runs on threads, never on the loop."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Literal

import grpc

from atelier.v1 import catalog_pb2, catalog_pb2_grpc
from registry.blobs import Upload
from registry.catalog import Catalog
from server import convert
from server.checkin import Declared, check_in
from server.errors import BadRequest, answering

PAGE, PAGE_LIMIT = 100, 1000
FILE_LIMIT = 8 << 30
RETENTION, GRACE, LONGEST = timedelta(days=30), timedelta(days=1), timedelta(days=36500)


class CatalogServicer(catalog_pb2_grpc.CatalogServiceServicer):
    """Answers from one catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def CheckIn(
        self, requests: AsyncIterator[catalog_pb2.CheckInRequest], context: grpc.aio.ServicerContext
    ) -> catalog_pb2.CheckInResponse:
        async with answering(context):
            declared = _declared(await anext(aiter(requests), None), convert.actor(context))
            await asyncio.to_thread(declared.check)  # reads the card
            with self._catalog.blobs.upload() as upload:
                async for request in requests:
                    await _receive(request, upload)
                found, created = await asyncio.to_thread(check_in, self._catalog, upload, declared)
            same = await asyncio.to_thread(self._catalog.with_digest, found.digest)
            alike = await asyncio.to_thread(self._catalog.with_tensors, found.digests.tensors)
            return catalog_pb2.CheckInResponse(
                version=convert.version(found),
                created=created,
                same_bytes=[other.ref for other in same if other.ref != found.ref],
                same_tensors=[other.ref for other in alike if other.digest != found.digest],
            )

    async def GetVersion(
        self, request: catalog_pb2.GetVersionRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.GetVersionResponse:
        async with answering(context):
            found = await asyncio.to_thread(self._catalog.resolve, request.ref)
            card = await asyncio.to_thread(self._catalog.card, found)
            return catalog_pb2.GetVersionResponse(version=convert.version(found), card=card)

    async def ListAssets(
        self, request: catalog_pb2.ListAssetsRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.ListAssetsResponse:
        async with answering(context):
            if not 0 <= request.page_size <= PAGE_LIMIT:
                raise BadRequest(
                    f"page_size {request.page_size} is not within 0 and {PAGE_LIMIT}", field="page_size"
                )
            limit = request.page_size or PAGE
            after = _name_in(request.page_token)
            query = convert.query(request)
            found = await asyncio.to_thread(self._catalog.newest, after=after, limit=limit + 1, query=query)
            more = len(found) > limit
            return catalog_pb2.ListAssetsResponse(
                versions=map(convert.version, found[:limit]),
                next_page_token=base64.urlsafe_b64encode(found[limit - 1].name.encode()).decode()
                if more
                else "",
            )

    async def ListVersions(
        self, request: catalog_pb2.ListVersionsRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.ListVersionsResponse:
        async with answering(context):
            found = await asyncio.to_thread(self._catalog.history, request.name)
            return catalog_pb2.ListVersionsResponse(versions=map(convert.version, found))

    async def SetAlias(
        self, request: catalog_pb2.SetAliasRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.SetAliasResponse:
        async with answering(context):
            if request.number == 0:
                named = await asyncio.to_thread(self._catalog.resolve, f"{request.name}@{request.alias}")
                return catalog_pb2.SetAliasResponse(
                    version=convert.version(named), previous_number=named.number
                )
            expected = request.expected_number if request.HasField("expected_number") else None
            moved, previous = await asyncio.to_thread(
                self._catalog.set_alias,
                request.name,
                request.alias,
                request.number,
                expected=expected,
                actor=convert.actor(context),
            )
            return catalog_pb2.SetAliasResponse(version=convert.version(moved), previous_number=previous)

    async def Download(
        self, request: catalog_pb2.DownloadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[catalog_pb2.DownloadResponse]:
        async with answering(context):
            found = await asyncio.to_thread(self._catalog.resolve, request.ref)
            yield catalog_pb2.DownloadResponse(version=convert.version(found))
            chunks = self._catalog.blobs.chunks(found.digest)
            while chunk := await asyncio.to_thread(next, chunks, b""):
                yield catalog_pb2.DownloadResponse(chunk=chunk)

    async def DeleteVersion(
        self, request: catalog_pb2.DeleteVersionRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.DeleteVersionResponse:
        async with answering(context):
            gone = await asyncio.to_thread(self._catalog.delete, request.ref, actor=convert.actor(context))
            return catalog_pb2.DeleteVersionResponse(version=convert.version(gone))

    async def UndeleteVersion(
        self, request: catalog_pb2.UndeleteVersionRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.UndeleteVersionResponse:
        async with answering(context):
            back = await asyncio.to_thread(self._catalog.undelete, request.ref, actor=convert.actor(context))
            return catalog_pb2.UndeleteVersionResponse(version=convert.version(back))

    async def CollectGarbage(
        self, request: catalog_pb2.CollectGarbageRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.CollectGarbageResponse:
        async with answering(context):
            went = await asyncio.to_thread(
                self._catalog.collect_garbage,
                retention=_duration(request, "retention", RETENTION),
                grace=_duration(request, "grace", GRACE),
                dry_run=request.dry_run,
                actor=convert.actor(context),
            )
            return catalog_pb2.CollectGarbageResponse(
                versions=went.versions, orphans=went.orphans, size_bytes=went.size_bytes
            )

    async def WatchEvents(
        self, request: catalog_pb2.WatchEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[catalog_pb2.WatchEventsResponse]:
        async with answering(context):
            if request.since < 0:
                raise BadRequest(f"since {request.since} is below 0", field="since")
            loop, changed, seen = asyncio.get_running_loop(), asyncio.Event(), request.since
            with self._catalog.listening(lambda: loop.call_soon_threadsafe(changed.set)):
                while True:
                    changed.clear()
                    for event in await asyncio.to_thread(self._catalog.events, seen):
                        yield convert.event(event)
                        seen = event.seq
                        changed.set()  # look again: there may be more than one page
                    if not changed.is_set():
                        if request.no_wait:
                            return
                        await changed.wait()


def _duration(
    request: catalog_pb2.CollectGarbageRequest, field: Literal["retention", "grace"], default: timedelta
) -> timedelta:
    if not request.HasField(field):
        return default
    try:
        found: timedelta = getattr(request, field).ToTimedelta()
    except (ValueError, OverflowError):
        found = -default
    if not timedelta(0) <= found <= LONGEST:
        raise BadRequest(f"{field} must be from 0 to {LONGEST.days} days", field=field)
    return found


def _declared(first: catalog_pb2.CheckInRequest | None, actor: str) -> Declared:
    if first is None or first.WhichOneof("part") != "header":
        raise BadRequest("the first message of a check-in must carry the header", field="header")
    header = first.header
    try:
        config = header.adapter_config.decode()
    except UnicodeDecodeError:
        raise BadRequest("adapter_config is not UTF-8 text", field="header.adapter_config") from None
    return Declared(
        name=header.name,
        base=header.base,
        card=header.card,
        triggers=tuple(header.triggers),
        alias=header.alias,
        file_name=header.file_name,
        adapter_config=config,
        request_id=header.request_id,
        actor=actor,
    )


async def _receive(request: catalog_pb2.CheckInRequest, upload: Upload) -> None:
    if request.WhichOneof("part") != "chunk":
        raise BadRequest("after the header of a check-in only chunks may follow", field="chunk")
    if upload.size + len(request.chunk) > FILE_LIMIT:
        raise BadRequest(f"the file is larger than {FILE_LIMIT} bytes", field="chunk")
    await asyncio.to_thread(upload.write, request.chunk)


def _name_in(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token.encode()).decode()
    except (binascii.Error, ValueError):
        raise BadRequest("page_token is not one that this server gave out", field="page_token") from None
