"""The Python client: thin, typed, over one channel (`atelier.aio` is the same over grpc.aio).

    with Client("127.0.0.1:7431") as atelier:
        atelier.check_in(Path("hero.safetensors"), name="hero", base="pocket")
        for picture in atelier.render("a photo of {hero}", stack={"hero": 0.8}, seed=7).pictures():
            Path(f"{picture.index}.png").write_bytes(picture.png)

Reading calls are retried while the server cannot be reached (gRPC's own retries); nothing else is. Every
failure is an `AtelierError` with the gRPC status code and a message that says what to do.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from atelier.messages import (
    OPTIONS,
    AtelierError,
    Picture,
    Progress,
    Stack,
    address_of,
    assemble,
    check_in_header,
    check_in_parts,
    errors,
    list_request,
    method,
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

__all__ = ["AtelierError", "Client", "Picture", "Progress", "Rendering", "Stack", "method", "render_request"]


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
            with errors(self._address):
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
            if picture := assemble(parts, event):
                yield picture


class Client:
    """A connection to a server; `address` defaults to ATELIER_SERVER, then to 127.0.0.1:7431."""

    def __init__(self, address: str = "", *, timeout: float | None = None) -> None:
        self.address = address_of(address)
        self._timeout = timeout
        self._channel = grpc.insecure_channel(self.address, options=OPTIONS)
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
        header = check_in_header(
            path,
            name,
            base=base,
            card=card,
            triggers=triggers,
            alias=alias,
            adapter_config=adapter_config,
            request_id=request_id,
        )
        with path.open("rb") as file, errors(self.address):
            return self._catalog.CheckIn(
                check_in_parts(file, header, progress), timeout=self._timeout, metadata=signature()
            )

    def get(self, ref: str) -> catalog_pb2.GetVersionResponse:
        """A version with its card."""
        with errors(self.address):
            return self._catalog.GetVersion(catalog_pb2.GetVersionRequest(ref=ref), timeout=self._timeout)

    def list(self, text: str = "", **question: Any) -> Iterator[catalog_pb2.Version]:
        """The newest version of every asset, in order of name; with a question (`messages.list_request`)
        only of those that answer it.
        """
        token = ""
        while True:
            request = list_request(text, page_token=token, **question)
            with errors(self.address):
                page = self._catalog.ListAssets(request, timeout=self._timeout)
            yield from page.versions
            if not (token := page.next_page_token):
                return

    def history(self, name: str) -> Sequence[catalog_pb2.Version]:
        """Every version of an asset, newest first."""
        with errors(self.address):
            request = catalog_pb2.ListVersionsRequest(name=name)
            return list(self._catalog.ListVersions(request, timeout=self._timeout).versions)

    def set_alias(
        self, name: str, alias: str, number: int = 0, *, expected: int | None = None
    ) -> catalog_pb2.SetAliasResponse:
        """Points an alias at a version, or reads it (number 0). With `expected`, only if it names that
        version now.
        """
        request = catalog_pb2.SetAliasRequest(name=name, alias=alias, number=number, expected_number=expected)
        with errors(self.address):
            return self._catalog.SetAlias(request, timeout=self._timeout, metadata=signature())

    def delete(self, ref: str) -> catalog_pb2.Version:
        """Hides a version; `undelete` brings it back until a garbage collection has purged it."""
        request = catalog_pb2.DeleteVersionRequest(ref=ref)
        with errors(self.address):
            return self._catalog.DeleteVersion(request, timeout=self._timeout, metadata=signature()).version

    def undelete(self, ref: str) -> catalog_pb2.Version:
        """Brings a deleted version back, by `hero:3`."""
        request = catalog_pb2.UndeleteVersionRequest(ref=ref)
        with errors(self.address):
            return self._catalog.UndeleteVersion(request, timeout=self._timeout, metadata=signature()).version

    def collect_garbage(
        self,
        *,
        dry_run: bool = False,
        retention: timedelta = timedelta(days=30),
        grace: timedelta = timedelta(days=1),
    ) -> catalog_pb2.CollectGarbageResponse:
        """Purges versions deleted longer than `retention` ago and files nobody names, none younger than
        `grace`.
        """
        request = catalog_pb2.CollectGarbageRequest(dry_run=dry_run, retention=retention, grace=grace)
        with errors(self.address):
            return self._catalog.CollectGarbage(request, timeout=self._timeout, metadata=signature())

    def watch(self, since: int = 0, *, wait: bool = True) -> Iterator[catalog_pb2.WatchEventsResponse]:
        """Changes after the event numbered `since`, then those to come; leaving the loop ends it."""
        with errors(self.address):
            request = catalog_pb2.WatchEventsRequest(since=since, no_wait=not wait)
            call = self._catalog.WatchEvents(request, timeout=self._timeout)
            try:
                yield from call
            finally:
                call.cancel()

    def download(self, ref: str, path: Path, *, progress: Progress | None = None) -> catalog_pb2.Version:
        """Writes a version's exact bytes, checked against its digest, to `path`; nothing is there until all
        of it is.
        """
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, delete=False) as out:
            try:
                with errors(self.address):
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
        request = compose_pb2.MergeRequest(stack=weighted(stack), method=method, name=name, alias=alias)
        with errors(self.address):
            return self._compose.Merge(request, timeout=self._timeout, metadata=signature())

    def save_stack(
        self,
        stack: Stack,
        *,
        name: str,
        alias: str = "",
        prompt: str = "",
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        dry_run: bool = False,
    ) -> compose_pb2.SaveStackResponse:
        """Keeps a stack, its members pinned, as a new version of `name`."""
        request = compose_pb2.SaveStackRequest(
            stack=weighted(stack),
            name=name,
            alias=alias,
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            dry_run=dry_run,
        )
        with errors(self.address):
            return self._compose.SaveStack(request, timeout=self._timeout, metadata=signature())

    def compare(self, before: str, after: str) -> compose_pb2.CompareVersionsResponse:
        """How far two LoRAs are apart, layer by layer."""
        request = compose_pb2.CompareVersionsRequest(before=before, after=after)
        with errors(self.address):
            return self._compose.CompareVersions(request, timeout=self._timeout)

    def methods(self) -> Sequence[compose_pb2.MethodInfo]:
        """The merge methods."""
        with errors(self.address):
            return list(
                self._compose.ListMethods(compose_pb2.ListMethodsRequest(), timeout=self._timeout).methods
            )

    def bases(self) -> Sequence[render_pb2.Base]:
        """The bases the server holds."""
        with errors(self.address):
            return list(self._render.ListBases(render_pb2.ListBasesRequest(), timeout=self._timeout).bases)

    def render(self, prompt: str, **settings: Any) -> Rendering:
        """Starts a render; the settings are those of `render_request`."""
        call = self._render.Render(render_request(prompt, **settings), timeout=self._timeout)
        return Rendering(call, self.address)

    def replay(self, png: bytes) -> Rendering:
        """Renders the manifest inside a PNG again."""
        call = self._render.Replay(render_pb2.ReplayRequest(png=png), timeout=self._timeout)
        return Rendering(call, self.address)
