"""Check-ins on their way in: chunks in order, within limits of size, time and number, resumable when cut.

A call that is cut, by its client's fault or the network's, leaves what arrived under its `request_id`;
GetUpload says how much, and a call with that `offset` goes on. A call that is refused leaves nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import ParamSpec, TypeVar

from atelier.v1 import catalog_pb2
from registry.blobs import CHUNK, BlobStore, Upload
from registry.intake import Bytes, Intake
from server.errors import BadRequest, DeadlineExceeded, OutOfSpace, TooManyUploads
from server.wire import Part

P = ParamSpec("P")
T = TypeVar("T")
FILE_LIMIT, CHUNK_LIMIT = 8 << 30, 4 << 20
UPLOADS_LIMIT = 32
IDLE_SECONDS, UPLOAD_SECONDS = 60.0, 6 * 3600.0


class Uploads:
    """The uploads of one store."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs, self._live = blobs, 0

    @property
    def busy(self) -> bool:
        """Whether somebody waits for a check-in."""
        return self._live > 0

    def offset(self, request_id: str) -> int:
        """How many bytes of a cut check-in are here."""
        return self._blobs.parked_bytes(request_id) if request_id else 0

    @asynccontextmanager
    async def receiving(
        self,
        header: catalog_pb2.CheckInHeader,
        requests: AsyncIterator[Part],
        sinks: Sequence[Callable[[Bytes], object]],
    ) -> AsyncIterator[Upload]:
        """The whole upload, once its last byte is here, and every sink has had all of it. Raises BadRequest,
        DeadlineExceeded, OutOfSpace, TooManyUploads, Conflict.
        """
        self._check(header)
        if self._live >= UPLOADS_LIMIT:
            raise TooManyUploads(f"{self._live} check-ins are under way, the limit; try again")
        self._live += 1
        try:
            with await self._opened(header) as upload:
                await self._receive(header, requests, upload, sinks)
                yield upload
        finally:
            self._live -= 1

    async def _opened(self, header: catalog_pb2.CheckInHeader) -> Upload:
        opening = asyncio.ensure_future(
            asyncio.to_thread(self._blobs.upload, header.request_id, header.offset)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread goes on, and must not keep the session
            await asyncio.wait([opening])
            if not opening.exception():
                with opening.result() as upload:
                    upload.park()
            raise

    def _check(self, header: catalog_pb2.CheckInHeader) -> None:
        if not 0 <= header.size_bytes <= FILE_LIMIT:
            raise BadRequest(
                f"the file has {header.size_bytes} bytes, the limit is {FILE_LIMIT}", field="size_bytes"
            )
        if header.offset and not header.request_id:
            raise BadRequest(
                "an offset goes with the request_id of the check-in that was cut", field="offset"
            )
        room = self._blobs.room()
        if header.size_bytes - header.offset > room:
            raise OutOfSpace(
                f"the file has {header.size_bytes} bytes and the server's disk has room for {max(0, room)}, "
                f"with {self._blobs.spare >> 20} MB to spare; free some space"
            )

    async def _receive(
        self,
        header: catalog_pb2.CheckInHeader,
        requests: AsyncIterator[Part],
        upload: Upload,
        sinks: Sequence[Callable[[Bytes], object]],
    ) -> None:
        digest, size = "", upload.size
        with Intake(upload.write, *sinks) as intake:
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    if header.offset:
                        await uninterrupted(_again, upload, sinks)
                    while (chunk := await _next(requests, digest)) is not None:
                        if isinstance(chunk, str):
                            digest = chunk
                            continue
                        self._check_chunk(header, size, len(chunk))
                        size += len(chunk)
                        await _done(intake.feed(chunk))
                    await _done(intake.rest())
            except TimeoutError:
                await _settled(intake)
                upload.park()
                raise DeadlineExceeded(
                    f"nothing came for {IDLE_SECONDS:g} s, or not all in {UPLOAD_SECONDS:g}; go on from "
                    f"byte {upload.size}"
                ) from None
            except asyncio.CancelledError:  # the call was cut
                upload.park()
                raise
            finally:
                await _settled(intake)
        if header.size_bytes not in {0, upload.size}:
            upload.park()  # a call that is cut may look like one that ends
            raise BadRequest(
                f"the file has {header.size_bytes} bytes, {upload.size} came; was it changed meanwhile?",
                field="size_bytes",
            )
        if digest and digest != upload.finish():
            raise BadRequest(
                f"what came is {upload.finish()}, not {digest}: it was damaged on the way; send it again",
                field="digest",
            )

    @staticmethod
    def _check_chunk(header: catalog_pb2.CheckInHeader, before: int, size: int) -> None:
        if size > CHUNK_LIMIT:
            raise BadRequest(f"a chunk has {size} bytes, the limit is {CHUNK_LIMIT}", field="chunk")
        if before + size > (header.size_bytes or FILE_LIMIT):
            raise BadRequest(
                f"the file is larger than {header.size_bytes or FILE_LIMIT} bytes", field="chunk"
            )


async def _next(requests: AsyncIterator[Part], digest: str) -> memoryview | str | None:
    """The next chunk, or the digest, if none came before. Raises BadRequest, TimeoutError."""
    async with asyncio.timeout(IDLE_SECONDS):
        part = await anext(requests, None)
    if part is not None and (digest or not _follows(part)):
        raise BadRequest(
            "after the header of a check-in only chunks may follow, then a digest", field="chunk"
        )
    return part.digest if isinstance(part, catalog_pb2.CheckInRequest) else part


def _follows(part: Part) -> bool:
    return isinstance(part, memoryview) or part.WhichOneof("part") == "digest"


async def uninterrupted(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns, on a thread. A cancelled call ends when the thread has: nobody takes away what
    it works on.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


async def _done(work: Sequence[Future[None]]) -> None:
    """When all of it is. Raises its error; a cancelled call cancels none of it."""
    for future in work:
        if future.done():
            future.result()
        else:
            await asyncio.shield(asyncio.wrap_future(future))


async def _settled(intake: Intake) -> None:
    """When nothing is written any more, however it went: nobody closes the file under it."""
    for future in intake.cut():
        with suppress(Exception):
            await _done([future])


def _again(upload: Upload, sinks: Sequence[Callable[[Bytes], object]]) -> None:
    """What had arrived before the cut."""
    with upload.path.open("rb") as file:
        while data := file.read(CHUNK):
            for sink in sinks:
                sink(data)
