"""The Python client: thin, typed, over one channel (`atelier.aio` is the same over grpc.aio).

    with Client("127.0.0.1:7431") as atelier:
        atelier.check_in(Path("hero.safetensors"), name="hero", base="pocket")
        for picture in atelier.render("a photo of {hero}", stack={"hero": 0.8}, seed=7).pictures():
            Path(f"{picture.index}.png").write_bytes(picture.png)

Reading calls are retried while the server cannot be reached (gRPC's own retries), and files on their way
go on where they were cut; nothing else is done twice. Every failure is an `AtelierError` with the gRPC status
code and a message that says what to do.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from atelier import calls
from atelier.channels import channel, stubs
from atelier.landing import Landing
from atelier.messages import (
    PAUSES,
    RESTART,
    AtelierError,
    Picture,
    Progress,
    Stack,
    address_of,
    check_in_header,
    check_in_parts,
    control,
    errors,
    list_request,
    method,
    reference,
    render_request,
    signature,
)
from atelier.publishing import Publishing
from atelier.renders import Rendering
from atelier.sweeps import Gathering, Seen, Sweep, Told, axis, sweep_request
from atelier.v1 import (
    catalog_pb2,
    compose_pb2,
    engine_pb2,
    jobs_pb2,
    render_pb2,
    sweep_pb2,
)

__all__ = [
    "AtelierError",
    "Client",
    "Picture",
    "Progress",
    "Rendering",
    "Stack",
    "Sweep",
    "axis",
    "control",
    "method",
    "reference",
    "render_request",
]


T = TypeVar("T")


class Client(Publishing):
    """A connection to a server; `address` defaults to ATELIER_SERVER, then to 127.0.0.1:7431, `timeout` of
    each call in seconds to none. Raises AtelierError for an address that is none, ValueError for a timeout.
    """

    def __init__(self, address: str = "", *, timeout: float | None = None) -> None:
        self.address = address_of(address)
        self._timeout = calls.patience(timeout)
        self._channel = channel(self.address)
        self._stubs = stubs(self._channel)
        self._catalog, self._compose = self._stubs["catalog"], self._stubs["compose"]
        self._render, self._sweeps = self._stubs["render"], self._stubs["sweeps"]
        self._hub, self._jobs, self._engine = (self._stubs[name] for name in ("hub", "jobs", "engine"))

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def _call(self) -> dict[str, Any]:
        return {"timeout": self._timeout, "metadata": signature()}

    def _ask(self, asked: calls.Unary[T]) -> T:
        with errors(self.address):
            return asked.pick(getattr(self._stubs[asked.service], asked.rpc)(asked.request, **self._call()))

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
                        header.offset = self._ask(calls.get_upload(header.request_id))
                    with errors(self.address):
                        return self._catalog.CheckIn(
                            check_in_parts(file, header, progress),
                            **self._call(),
                        )
                except AtelierError as error:
                    if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None or not file.tell():
                        raise
                    time.sleep(pause)
        raise AssertionError  # the last attempt returned or raised

    def get(self, ref: str) -> catalog_pb2.GetVersionResponse:
        """A version with its card."""
        return self._ask(calls.get(ref))

    def list(self, text: str = "", **question: Any) -> Iterator[catalog_pb2.Version]:
        """The newest version of every asset, in order of name; with a question (`messages.list_request`)
        only of those that answer it.
        """
        token = ""
        while True:
            request = list_request(text, page_token=token, **question)
            page = self._ask(calls.page(request))
            yield from page.versions
            if not (token := page.next_page_token):
                return

    def history(self, name: str) -> Sequence[catalog_pb2.Version]:
        """Every version of an asset, newest first."""
        return self._ask(calls.history(name))

    def set_alias(
        self, name: str, alias: str, number: int = 0, *, expected: int | None = None
    ) -> catalog_pb2.SetAliasResponse:
        """Points an alias at a version, or reads it (number 0). With `expected`, only if it names that
        version now.
        """
        return self._ask(calls.set_alias(name, alias, number, expected))

    def delete(self, ref: str) -> catalog_pb2.Version:
        """Hides a version; `undelete` brings it back until a garbage collection has purged it."""
        return self._ask(calls.delete(ref))

    def undelete(self, ref: str) -> catalog_pb2.Version:
        """Brings a deleted version back, by `hero:3`."""
        return self._ask(calls.undelete(ref))

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
        return self._ask(calls.collect_garbage(dry_run, retention, grace))

    def watch(self, since: int = 0, *, wait: bool = True) -> Iterator[catalog_pb2.WatchEventsResponse]:
        """Changes after the event numbered `since`, then those to come; leaving the loop ends it. While the
        server starts anew it waits, and goes on.
        """
        pauses = iter(RESTART[:0])  # before anybody has answered there is nothing to go on with
        while True:
            request = catalog_pb2.WatchEventsRequest(since=since, no_wait=not wait)
            call = self._catalog.WatchEvents(request, **self._call())
            try:
                with errors(self.address):
                    if call.initial_metadata():
                        pauses = iter(RESTART)
                    for event in call:
                        since = event.seq
                        yield event
                    return
            except AtelierError as error:
                pause = next(pauses, None)
                if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None or not wait:
                    raise
                time.sleep(pause)
            finally:
                call.cancel()

    def download(self, ref: str, path: Path, *, progress: Progress | None = None) -> catalog_pb2.Version:
        """Writes a version's exact bytes, checked against its digest, to `path`; nothing is there until all
        of it is. What a cut download left beside it is gone on from.
        """
        version = self.get(ref).version
        with Landing(version, path, progress=progress) as landing:
            for pause in (*PAUSES, None):
                try:
                    with errors(self.address):
                        for answer in self._catalog.Download(landing.request(), **self._call()):
                            landing.write(answer)
                    break
                except AtelierError as error:
                    if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None:
                        raise
                    time.sleep(pause)
            landing.finish()
        return version

    def set_card(
        self, ref: str, card: bytes, *, expected_card_digest: str | None = None
    ) -> catalog_pb2.SetCardResponse:
        """Gives a version another card; with `expected_card_digest`, only if that is its card now."""
        return self._ask(calls.set_card(ref, card, expected_card_digest))

    def cards(self, ref: str) -> Sequence[catalog_pb2.CardRevision]:
        """Every card a version had, newest first."""
        return self._ask(calls.cards(ref))

    def add_preview(self, ref: str, image: bytes, *, caption: str = "") -> catalog_pb2.PreviewImage:
        """Shows a picture with a version."""
        return self._ask(calls.add_preview(ref, image, caption))

    def remove_preview(self, ref: str, digest: str) -> Sequence[catalog_pb2.PreviewImage]:
        """Shows a picture no more; those that are left."""
        return self._ask(calls.remove_preview(ref, digest))

    def preview(self, ref: str, digest: str = "") -> bytes:
        """A picture shown with a version, as a PNG; the first when none is said."""
        return self._ask(calls.preview(ref, digest))

    def similar(self, ref: str, *, at_least: float | None = None) -> Sequence[catalog_pb2.Similar]:
        """Versions whose weights point the same way, the nearest first."""
        return self._ask(calls.similar(ref, at_least))

    def merge(
        self,
        stack: Stack,
        *,
        name: str,
        method: compose_pb2.Method | None = None,
        alias: str = "",
        base: str = "",
    ) -> compose_pb2.MergeResponse:
        """Merges a stack into a new version of `name`; `base` is where `auto` and calibrations look."""
        return self._ask(calls.merge(stack, name, method, alias, base))

    def inspect(
        self, stack: Stack, *, picture: bool = False, layers: bool = False, base: str = ""
    ) -> compose_pb2.InspectStackResponse:
        """Who fights whom in a stack, where, and what to do; with `picture` a heat map, too, with `layers`
        every layer.
        """
        return self._ask(calls.inspect(stack, picture=picture, layers=layers, base=base))

    def remake(self, ref: str) -> compose_pb2.RemakeResponse:
        """Makes a merged version again from its recipe; whether the bytes are the same."""
        return self._ask(calls.remake(ref))

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
        return self._ask(asked)

    def compare(self, before: str, after: str) -> compose_pb2.CompareVersionsResponse:
        """How far two LoRAs are apart, layer by layer."""
        return self._ask(calls.compare(before, after))

    def methods(self) -> Sequence[compose_pb2.MethodInfo]:
        """The merge methods."""
        return self._ask(calls.methods())

    def bases(self) -> Sequence[render_pb2.Base]:
        """The bases the server holds."""
        return self._ask(calls.bases())

    def status(self) -> engine_pb2.Status:
        """What the machine is doing."""
        return self._ask(calls.status())

    def watch_status(self, interval: float = 1.0) -> Iterator[engine_pb2.Status]:
        """The same every `interval` seconds; leaving the loop ends it."""
        request = engine_pb2.WatchStatusRequest(interval_seconds=interval)
        call = self._engine.WatchStatus(request, **self._call())
        try:
            with errors(self.address):
                yield from call
        finally:
            call.cancel()

    def render(self, prompt: str, **settings: Any) -> Rendering:
        """Starts a render; the settings are those of `render_request`."""
        call = self._render.Render(render_request(prompt, **settings), **self._call())
        return Rendering(call, self.address)

    def replay(self, png: bytes, **pictures: Any) -> Rendering:
        """Renders the manifest inside a PNG again; `pictures` (image, mask, controls, references) are those
        that it was made with.
        """
        request = calls.replay(png, **pictures)
        call = self._render.Replay(request, **self._call())
        return Rendering(call, self.address)

    def create_job(self, prompt: str, *, request_id: str = "", **settings: Any) -> jobs_pb2.Job:
        """Keeps a render as a job, with the settings of `render_request`; the same `request_id` again is the
        same job.
        """
        return self._ask(calls.create_job(prompt, request_id, settings))

    def get_job(self, name: str) -> jobs_pb2.Job:
        """A job as it stands."""
        return self._ask(calls.get_job(name))

    def jobs(self, *, state: str = "", creator: str = "") -> Iterator[jobs_pb2.Job]:
        """Jobs, the newest first; those in a state (`queued`, `running`, `done`, `failed`, `cancelled`), or
        of a creator.
        """
        token = ""
        while True:
            page = self._ask(calls.job_page(state, creator, token))
            yield from page.jobs
            token = page.next_page_token
            if not token:
                return

    def cancel_job(self, name: str) -> jobs_pb2.Job:
        """Calls a job off; its finished pictures stay."""
        return self._ask(calls.cancel_job(name))

    def delete_job(self, name: str) -> None:
        """Forgets a job and its pictures."""
        return self._ask(calls.delete_job(name))

    def watch_job(self, name: str, after: int = 0) -> Iterator[jobs_pb2.JobEvent]:
        """What happened to a job after the event numbered `after`, then what happens, until it is over. While
        the server starts anew it waits, and goes on.
        """
        pauses = iter(RESTART[:0])
        while True:
            request = jobs_pb2.WatchJobRequest(name=name, after_sequence=after)
            call = self._jobs.WatchJob(request, **self._call())
            try:
                with errors(self.address):
                    if call.initial_metadata():
                        pauses = iter(RESTART)
                    for event in call:
                        after = event.sequence
                        yield event
                    return
            except AtelierError as error:
                pause = next(pauses, None)
                if error.code is not grpc.StatusCode.UNAVAILABLE or pause is None:
                    raise
                time.sleep(pause)
            finally:
                call.cancel()

    def job_image(self, name: str, image: int = 0) -> bytes:
        """A finished picture of a job, as a PNG."""
        request = jobs_pb2.GetJobImageRequest(name=name, image=image)
        with errors(self.address):
            return b"".join(part.data for part in self._jobs.GetJobImage(request, **self._call()))

    def save_as(
        self, ref: str, layout: str = "diffusers", *, left_out: calls.LeftOut | None = None
    ) -> dict[str, bytes]:
        """A LoRA's files in the layout of another program (`diffusers`, `kohya`, `peft`), by name; `left_out`
        is told what of it is in no layer, and so in none of them.
        """
        files: dict[str, bytearray] = {}
        with errors(self.address):
            for part in self._compose.ExportAdapter(calls.save_as(ref, layout), **self._call()):
                files.setdefault(part.file, bytearray()).extend(part.chunk)
                if left_out and part.left_out:
                    left_out(part.left_out)
        return {name: bytes(data) for name, data in files.items()}

    def calibrate(
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
            for event in self._render.Calibrate(request, **self._call()):
                summary = calls.calibrated(event, told.get("pictures"), progress)
        return summary or render_pb2.CalibrateSummary()

    def tune(
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
            for event in self._render.Tune(request, **self._call()):
                summary = calls.tuned(event, tried)
        return summary or render_pb2.TuneSummary()

    def sweep(
        self,
        prompt: str = "",
        *,
        axes: Sequence[sweep_pb2.Axis],
        told: Told | None = None,
        seen: Seen | None = None,
        **settings: Any,
    ) -> Sweep:
        """Renders one request again and again while one or two things (`axis`) vary, and draws the grid;
        `told` hears of progress, `seen` gets every finished cell. The settings are those of `render_request`.
        """
        gathering = Gathering(told, seen)
        call = self._sweeps.Sweep(sweep_request(prompt, axes, **settings), **self._call())
        try:
            with errors(self.address):
                for event in call:
                    gathering.take(event)
        finally:
            call.cancel()
        return gathering.sweep
