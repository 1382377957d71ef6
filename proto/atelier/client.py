"""The Python client, sync and async: thin, typed, over one channel.

    with Client("127.0.0.1:7431") as atelier:
        atelier.check_in(Path("hero.safetensors"), name="hero", base="pocket")
        for picture in atelier.render("a photo of {hero}", stack={"hero": 0.8}, seed=7).pictures():
            Path(f"{picture.index}.png").write_bytes(picture.png)

Reading calls are retried while the server cannot be reached (gRPC's own retries); nothing else is. Every
failure is an `AtelierError` with the gRPC status code and a message that says what to do.
"""

import asyncio
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import grpc

from atelier.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    compose_pb2,
    compose_pb2_grpc,
    render_pb2,
    render_pb2_grpc,
)

DEFAULT_SERVER = "127.0.0.1:7431"
CHUNK = 1 << 20
_READS = {
    "atelier.v1.CatalogService": ("GetVersion", "ListAssets", "ListVersions"),
    "atelier.v1.ComposeService": ("ListMethods",),
    "atelier.v1.RenderService": ("ListBases",),
}
_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": name} for service, names in _READS.items() for name in names
            ],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS = [
    ("grpc.service_config", json.dumps(_CONFIG)),
    ("grpc.max_receive_message_length", 72 << 20),
    ("grpc.max_send_message_length", 72 << 20),
]
Progress = Callable[[int, int], None]
"""Called with bytes (or steps) done, and all of them."""
Stack = Mapping[str, float] | Sequence[tuple[str, float]]
"""References with weights; the order matters to ordered methods."""


class AtelierError(Exception):
    """A call that failed: `code` is the gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture: its place in the request, and the PNG with its manifest inside."""

    index: int
    png: bytes


def _assemble(parts: dict[int, bytearray], event: render_pb2.RenderResponse) -> Picture | None:
    """The picture that this event completes."""
    if not event.HasField("image"):
        return None
    chunk = event.image
    parts.setdefault(chunk.image, bytearray()).extend(chunk.data)
    return Picture(chunk.image, bytes(parts.pop(chunk.image))) if chunk.last else None


class Rendering:
    """A render under way: iterate over its events, or over `pictures()`.

    `cancel()`, and breaking off either loop, stops the server within one denoising step.
    """

    def __init__(self, call: grpc.Call, address: str) -> None:
        self._call = call
        self._address = address
        self.summary = render_pb2.RenderSummary()
        """How it went; empty until the last event was read."""

    def cancel(self) -> None:
        """Stops the render."""
        self._call.cancel()

    def __iter__(self) -> Iterator[render_pb2.RenderResponse]:
        try:
            with _errors(self._address):
                for event in self._call:
                    if event.HasField("summary"):
                        self.summary = event.summary
                    yield event
        finally:
            self._call.cancel()

    def pictures(self, progress: Progress | None = None) -> Iterator[Picture]:
        """Each picture as it is finished."""
        parts: dict[int, bytearray] = {}
        for event in self:
            if progress and event.HasField("step"):
                progress(event.step.step, event.step.steps)
            if picture := _assemble(parts, event):
                yield picture


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _translate(error, address) from None


def _translate(error: grpc.RpcError, address: str) -> AtelierError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "shutting down" not in details:
        details = f"no server answers at {address}; start one with `atelier serve`, or set ATELIER_SERVER"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "the deadline passed before the answer came; allow more time (--timeout), or ask for less"
    return AtelierError(code, details)


def _stack(stack: Stack) -> list[compose_pb2.WeightedRef]:
    pairs = stack.items() if isinstance(stack, Mapping) else stack
    return [compose_pb2.WeightedRef(ref=ref, weight=weight) for ref, weight in pairs]


def method(
    name: str = "",
    *,
    rank: int | None = None,
    energy: float | None = None,
    strength: float | None = None,
    protect: float | None = None,
) -> compose_pb2.Method:
    """A merge method with what it is told; see `Client.methods`."""
    return compose_pb2.Method(name=name, rank=rank, energy=energy, strength=strength, protect=protect)


def render_request(
    prompt: str,
    *,
    stack: Stack = (),
    method: compose_pb2.Method | None = None,
    negative_prompt: str = "",
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int | None = None,
    base: str = "",
    preview_every: int = 0,
) -> render_pb2.RenderRequest:
    """A request; what is None is the base's default (the seed: the server's choice). Sizes in pixels."""
    return render_pb2.RenderRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        stack=_stack(stack),
        method=method,
        seed=seed,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
        count=count,
        base=base,
        preview_every=preview_every,
    )


def _check_in_parts(
    file: BinaryIO, header: catalog_pb2.CheckInHeader, progress: Progress | None
) -> Iterator[catalog_pb2.CheckInRequest]:
    yield catalog_pb2.CheckInRequest(header=header)
    size, sent = os.fstat(file.fileno()).st_size, 0
    while chunk := file.read(CHUNK):
        yield catalog_pb2.CheckInRequest(chunk=chunk)
        sent += len(chunk)
        if progress:
            progress(sent, size)


def _header(
    path: Path,
    name: str,
    *,
    base: str,
    card: bytes,
    triggers: Iterable[str],
    alias: str,
    adapter_config: bytes,
    request_id: str,
) -> catalog_pb2.CheckInHeader:
    return catalog_pb2.CheckInHeader(
        name=name,
        base=base,
        card=card,
        triggers=list(triggers),
        alias=alias,
        file_name=path.name.encode(errors="replace").decode(),
        adapter_config=adapter_config,
        request_id=request_id or str(uuid.uuid4()),
    )


class Client:
    """A connection to a server; `address` defaults to ATELIER_SERVER, then to 127.0.0.1:7431."""

    def __init__(self, address: str = "", *, timeout: float | None = None) -> None:
        self.address = address or os.environ.get("ATELIER_SERVER", "") or DEFAULT_SERVER
        self._timeout = timeout
        self._channel = grpc.insecure_channel(self.address, options=_OPTIONS)
        self._catalog = catalog_pb2_grpc.CatalogServiceStub(self._channel)
        self._compose = compose_pb2_grpc.ComposeServiceStub(self._channel)
        self._render = render_pb2_grpc.RenderServiceStub(self._channel)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_in(
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
        progress: Progress | None = None,
    ) -> catalog_pb2.CheckInResponse:
        """Checks a file in; the same `request_id` again is the same call. Raises AtelierError, OSError."""
        header = _header(
            path,
            name,
            base=base,
            card=card,
            triggers=triggers,
            alias=alias,
            adapter_config=adapter_config,
            request_id=request_id,
        )
        with path.open("rb") as file, _errors(self.address):
            return self._catalog.CheckIn(_check_in_parts(file, header, progress), timeout=self._timeout)

    def get(self, ref: str) -> catalog_pb2.GetVersionResponse:
        """A version with its card."""
        with _errors(self.address):
            return self._catalog.GetVersion(catalog_pb2.GetVersionRequest(ref=ref), timeout=self._timeout)

    def list(self) -> Iterator[catalog_pb2.Version]:
        """The newest version of every asset, in order of name."""
        token = ""
        while True:
            with _errors(self.address):
                page = self._catalog.ListAssets(
                    catalog_pb2.ListAssetsRequest(page_token=token), timeout=self._timeout
                )
            yield from page.versions
            if not (token := page.next_page_token):
                return

    def history(self, name: str) -> Sequence[catalog_pb2.Version]:
        """Every version of an asset, newest first."""
        with _errors(self.address):
            request = catalog_pb2.ListVersionsRequest(name=name)
            return list(self._catalog.ListVersions(request, timeout=self._timeout).versions)

    def set_alias(
        self, name: str, alias: str, number: int = 0, *, expected: int | None = None
    ) -> catalog_pb2.SetAliasResponse:
        """Points an alias at a version, or reads it (number 0). With `expected`, only if it names that
        version now.
        """
        request = catalog_pb2.SetAliasRequest(name=name, alias=alias, number=number, expected_number=expected)
        with _errors(self.address):
            return self._catalog.SetAlias(request, timeout=self._timeout)

    def download(self, ref: str, path: Path, *, progress: Progress | None = None) -> catalog_pb2.Version:
        """Writes a version's exact bytes, checked against its digest, to `path`; nothing is there until all
        of it is.
        """
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, delete=False) as out:
            try:
                with _errors(self.address):
                    version = self._receive(ref, out.write, progress)
                out.close()
                umask = os.umask(0)
                os.umask(umask)
                Path(out.name).chmod(0o666 & ~umask)  # a temporary file is its owner's alone
                Path(out.name).replace(path)
            except BaseException:
                Path(out.name).unlink(missing_ok=True)
                raise
        return version

    def _receive(
        self, ref: str, write: Callable[[bytes], int], progress: Progress | None
    ) -> catalog_pb2.Version:
        version, seen, done = catalog_pb2.Version(), hashlib.sha256(), 0
        for part in self._catalog.Download(catalog_pb2.DownloadRequest(ref=ref), timeout=self._timeout):
            if part.HasField("version"):
                version = part.version
            else:
                write(part.chunk)
                seen.update(part.chunk)
                done += len(part.chunk)
                if progress:
                    progress(done, version.size_bytes)
        if f"sha256:{seen.hexdigest()}" != version.digest:
            raise AtelierError(grpc.StatusCode.DATA_LOSS, f"{ref} arrived damaged; download it again")
        return version

    def merge(
        self, stack: Stack, *, name: str, method: compose_pb2.Method | None = None, alias: str = ""
    ) -> compose_pb2.MergeResponse:
        """Merges a stack into a new version of `name`."""
        request = compose_pb2.MergeRequest(stack=_stack(stack), method=method, name=name, alias=alias)
        with _errors(self.address):
            return self._compose.Merge(request, timeout=self._timeout)

    def methods(self) -> Sequence[compose_pb2.MethodInfo]:
        """The merge methods."""
        with _errors(self.address):
            return list(
                self._compose.ListMethods(compose_pb2.ListMethodsRequest(), timeout=self._timeout).methods
            )

    def bases(self) -> Sequence[render_pb2.Base]:
        """The bases the server holds."""
        with _errors(self.address):
            return list(self._render.ListBases(render_pb2.ListBasesRequest(), timeout=self._timeout).bases)

    def render(self, prompt: str, **settings: Any) -> Rendering:
        """Starts a render; the settings are those of `render_request`."""
        call = self._render.Render(render_request(prompt, **settings), timeout=self._timeout)
        return Rendering(call, self.address)

    def replay(self, png: bytes) -> Rendering:
        """Renders the manifest inside a PNG again."""
        call = self._render.Replay(render_pb2.ReplayRequest(png=png), timeout=self._timeout)
        return Rendering(call, self.address)


class AsyncClient:
    """The same over grpc.aio, for pipelines that wait for many renders at once; downloads are `Client`'s."""

    def __init__(self, address: str = "", *, timeout: float | None = None) -> None:
        self.address = address or os.environ.get("ATELIER_SERVER", "") or DEFAULT_SERVER
        self._timeout = timeout
        self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        self._catalog = catalog_pb2_grpc.CatalogServiceStub(self._channel)
        self._compose = compose_pb2_grpc.ComposeServiceStub(self._channel)
        self._render = render_pb2_grpc.RenderServiceStub(self._channel)

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
    ) -> catalog_pb2.CheckInResponse:
        """Checks a file in; the same `request_id` again is the same call. Raises AtelierError, OSError."""
        header = _header(
            path,
            name,
            base=base,
            card=card,
            triggers=triggers,
            alias=alias,
            adapter_config=adapter_config,
            request_id=request_id,
        )
        with path.open("rb") as file, _errors(self.address):
            parts = _check_in_parts(file, header, None)

            async def requests() -> AsyncIterator[catalog_pb2.CheckInRequest]:
                while part := await asyncio.to_thread(next, parts, None):
                    yield part

            return await self._catalog.CheckIn(requests(), timeout=self._timeout)

    async def get(self, ref: str) -> catalog_pb2.GetVersionResponse:
        """A version with its card."""
        with _errors(self.address):
            return await self._catalog.GetVersion(
                catalog_pb2.GetVersionRequest(ref=ref), timeout=self._timeout
            )

    async def merge(
        self, stack: Stack, *, name: str, method: compose_pb2.Method | None = None, alias: str = ""
    ) -> compose_pb2.MergeResponse:
        """Merges a stack into a new version of `name`."""
        request = compose_pb2.MergeRequest(stack=_stack(stack), method=method, name=name, alias=alias)
        with _errors(self.address):
            return await self._compose.Merge(request, timeout=self._timeout)

    async def list(self) -> AsyncIterator[catalog_pb2.Version]:
        """The newest version of every asset, in order of name."""
        token = ""
        while True:
            request = catalog_pb2.ListAssetsRequest(page_token=token)
            with _errors(self.address):
                page = await self._catalog.ListAssets(request, timeout=self._timeout)
            for version in page.versions:
                yield version
            if not (token := page.next_page_token):
                return

    async def history(self, name: str) -> Sequence[catalog_pb2.Version]:
        """Every version of an asset, newest first."""
        request = catalog_pb2.ListVersionsRequest(name=name)
        with _errors(self.address):
            return (await self._catalog.ListVersions(request, timeout=self._timeout)).versions

    async def set_alias(
        self, name: str, alias: str, number: int = 0, *, expected: int | None = None
    ) -> catalog_pb2.SetAliasResponse:
        """Points an alias at a version, or reads it (number 0). With `expected`, only from that version."""
        request = catalog_pb2.SetAliasRequest(name=name, alias=alias, number=number, expected_number=expected)
        with _errors(self.address):
            return await self._catalog.SetAlias(request, timeout=self._timeout)

    async def replay(self, png: bytes) -> bytes:
        """The picture of a manifest, rendered again."""
        call = self._render.Replay(render_pb2.ReplayRequest(png=png), timeout=self._timeout)
        (picture,) = [picture.png async for picture in self._pictures(call)]
        return picture

    async def events(self, prompt: str, **settings: Any) -> AsyncIterator[render_pb2.RenderResponse]:
        """A render's events; the settings are those of `render_request`. Leaving the loop cancels it."""
        call = self._render.Render(render_request(prompt, **settings), timeout=self._timeout)
        async for event in self._events(call):
            yield event

    async def render(self, prompt: str, **settings: Any) -> Sequence[bytes]:
        """The finished PNGs of a render, in order."""
        call = self._render.Render(render_request(prompt, **settings), timeout=self._timeout)
        return [picture.png async for picture in self._pictures(call)]

    async def _pictures(self, call: grpc.aio.Call) -> AsyncIterator[Picture]:
        parts: dict[int, bytearray] = {}
        async for event in self._events(call):
            if picture := _assemble(parts, event):
                yield picture

    async def _events(self, call: grpc.aio.Call) -> AsyncIterator[render_pb2.RenderResponse]:
        try:
            with _errors(self.address):
                async for event in call:
                    yield event
        finally:
            call.cancel()
