"""CatalogService: the catalog over gRPC. Disk work runs on threads, never on the loop."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Literal

import grpc

from atelier.v1 import catalog_pb2, catalog_pb2_grpc
from registry.catalog import Catalog
from registry.digests import DigestStream
from registry.errors import NotFound
from registry.finding import Query
from registry.records import Preview, Version
from server import convert
from server.checkin import Declared, arriving, check_in, facts_with
from server.errors import BadRequest, Draining, answering
from server.likes import Likes
from server.previews import redrawn
from server.uploads import Uploads, uninterrupted
from server.wire import Part

PAGE, PAGE_LIMIT = 100, 1000
LARGE = 32 << 20
"""Bytes of a file from which on nobody waits for the digest of its tensors, if no other may have the same."""
RETENTION, GRACE, LONGEST = timedelta(days=30), timedelta(days=1), timedelta(days=36500)


class CatalogServicer(catalog_pb2_grpc.CatalogServiceServicer):
    """Answers from one catalog."""

    def __init__(self, catalog: Catalog, likes: Likes, uploads: Uploads) -> None:
        self._catalog, self._likes, self._uploads = catalog, likes, uploads
        self._watchers, self._stopping = set[asyncio.Event](), False

    def stop_watching(self) -> None:
        """Ends every WatchEvents call; to be called on the loop."""
        self._stopping = True
        for changed in self._watchers:
            changed.set()

    async def CheckIn(
        self, requests: AsyncIterator[Part], context: grpc.aio.ServicerContext
    ) -> catalog_pb2.CheckInResponse:
        async with answering(context):
            header = _header(await anext(aiter(requests), None))
            declared = _declared(header, convert.actor(context))
            await asyncio.to_thread(declared.check)  # reads the card
            digests = DigestStream(whole=header.size_bytes < LARGE)
            arrived = arriving(declared, header.size_bytes)
            sinks = digests.update, arrived.update
            async with self._uploads.receiving(header, aiter(requests), sinks) as upload:
                found, created = await uninterrupted(
                    check_in, self._catalog, upload, declared, digests, arrived
                )
            return await asyncio.to_thread(self._checked_in, found, created)

    def _checked_in(self, found: Version, created: bool) -> catalog_pb2.CheckInResponse:
        told_now = replace(found.digests, tensors=self._catalog.bodies.compare(found))
        found = replace(found, digests=told_now)
        same = [other for other in self._catalog.with_digest(found.digest) if other.ref != found.ref]
        alike = [o for o in self._catalog.with_tensors(found.digests.tensors) if o.digest != found.digest]
        told = {other.ref for other in (*same, *alike)}
        near = self._likes.nearly(found)
        return catalog_pb2.CheckInResponse(
            version=convert.version(found),
            created=created,
            same_bytes=[other.ref for other in same],
            same_tensors=[other.ref for other in alike],
            similar=[convert.similar(other, cosine) for other, cosine in near if other.ref not in told],
            warnings=self._shared_triggers(found),
        )

    def _shared_triggers(self, found: Version) -> list[str]:
        warnings = []
        for trigger in found.facts["triggers"]:
            query = Query(labels=[("trigger", trigger["word"])])
            others = [v.ref for v in self._catalog.newest(query=query, limit=5) if v.name != found.name]
            if others and not trigger.get("group"):
                warnings.append(
                    f"{trigger['word']!r} also calls {', '.join(others)}; stacked, one prompt calls both"
                )
        return warnings

    async def GetUpload(
        self, request: catalog_pb2.GetUploadRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.GetUploadResponse:
        async with answering(context):
            done = await asyncio.to_thread(self._catalog.made_by, request.request_id)
            return catalog_pb2.GetUploadResponse(
                offset=await asyncio.to_thread(self._uploads.offset, request.request_id),
                version=convert.version(done) if done else None,
            )

    async def GetVersion(
        self, request: catalog_pb2.GetVersionRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.GetVersionResponse:
        async with answering(context):

            def work() -> tuple[Version, bytes, list[Preview]]:
                found = self._catalog.resolve(request.ref)
                return found, self._catalog.card(found), self._catalog.previews(found)

            found, card, previews = await asyncio.to_thread(work)
            return catalog_pb2.GetVersionResponse(
                version=convert.version(found),
                card=card,
                previews=map(convert.preview, previews),
                declared=convert.declared(found),
            )

    async def SetCard(
        self, request: catalog_pb2.SetCardRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.SetCardResponse:
        async with answering(context):
            expected, actor = None, convert.actor(context)
            if request.HasField("expected_card_digest"):
                expected = request.expected_card_digest.removeprefix("sha256:")

            def work() -> tuple[Version, int]:
                seen = self._catalog.resolve(request.ref)
                facts = facts_with(self._catalog, seen, request.card)
                return self._catalog.set_card(seen.ref, request.card, facts, expected=expected, actor=actor)

            changed, revision = await asyncio.to_thread(work)
            return catalog_pb2.SetCardResponse(version=convert.version(changed), revision=revision)

    async def ListCards(
        self, request: catalog_pb2.ListCardsRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.ListCardsResponse:
        async with answering(context):
            found = await asyncio.to_thread(self._catalog.resolve, request.ref)
            revisions = await asyncio.to_thread(self._catalog.card_revisions, found)
            return catalog_pb2.ListCardsResponse(revisions=map(convert.card_revision, reversed(revisions)))

    async def AddPreview(
        self, request: catalog_pb2.AddPreviewRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.AddPreviewResponse:
        async with answering(context):
            actor, caption = convert.actor(context), convert.caption(request.caption)

            def work() -> Preview:
                self._catalog.resolve(request.ref)
                png, width, height = redrawn(request.image)
                with self._catalog.blobs.upload() as upload:
                    upload.write(png)
                    _, kept = self._catalog.add_preview(
                        request.ref, upload, width=width, height=height, caption=caption, actor=actor
                    )
                return kept

            return catalog_pb2.AddPreviewResponse(preview=convert.preview(await asyncio.to_thread(work)))

    async def RemovePreview(
        self, request: catalog_pb2.RemovePreviewRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.RemovePreviewResponse:
        async with answering(context):

            def work() -> list[Preview]:
                actor = convert.actor(context)
                return self._catalog.previews(
                    self._catalog.remove_preview(request.ref, request.digest, actor=actor)
                )

            left = await asyncio.to_thread(work)
            return catalog_pb2.RemovePreviewResponse(previews=map(convert.preview, left))

    async def GetPreview(
        self, request: catalog_pb2.GetPreviewRequest, context: grpc.aio.ServicerContext
    ) -> catalog_pb2.GetPreviewResponse:
        async with answering(context):

            def work() -> tuple[Preview, bytes]:
                found = self._catalog.resolve(request.ref)
                for preview in self._catalog.previews(found):
                    if request.digest in {"", preview.digest}:
                        return preview, b"".join(self._catalog.blobs.chunks(preview.digest))
                raise NotFound(
                    f"{found.ref} has no such preview; `atelier preview {found.ref} --add FILE` adds one",
                    field="digest",
                )

            preview, png = await asyncio.to_thread(work)
            return catalog_pb2.GetPreviewResponse(png=png, preview=convert.preview(preview))

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
            if not 0 <= request.offset <= found.size_bytes:
                raise BadRequest(
                    f"offset {request.offset} is not within the {found.size_bytes} bytes of {found.ref}",
                    field="offset",
                )
            yield catalog_pb2.DownloadResponse(version=convert.version(found))
            chunks = self._catalog.blobs.chunks(found.digest, request.offset)
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
            if not request.dry_run:
                await asyncio.to_thread(self._catalog.jobs.expire)
            went = await asyncio.to_thread(
                self._catalog.collect_garbage,
                retention=_duration(request, "retention", RETENTION),
                grace=_duration(request, "grace", GRACE),
                dry_run=request.dry_run,
                actor=convert.actor(context),
            )
            return catalog_pb2.CollectGarbageResponse(
                versions=went.versions,
                orphans=went.orphans,
                size_bytes=went.size_bytes,
                held=[catalog_pb2.HeldVersion(ref=ref, merge=merge) for ref, merge in went.held],
            )

    async def WatchEvents(
        self, request: catalog_pb2.WatchEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[catalog_pb2.WatchEventsResponse]:
        async with answering(context):
            if request.since < 0:
                raise BadRequest(f"since {request.since} is below 0", field="since")
            last = await asyncio.to_thread(self._catalog.last_event)
            if request.since > last:  # waiting for the numbers to catch up would leave changes out
                raise BadRequest(
                    f"since {request.since} is beyond {last}, the last change here: this catalog is another, "
                    "or an earlier copy; watch from 0",
                    field="since",
                )
            await context.send_initial_metadata((("atelier-watching", "1"),))  # a client knows it was here
            loop, changed, seen = asyncio.get_running_loop(), asyncio.Event(), request.since
            self._watchers.add(changed)
            try:
                with self._catalog.listening(lambda: loop.call_soon_threadsafe(changed.set)):
                    while True:
                        changed.clear()
                        for event in await asyncio.to_thread(self._catalog.events, seen):
                            yield convert.event(event)
                            seen = event.seq
                            changed.set()  # look again: there may be more than one page
                        if self._stopping:
                            raise Draining(f"the server is shutting down; watch on from event {seen}")
                        if not changed.is_set():
                            if request.no_wait:
                                return
                            await changed.wait()
            finally:
                self._watchers.discard(changed)


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


def _header(first: Part | None) -> catalog_pb2.CheckInHeader:
    if not isinstance(first, catalog_pb2.CheckInRequest) or first.WhichOneof("part") != "header":
        raise BadRequest("the first message of a check-in must carry the header", field="header")
    return first.header


def _declared(header: catalog_pb2.CheckInHeader, actor: str) -> Declared:
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
        origin=header.origin_json,
    )


def _name_in(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token.encode()).decode()
    except (binascii.Error, ValueError):
        raise BadRequest("page_token is not one that this server gave out", field="page_token") from None
