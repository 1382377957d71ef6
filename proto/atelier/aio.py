"""The Python client over grpc.aio, for pipelines that wait for many renders at once; downloads are
`atelier.client`'s.

    async with AsyncClient("127.0.0.1:7431") as atelier:
        pngs = await asyncio.gather(*(atelier.render(prompt, stack={"hero": 0.8}) for prompt in prompts))
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from atelier.messages import (
    OPTIONS,
    Picture,
    Stack,
    address_of,
    assemble,
    check_in_header,
    check_in_parts,
    errors,
    list_request,
    render_request,
    signature,
    weighted,
)
from atelier.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    compose_pb2,
    compose_pb2_grpc,
    render_pb2,
    render_pb2_grpc,
)


class AsyncClient:
    """The same over grpc.aio, for pipelines that wait for many renders at once; downloads are `Client`'s."""

    def __init__(self, address: str = "", *, timeout: float | None = None) -> None:
        self.address = address_of(address)
        self._timeout = timeout
        self._channel = grpc.aio.insecure_channel(self.address, options=OPTIONS)
        self._catalog = catalog_pb2_grpc.CatalogServiceStub(self._channel)
        self._compose = compose_pb2_grpc.ComposeServiceStub(self._channel)
        self._render = render_pb2_grpc.RenderServiceStub(self._channel)

    def _call(self) -> dict[str, Any]:
        return {"timeout": self._timeout, "metadata": signature()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def check_in(
        self,
        path: Path,
        *,
        name: str,
        base: str = "",
        card: bytes = b"",
        triggers: Iterable[str] = (),
        alias: str = "",
        adapter_config: bytes = b"",
        request_id: str = "",
        file_name: str = "",
        origin: Mapping[str, Any] | None = None,
    ) -> catalog_pb2.CheckInResponse:
        """Checks a file in; the same `request_id` again is the same call, and goes on where one was cut.
        Raises AtelierError, OSError.
        """
        header = check_in_header(
            path,
            name,
            base=base,
            card=card,
            triggers=triggers,
            alias=alias,
            adapter_config=adapter_config,
            request_id=request_id,
            file_name=file_name,
            origin=origin,
        )
        with path.open("rb") as file, errors(self.address):
            if request_id:
                asked = catalog_pb2.GetUploadRequest(request_id=request_id)
                header.offset = (await self._catalog.GetUpload(asked, **self._call())).offset
            parts = check_in_parts(file, header, None)

            async def requests() -> AsyncIterator[catalog_pb2.CheckInRequest]:
                while part := await asyncio.to_thread(next, parts, None):
                    yield part

            return await self._catalog.CheckIn(requests(), **self._call())

    async def get(self, ref: str) -> catalog_pb2.GetVersionResponse:
        """A version with its card."""
        with errors(self.address):
            return await self._catalog.GetVersion(catalog_pb2.GetVersionRequest(ref=ref), **self._call())

    async def merge(
        self, stack: Stack, *, name: str, method: compose_pb2.Method | None = None, alias: str = ""
    ) -> compose_pb2.MergeResponse:
        """Merges a stack into a new version of `name`."""
        request = compose_pb2.MergeRequest(stack=weighted(stack), method=method, name=name, alias=alias)
        with errors(self.address):
            return await self._compose.Merge(request, **self._call())

    async def list(self, text: str = "", **question: Any) -> AsyncIterator[catalog_pb2.Version]:
        """The newest version of every asset that answers the question (`messages.list_request`), by name."""
        token = ""
        while True:
            request = list_request(text, page_token=token, **question)
            with errors(self.address):
                page = await self._catalog.ListAssets(request, **self._call())
            for version in page.versions:
                yield version
            if not (token := page.next_page_token):
                return

    async def history(self, name: str) -> Sequence[catalog_pb2.Version]:
        """Every version of an asset, newest first."""
        request = catalog_pb2.ListVersionsRequest(name=name)
        with errors(self.address):
            return (await self._catalog.ListVersions(request, **self._call())).versions

    async def set_alias(
        self, name: str, alias: str, number: int = 0, *, expected: int | None = None
    ) -> catalog_pb2.SetAliasResponse:
        """Points an alias at a version, or reads it (number 0). With `expected`, only from that version."""
        request = catalog_pb2.SetAliasRequest(name=name, alias=alias, number=number, expected_number=expected)
        with errors(self.address):
            return await self._catalog.SetAlias(request, **self._call())

    async def watch(self, since: int = 0) -> AsyncIterator[catalog_pb2.WatchEventsResponse]:
        """Changes after the event numbered `since`, then those to come; leaving the loop ends it."""
        call = self._catalog.WatchEvents(catalog_pb2.WatchEventsRequest(since=since), **self._call())
        try:
            with errors(self.address):
                async for event in call:
                    yield event
        finally:
            call.cancel()

    async def replay(self, png: bytes) -> bytes:
        """The picture of a manifest, rendered again."""
        call = self._render.Replay(render_pb2.ReplayRequest(png=png), **self._call())
        (picture,) = [picture.png async for picture in self._pictures(call)]
        return picture

    async def events(self, prompt: str, **settings: Any) -> AsyncIterator[render_pb2.RenderResponse]:
        """A render's events; the settings are those of `render_request`. Leaving the loop cancels it."""
        call = self._render.Render(render_request(prompt, **settings), **self._call())
        async for event in self._events(call):
            yield event

    async def render(self, prompt: str, **settings: Any) -> Sequence[bytes]:
        """The finished PNGs of a render, in order."""
        call = self._render.Render(render_request(prompt, **settings), **self._call())
        return [picture.png async for picture in self._pictures(call)]

    async def _pictures(self, call: grpc.aio.Call) -> AsyncIterator[Picture]:
        parts: dict[int, bytearray] = {}
        async for event in self._events(call):
            if picture := assemble(parts, event):
                yield picture

    async def _events(self, call: grpc.aio.Call) -> AsyncIterator[render_pb2.RenderResponse]:
        try:
            with errors(self.address):
                async for event in call:
                    yield event
        finally:
            call.cancel()
