"""The Python client over grpc.aio, for pipelines that wait for many renders at once; every call of
`atelier.client` is here.

    async with AsyncClient("127.0.0.1:7431") as atelier:
        pngs = await asyncio.gather(*(atelier.render(prompt, stack={"hero": 0.8}) for prompt in prompts))
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from atelier import calls
from atelier.channels import aio_channel, stubs
from atelier.landing import Landing
from atelier.messages import (
    PAUSES,
    RESTART,
    AtelierError,
    Part,
    Picture,
    Progress,
    Stack,
    address_of,
    assemble,
    check_in_header,
    check_in_parts,
    errors,
    list_request,
    render_request,
    signature,
)
from atelier.publishing import AsyncPublishing
from atelier.sweeps import Gathering, Seen, Sweep, Told, sweep_request
from atelier.v1 import (
    catalog_pb2,
    compose_pb2,
    engine_pb2,
    jobs_pb2,
    render_pb2,
    sweep_pb2,
)

T = TypeVar("T")


class AsyncClient(AsyncPublishing):
    """A connection to a server; what `Client` does, with `await`. A render's pictures come together, its
    events one by one (`events`).
    """

    def __init__(self, address: str = "", *, timeout: float | None = None) -> None:
        self.address = address_of(address)
        self._timeout = calls.patience(timeout)
        self._channel = aio_channel(self.address)
        self._stubs = stubs(self._channel)
        self._catalog, self._compose = self._stubs["catalog"], self._stubs["compose"]
        self._render, self._sweeps = self._stubs["render"], self._stubs["sweeps"]
        self._hub, self._jobs, self._engine = (self._stubs[name] for name in ("hub", "jobs", "engine"))

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    def _call(self) -> dict[str, Any]:
        return {"timeout": self._timeout, "metadata": signature()}

    async def _ask(self, asked: calls.Unary[T]) -> T:
        with errors(self.address):
            rpc = getattr(self._stubs[asked.service], asked.rpc)
            return asked.pick(await rpc(asked.request, **self._call()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

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
        progress: Progress | None = None,
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
        with path.open("rb") as file:
            for pause in (*PAUSES, None):
                try:
                    if pause != PAUSES[0] or request_id:
                        header.offset = await self._ask(calls.get_upload(header.request_id))
                    parts = check_in_parts(file, header, progress)

                    async def requests(
                        parts: Iterator[Part] = parts,
                    ) -> AsyncIterator[Part]:
                        while part := await asyncio.to_thread(next, parts, None):
                            yield part

                    with errors(self.address):
                        return await self._catalog.CheckIn(requests(), **self._call())
                except AtelierError as error:
                    if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None or not file.tell():
                        raise
                    await asyncio.sleep(pause)
        raise AssertionError  # the last attempt returned or raised

    async def get(self, ref: str) -> catalog_pb2.GetVersionResponse:
        """A version with its card."""
        return await self._ask(calls.get(ref))

    async def list(self, text: str = "", **question: Any) -> AsyncIterator[catalog_pb2.Version]:
        """The newest version of every asset that answers the question (`messages.list_request`), by name."""
        token = ""
        while True:
            page = await self._ask(calls.page(list_request(text, page_token=token, **question)))
            for version in page.versions:
                yield version
            if not (token := page.next_page_token):
                return

    async def history(self, name: str) -> Sequence[catalog_pb2.Version]:
        """Every version of an asset, newest first."""
        return await self._ask(calls.history(name))

    async def set_alias(
        self, name: str, alias: str, number: int = 0, *, expected: int | None = None
    ) -> catalog_pb2.SetAliasResponse:
        """Points an alias at a version, or reads it (number 0). With `expected`, only from that version."""
        return await self._ask(calls.set_alias(name, alias, number, expected))

    async def delete(self, ref: str) -> catalog_pb2.Version:
        """Hides a version; `undelete` brings it back until a garbage collection has purged it."""
        return await self._ask(calls.delete(ref))

    async def undelete(self, ref: str) -> catalog_pb2.Version:
        """Brings a deleted version back, by `hero:3`."""
        return await self._ask(calls.undelete(ref))

    async def collect_garbage(
        self,
        *,
        dry_run: bool = False,
        retention: timedelta = timedelta(days=30),
        grace: timedelta = timedelta(days=1),
    ) -> catalog_pb2.CollectGarbageResponse:
        """Purges versions deleted longer than `retention` ago and files nobody names, none younger than
        `grace`.
        """
        return await self._ask(calls.collect_garbage(dry_run, retention, grace))

    async def watch(
        self, since: int = 0, *, wait: bool = True
    ) -> AsyncIterator[catalog_pb2.WatchEventsResponse]:
        """Changes after the event numbered `since`, then those to come; leaving the loop ends it. While the
        server starts anew it waits, and goes on.
        """
        pauses = iter(RESTART[:0])  # before anybody has answered there is nothing to go on with
        while True:
            request = catalog_pb2.WatchEventsRequest(since=since, no_wait=not wait)
            call = self._catalog.WatchEvents(request, **self._call())
            try:
                with errors(self.address):
                    if await call.initial_metadata():
                        pauses = iter(RESTART)
                    async for event in call:
                        since = event.seq
                        yield event
                    return
            except AtelierError as error:
                pause = next(pauses, None)
                if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None or not wait:
                    raise
                await asyncio.sleep(pause)
            finally:
                call.cancel()

    async def download(
        self, ref: str, path: Path, *, progress: Progress | None = None
    ) -> catalog_pb2.Version:
        """Writes a version's exact bytes, checked against its digest, to `path`; nothing is there until all
        of it is. What a cut download left beside it is gone on from.
        """
        version = (await self.get(ref)).version
        with await asyncio.to_thread(Landing, version, path, progress=progress) as landing:
            for pause in (*PAUSES, None):
                try:
                    with errors(self.address):
                        async for answer in self._catalog.Download(landing.request(), **self._call()):
                            await asyncio.to_thread(landing.write, answer)
                    break
                except AtelierError as error:
                    if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None:
                        raise
                    await asyncio.sleep(pause)
            landing.finish()
        return version

    async def set_card(
        self, ref: str, card: bytes, *, expected_card_digest: str | None = None
    ) -> catalog_pb2.SetCardResponse:
        """Gives a version another card; with `expected_card_digest`, only if that is its card now."""
        return await self._ask(calls.set_card(ref, card, expected_card_digest))

    async def cards(self, ref: str) -> Sequence[catalog_pb2.CardRevision]:
        """Every card a version had, newest first."""
        return await self._ask(calls.cards(ref))

    async def add_preview(self, ref: str, image: bytes, *, caption: str = "") -> catalog_pb2.PreviewImage:
        """Shows a picture with a version."""
        return await self._ask(calls.add_preview(ref, image, caption))

    async def remove_preview(self, ref: str, digest: str) -> Sequence[catalog_pb2.PreviewImage]:
        """Shows a picture no more; those that are left."""
        return await self._ask(calls.remove_preview(ref, digest))

    async def preview(self, ref: str, digest: str = "") -> bytes:
        """A picture shown with a version, as a PNG; the first when none is said."""
        return await self._ask(calls.preview(ref, digest))

    async def similar(self, ref: str, *, at_least: float | None = None) -> Sequence[catalog_pb2.Similar]:
        """Versions whose weights point the same way, the nearest first."""
        return await self._ask(calls.similar(ref, at_least))

    async def merge(
        self,
        stack: Stack,
        *,
        name: str,
        method: compose_pb2.Method | None = None,
        alias: str = "",
        base: str = "",
    ) -> compose_pb2.MergeResponse:
        """Merges a stack into a new version of `name`; `base` is where `auto` and calibrations look."""
        return await self._ask(calls.merge(stack, name, method, alias, base))

    async def inspect(
        self, stack: Stack, *, picture: bool = False, layers: bool = False, base: str = ""
    ) -> compose_pb2.InspectStackResponse:
        """Who fights whom in a stack, where, and what to do; with `picture` a heat map, too, with `layers`
        every layer.
        """
        return await self._ask(calls.inspect(stack, picture=picture, layers=layers, base=base))

    async def remake(self, ref: str) -> compose_pb2.RemakeResponse:
        """Makes a merged version again from its recipe; whether the bytes are the same."""
        return await self._ask(calls.remake(ref))

    async def save_stack(
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
        asked = calls.save_stack(
            stack,
            name=name,
            alias=alias,
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            dry_run=dry_run,
        )
        return await self._ask(asked)

    async def compare(self, before: str, after: str) -> compose_pb2.CompareVersionsResponse:
        """How far two LoRAs are apart, layer by layer."""
        return await self._ask(calls.compare(before, after))

    async def methods(self) -> Sequence[compose_pb2.MethodInfo]:
        """The merge methods."""
        return await self._ask(calls.methods())

    async def bases(self) -> Sequence[render_pb2.Base]:
        """The bases the server holds."""
        return await self._ask(calls.bases())

    async def create_job(self, prompt: str, *, request_id: str = "", **settings: Any) -> jobs_pb2.Job:
        """Keeps a render as a job, with the settings of `render_request`; the same `request_id` again is the
        same job.
        """
        return await self._ask(calls.create_job(prompt, request_id, settings))

    async def get_job(self, name: str) -> jobs_pb2.Job:
        """A job as it stands."""
        return await self._ask(calls.get_job(name))

    async def jobs(self, *, state: str = "", creator: str = "") -> AsyncIterator[jobs_pb2.Job]:
        """Jobs, the newest first; those in a state (`queued`, `running`, `done`, `failed`, `cancelled`), or
        of a creator.
        """
        token = ""
        while True:
            page = await self._ask(calls.job_page(state, creator, token))
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return

    async def cancel_job(self, name: str) -> jobs_pb2.Job:
        """Calls a job off; its finished pictures stay."""
        return await self._ask(calls.cancel_job(name))

    async def delete_job(self, name: str) -> None:
        """Forgets a job and its pictures."""
        return await self._ask(calls.delete_job(name))

    async def watch_job(self, name: str, after: int = 0) -> AsyncIterator[jobs_pb2.JobEvent]:
        """What happened to a job after the event numbered `after`, then what happens, until it is over. While
        the server starts anew it waits, and goes on.
        """
        pauses = iter(RESTART[:0])
        while True:
            request = jobs_pb2.WatchJobRequest(name=name, after_sequence=after)
            call = self._jobs.WatchJob(request, **self._call())
            try:
                with errors(self.address):
                    if await call.initial_metadata():
                        pauses = iter(RESTART)
                    async for event in call:
                        after = event.sequence
                        yield event
                    return
            except AtelierError as error:
                pause = next(pauses, None)
                if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None:
                    raise
                await asyncio.sleep(pause)
            finally:
                call.cancel()

    async def job_image(self, name: str, image: int = 0) -> bytes:
        """A finished picture of a job, as a PNG."""
        request = jobs_pb2.GetJobImageRequest(name=name, image=image)
        with errors(self.address):
            return b"".join([part.data async for part in self._jobs.GetJobImage(request, **self._call())])

    async def status(self) -> engine_pb2.Status:
        """What the machine is doing."""
        return await self._ask(calls.status())

    async def watch_status(self, interval: float = 1.0) -> AsyncIterator[engine_pb2.Status]:
        """The same every `interval` seconds; leaving the loop ends it."""
        request = engine_pb2.WatchStatusRequest(interval_seconds=interval)
        call = self._engine.WatchStatus(request, **self._call())
        try:
            with errors(self.address):
                async for status in call:
                    yield status
        finally:
            call.cancel()

    async def save_as(
        self, ref: str, layout: str = "diffusers", *, left_out: calls.LeftOut | None = None
    ) -> dict[str, bytes]:
        """A LoRA's files in the layout of another program (`diffusers`, `kohya`, `peft`), by name; `left_out`
        is told what of it is in no layer, and so in none of them.
        """
        files: dict[str, bytearray] = {}
        with errors(self.address):
            async for part in self._compose.ExportAdapter(calls.save_as(ref, layout), **self._call()):
                files.setdefault(part.file, bytearray()).extend(part.chunk)
                if left_out and part.left_out:
                    left_out(part.left_out)
        return {name: bytes(data) for name, data in files.items()}

    async def calibrate(
        self,
        ref: str,
        *,
        again: bool = False,
        progress: Progress | None = None,
        **told: Unpack[calls.Trials],
    ) -> render_pb2.CalibrateSummary:
        """Measures what flows through the base's layers while a LoRA is rendered alone."""
        request = calls.calibrate(ref, again, **told)
        summary = None
        with errors(self.address):
            async for event in self._render.Calibrate(request, **self._call()):
                summary = calls.calibrated(event, told.get("pictures"), progress)
        return summary or render_pb2.CalibrateSummary()

    async def tune(
        self,
        stack: Stack,
        *,
        weights: bool = False,
        tried: calls.Tried | None = None,
        **told: Unpack[calls.Trials],
    ) -> render_pb2.TuneSummary:
        """Looks for the method, the order and, if asked to, the weights that leave most of every adapter;
        `tried` is told every trial.
        """
        request = calls.tune(stack, weights, **told)
        summary = None
        with errors(self.address):
            async for event in self._render.Tune(request, **self._call()):
                summary = calls.tuned(event, tried)
        return summary or render_pb2.TuneSummary()

    async def sweep(
        self,
        prompt: str = "",
        *,
        axes: Sequence[sweep_pb2.Axis],
        told: Told | None = None,
        seen: Seen | None = None,
        **settings: Any,
    ) -> Sweep:
        """Renders one request again and again while one or two things (`sweeps.axis`) vary, and draws the
        grid; `told` hears of progress, `seen` gets every finished cell. The settings are those of
        `render_request`.
        """
        gathering = Gathering(told, seen)
        call = self._sweeps.Sweep(sweep_request(prompt, axes, **settings), **self._call())
        try:
            with errors(self.address):
                async for event in call:
                    gathering.take(event)
        finally:
            call.cancel()
        return gathering.sweep

    async def replay(self, png: bytes, **pictures: Any) -> bytes:
        """The picture of a manifest, rendered again; `pictures` (image, mask, controls, references) are those
        that it was made with.
        """
        request = calls.replay(png, **pictures)
        call = self._render.Replay(request, **self._call())
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
