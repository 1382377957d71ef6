"""RenderService: pictures over gRPC, through the scheduler."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf import json_format

from atelier.v1 import compose_pb2, render_pb2, render_pb2_grpc
from compose import manifest
from compose.calibrate import PICTURES, STEPS, reads
from compose.errors import IncompatibleBase
from compose.methods import Parameters
from compose.render import COUNT_LIMIT, Rendered, Settings
from compose.weights import AS_TRAINED
from server import choosing, convert, scheduler
from server.calibrations import Calibration, Calibrations
from server.checkin import LORA
from server.choosing import Chooser, Trial
from server.engine import BaseInfo, Measuring, Work
from server.errors import BadRequest, answering
from server.pinned import Pinned, entries, fill
from server.scheduler import Job, Outbox, Scheduler
from server.stacks import Stacks

CHUNK = 256 << 10
PREVIEW_LIMIT = 1000
VERSION = 1


class RenderServicer(render_pb2_grpc.RenderServiceServicer):
    """Renders on one engine's base."""

    def __init__(
        self,
        stacks: Stacks,
        queue: Scheduler,
        info: BaseInfo,
        calibrations: Calibrations,
        chooser: Chooser,
    ) -> None:
        self._stacks, self._calibrations, self._chooser = stacks, calibrations, chooser
        self._queue = queue
        self._info = info

    async def Render(
        self, request: render_pb2.RenderRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[render_pb2.RenderResponse]:
        async with answering(context):
            self._check_base(request.base)
            if not 0 <= request.preview_every <= PREVIEW_LIMIT:
                raise BadRequest(
                    f"preview_every {request.preview_every} is not within 0 and {PREVIEW_LIMIT}",
                    field="preview_every",
                )
            method, parameters = convert.method(request.method)
            refs = convert.stack(request.stack)
            stack = await asyncio.to_thread(
                self._stacks.pin, refs, method=method, parameters=parameters, bare=True
            )
            settings = self._settings(request, _saved(stack) if len(refs) == 1 else {})
            settings.check(self._info.granularity)
            settings = replace(settings, prompt=fill(settings.prompt, stack))
            settings.check(self._info.granularity)  # the prompt has grown
            async for response in self._run(
                settings, stack, method, parameters, context=context, preview_every=request.preview_every
            ):
                yield response

    async def Replay(
        self, request: render_pb2.ReplayRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[render_pb2.RenderResponse]:
        async with answering(context):
            source = request.WhichOneof("source")
            if source is None:
                raise BadRequest("give a PNG or a manifest to replay", field="source")
            text = request.manifest_json
            if source == "png":
                text = await asyncio.to_thread(manifest.from_png, request.png)
            told = manifest.parse(text)
            if told["base"].get("name") != self._info.base.name:
                raise IncompatibleBase(
                    f"this picture was made on {told['base'].get('name')!r}, "
                    f"this server has {self._info.base.name}",
                    field="base",
                )
            settings = Settings(
                **{name: told[name] for name in ("prompt", "negative_prompt", "seed", "steps", "guidance")},
                width=told["width"],
                height=told["height"],
            )
            settings.check(self._info.granularity)
            method, parameters = _method(told["method"])
            stack = await asyncio.to_thread(
                self._stacks.repin, told["stack"], method=method, parameters=parameters
            )
            differences = manifest.differences(told, self._info.base.digest, self._info.environment)
            differences += [
                f"{p.version.ref} was calibrated otherwise"
                for p, entry in zip(stack, told["stack"], strict=True)
                if p.moments != entry.get("moments", "")
            ]
            async for response in self._run(
                settings, stack, method, parameters, context=context, differences=differences
            ):
                yield response

    async def Calibrate(
        self, request: render_pb2.CalibrateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[render_pb2.CalibrateResponse]:
        async with answering(context):
            pictures = request.pictures if request.HasField("pictures") else PICTURES
            if not 1 <= pictures <= COUNT_LIMIT:
                raise BadRequest(f"pictures {pictures} is not within 1 and {COUNT_LIMIT}", field="pictures")
            steps = request.steps if request.HasField("steps") else STEPS
            stack = await asyncio.to_thread(
                self._stacks.pin, [(request.ref, AS_TRAINED)], method="naive", parameters=Parameters()
            )
            pinned = stack[0]
            if pinned.via or pinned.version.kind != LORA:
                raise BadRequest(f"{request.ref} is no LoRA: only those are calibrated", field="ref")
            told = [fill(prompt, stack) for prompt in request.prompts]
            if not told and not pinned.triggers:
                raise BadRequest(
                    f"{pinned.version.ref} has no trigger word; give prompts that call it", field="prompts"
                )
            known = None
            if not (request.again or told):
                known = await asyncio.to_thread(self._calibrations.of, pinned.version)
            if known:
                yield _calibrated(pinned, known, (), self._info, known=True)
                return
            told = told or self._calibrations.prompts(pinned.triggers[0], pictures)
            told = [told[i % len(told)] for i in range(pictures)]
            size = self._info.size
            settings = Settings(
                prompt="", steps=steps, guidance=self._info.base.guidance, width=size, height=size
            )
            for prompt in dict.fromkeys(told):
                replace(settings, prompt=prompt).check(self._info.granularity)
            composition = await asyncio.to_thread(
                self._stacks.compose,
                stack,
                self._info.base.family,
                method="naive",
                parameters=Parameters(),
            )
            job = Job(Measuring(settings, composition, tuple(told)), Outbox(), _deadline(context))
            try:
                before = self._queue.submit(job)
                yield render_pb2.CalibrateResponse(queued=render_pb2.Queued(position=before))
                async for event in job.outbox.events():
                    match event:
                        case scheduler.Step(image, step):
                            progress = render_pb2.StepProgress(image=image, step=step, steps=steps)
                            yield render_pb2.CalibrateResponse(step=progress)
                        case scheduler.Done(dict() as moments):
                            kept = await asyncio.to_thread(
                                self._calibrations.keep, pinned.version, moments, told
                            )
                            yield _calibrated(pinned, kept, told, self._info)
            finally:
                self._queue.cancel(job)

    async def Tune(
        self, request: render_pb2.TuneRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[render_pb2.TuneResponse]:
        async with answering(context):
            refs = convert.stack(request.stack)
            stack = await asyncio.to_thread(self._stacks.pin, refs, method="naive", parameters=Parameters())
            question = await asyncio.to_thread(
                self._chooser.question,
                stack,
                prompts=request.prompts,
                pictures=request.pictures if request.HasField("pictures") else choosing.PICTURES,
                steps=request.steps if request.HasField("steps") else choosing.STEPS,
                weights=request.weights,
            )
            for prompt in dict.fromkeys(question.prompts):
                Settings(prompt=prompt, steps=question.steps).check(1)
            trials: list[Trial] = []
            async for trial in self._chooser.trials(question, _deadline(context)):
                trials.append(trial)
                yield render_pb2.TuneResponse(trial=_trial(trial))
            best = max(trials, key=lambda trial: trial.value)
            png = await asyncio.to_thread(lambda: manifest.to_png(choosing.sheet(trials, question)))
            yield render_pb2.TuneResponse(
                summary=render_pb2.TuneSummary(
                    best=_trial(best),
                    naive=_trial(trials[0]),
                    prompts=dict.fromkeys(question.prompts),
                    scorer=self._chooser.scorer(question),
                    picture=png,
                )
            )

    async def ListBases(
        self, request: render_pb2.ListBasesRequest, context: grpc.aio.ServicerContext
    ) -> render_pb2.ListBasesResponse:
        del request, context
        info = self._info
        base = render_pb2.Base(
            name=info.base.name,
            family=info.base.family,
            digest=info.base.digest,
            device=info.device,
            dtype=info.dtype,
            modules=info.modules,
            width=info.size,
            height=info.size,
            steps=info.base.steps,
            guidance=info.base.guidance,
        )
        return render_pb2.ListBasesResponse(bases=[base])

    def _check_base(self, name: str) -> None:
        if name not in {"", self._info.base.name}:
            raise BadRequest(f"this server has no base {name!r}; it has {self._info.base.name}", field="base")

    def _settings(self, request: render_pb2.RenderRequest, saved: Mapping[str, Any]) -> Settings:
        base, size = self._info.base, self._info.size
        return Settings(
            prompt=request.prompt or saved.get("prompt", ""),
            negative_prompt=request.negative_prompt or saved.get("negative_prompt", ""),
            seed=request.seed if request.HasField("seed") else random.getrandbits(32),
            steps=request.steps if request.HasField("steps") else saved.get("steps", base.steps),
            guidance=request.guidance
            if request.HasField("guidance")
            else saved.get("guidance", base.guidance),
            width=request.width if request.HasField("width") else size,
            height=request.height if request.HasField("height") else size,
            count=request.count if request.HasField("count") else 1,
        )

    async def _run(
        self,
        settings: Settings,
        stack: tuple[Pinned, ...],
        method: str,
        parameters: Parameters,
        *,
        context: grpc.aio.ServicerContext,
        preview_every: int = 0,
        differences: list[str] | None = None,
    ) -> AsyncIterator[render_pb2.RenderResponse]:
        """Composes, queues, and tells the caller what happens. Leaving the generator cancels the job."""
        deadline = _deadline(context)
        start = time.perf_counter()
        composition = await asyncio.to_thread(
            self._stacks.compose, stack, self._info.base.family, method=method, parameters=parameters
        )
        seconds = {"compose": time.perf_counter() - start}
        job = Job(Work(settings, composition, preview_every), Outbox(), deadline)
        try:
            before = self._queue.submit(job)
            yield render_pb2.RenderResponse(queued=render_pb2.Queued(position=before))
            manifests: list[str] = []
            async for event in job.outbox.events():
                match event:
                    case scheduler.Started(waited):
                        seconds["queue"] = waited
                        yield render_pb2.RenderResponse(
                            started=render_pb2.Started(queue_seconds=waited, prompt=settings.prompt)
                        )
                    case scheduler.Step(image, step):
                        progress = render_pb2.StepProgress(image=image, step=step, steps=settings.steps)
                        yield render_pb2.RenderResponse(step=progress)
                    case scheduler.Preview(image, step, picture):
                        png = await asyncio.to_thread(manifest.to_png, picture)
                        yield render_pb2.RenderResponse(
                            preview=render_pb2.Preview(image=image, step=step, png=png)
                        )
                    case scheduler.Finished(image, picture):
                        begun = time.perf_counter()
                        text = self._manifest(settings, image, stack, method, parameters)
                        manifests.append(text)
                        png = await asyncio.to_thread(manifest.to_png, picture, text)
                        seconds["encode"] = seconds.get("encode", 0.0) + time.perf_counter() - begun
                        for chunk in _chunks(image, png):
                            yield render_pb2.RenderResponse(image=chunk)
                    case scheduler.Done(Rendered() as rendered):
                        yield render_pb2.RenderResponse(
                            summary=render_pb2.RenderSummary(
                                manifest_json=manifests,
                                seconds={**seconds, **rendered.seconds},
                                differences=differences or [],
                                warnings=_warnings(rendered, self._info),
                            )
                        )
        finally:
            self._queue.cancel(job)

    def _manifest(
        self, settings: Settings, image: int, stack: tuple[Pinned, ...], method: str, parameters: Parameters
    ) -> str:
        info = self._info
        told = {name: getattr(parameters, name) for name in sorted(parameters.given())}
        return json.dumps(
            {
                "manifest": VERSION,
                "base": {"name": info.base.name, "digest": info.base.digest},
                "stack": entries(stack),
                "method": {"name": method, **told},
                "prompt": settings.prompt,
                "negative_prompt": settings.negative_prompt,
                "seed": settings.seed + image,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "width": settings.width,
                "height": settings.height,
                "scheduler": info.scheduler,
                "environment": info.environment,
            },
            sort_keys=True,
            ensure_ascii=False,
        )


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _trial(trial: Trial) -> render_pb2.Trial:
    return render_pb2.Trial(
        method=convert.told(trial.method, trial.parameters),
        stack=[convert.weighted(p.version.ref, p.weight) for p in trial.stack],
        retention=trial.retention,
        value=trial.value,
    )


def _calibrated(
    pinned: Pinned, found: Calibration, told: Sequence[str], info: BaseInfo, *, known: bool = False
) -> render_pb2.CalibrateResponse:
    return render_pb2.CalibrateResponse(
        summary=render_pb2.CalibrateSummary(
            ref=pinned.version.ref,
            base=info.base.name,
            prompts=dict.fromkeys(told),
            inputs=len(set(map(reads, found.moments))),
            digest=found.digest,
            known=known,
        )
    )


def _saved(stack: Sequence[Pinned]) -> Mapping[str, Any]:
    """The document of the saved stack that was asked for; {} when something else was."""
    via = stack[0].via
    return via.facts["stack"] if via else {}


def _warnings(rendered: Rendered, info: BaseInfo) -> list[str]:
    if not rendered.tokens_dropped:
        return []
    return [
        f"the prompt is too long: {info.base.name} did not read its last {rendered.tokens_dropped} tokens"
    ]


def _method(told: Mapping[str, Any]) -> tuple[str, Parameters]:
    try:
        return convert.method(json_format.ParseDict(dict(told), compose_pb2.Method()))
    except (json_format.ParseError, ValueError, OverflowError) as error:
        raise BadRequest(f"the manifest's method is damaged: {error}", field="manifest_json") from None


def _chunks(image: int, png: bytes) -> list[render_pb2.ImageChunk]:
    return [
        render_pb2.ImageChunk(image=image, data=png[i : i + CHUNK], last=i + CHUNK >= len(png))
        for i in range(0, len(png), CHUNK)
    ]
