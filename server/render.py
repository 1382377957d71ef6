"""RenderService: pictures over gRPC, through the scheduler."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

import grpc

from atelier.v1 import render_pb2, render_pb2_grpc
from compose import manifest
from compose.bases import Base
from compose.calibrate import PICTURES, STEPS, reads
from compose.methods import Parameters
from compose.settings import COUNT_LIMIT, Settings
from compose.weights import AS_TRAINED
from server import choosing, convert, outbox, rendering
from server.calibrations import Calibration, Calibrations, calling
from server.calls import current
from server.checkin import LORA
from server.choosing import Chooser, Trial
from server.engine import BaseInfo, Measuring
from server.errors import BadRequest, answering
from server.guides import Sent
from server.job import Ask
from server.layered import unmergeable
from server.orders import Order
from server.pictures import apart
from server.pinned import Pinned, fill
from server.rendering import Event, Rendering, Renderings, Summary
from server.scheduler import Scheduler
from server.spool import Spooled
from server.stacks import Stacks
from server.wanted import wanted

CHUNK = 256 << 10


class RenderServicer(render_pb2_grpc.RenderServiceServicer):
    """Renders on one engine's bases."""

    def __init__(
        self,
        stacks: Stacks,
        queue: Scheduler,
        infos: Mapping[str, BaseInfo],
        calibrations: Calibrations,
        chooser: Chooser,
        renderings: Renderings,
    ) -> None:
        self._stacks, self._calibrations, self._chooser = stacks, calibrations, chooser
        self._queue, self._infos = queue, infos
        self._renderings = renderings

    async def Render(
        self, request: render_pb2.RenderRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[render_pb2.RenderResponse]:
        async with answering(context):
            order = await asyncio.to_thread(self._renderings.order, request, convert.actor(context))
            async for answer in self._run(order, context):
                yield answer

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
            order = await asyncio.to_thread(self._renderings.again, text, Sent.again(request))
            async for answer in self._run(order, context, again=request.png):
                yield answer

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
            base = self._calibrations.served.under(stack, request.base)
            told = [fill(prompt, stack) for prompt in request.prompts]
            if not told and not pinned.triggers:
                raise BadRequest(
                    f"{pinned.version.ref} has no trigger word; give prompts that call it", field="prompts"
                )
            known = None
            if not (request.again or told):
                known = await asyncio.to_thread(self._calibrations.of, pinned.version, base)
            if known:
                yield _calibrated(pinned, known, (), base, known=True)
                return
            told = told or calling(pinned.triggers[:1], base, pictures)
            told = [told[i % len(told)] for i in range(pictures)]
            size = request.size if request.HasField("size") else base.size
            settings = Settings(prompt="", steps=steps, guidance=base.guidance, width=size, height=size)
            for prompt in dict.fromkeys(told):
                replace(settings, prompt=prompt).check(base.granularity)

            def load(check: Callable[[], None]) -> Measuring:
                composition = self._stacks.compose(
                    stack, base.family, method="naive", parameters=Parameters(), check=check
                )
                return Measuring(settings, composition, tuple(told), base.name)

            ask = Ask(what=f"calibrate {pinned.version.ref} on {len(told)} pictures", load=load)
            current().begin("queue")
            with self._queue.admit(ask, convert.calling(context)) as ticket:
                queued = render_pb2.Queued(position=ticket.position)
                yield render_pb2.CalibrateResponse(queued=queued)
                async for event in ticket.events():
                    match event:
                        case outbox.Step(image, step):
                            progress = render_pb2.StepProgress(image=image, step=step, steps=steps)
                            yield render_pb2.CalibrateResponse(step=progress)
                        case outbox.Done(dict() as moments):
                            kept = await asyncio.to_thread(
                                self._calibrations.keep, pinned.version, base, moments, told
                            )
                            yield _calibrated(pinned, kept, told, base)

    async def Tune(
        self, request: render_pb2.TuneRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[render_pb2.TuneResponse]:
        async with answering(context):
            refs = convert.stack(request.stack)
            stack = await asyncio.to_thread(self._stacks.pin, refs, method="naive", parameters=Parameters())
            with wanted() as check_wanted:
                question = await asyncio.to_thread(
                    self._chooser.question,
                    stack,
                    prompts=request.prompts,
                    pictures=request.pictures if request.HasField("pictures") else choosing.PICTURES,
                    steps=request.steps if request.HasField("steps") else choosing.STEPS,
                    weights=request.weights,
                    base=request.base,
                    size=request.size if request.HasField("size") else None,
                    wanted=check_wanted,
                )
            trials: list[Trial] = []
            async for trial in self._chooser.trials(question, convert.calling(context)):
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
                    base=question.base.name,
                    unmergeable=unmergeable(question.stack),
                    climbs=[
                        render_pb2.Climb(
                            place=c.place, weights=c.weights, retention=c.retention, chosen=c.chosen
                        )
                        for c in choosing.climbs(trials)
                    ],
                )
            )

    async def ListBases(
        self, request: render_pb2.ListBasesRequest, context: grpc.aio.ServicerContext
    ) -> render_pb2.ListBasesResponse:
        del request, context
        return render_pb2.ListBasesResponse(bases=map(_base, self._infos.values()))

    async def _run(
        self, order: Order, context: grpc.aio.ServicerContext, again: bytes = b""
    ) -> AsyncIterator[render_pb2.RenderResponse]:
        """The answers to an order; to one for the picture of a PNG `again`, with what makes it another."""
        async for event in self._renderings.run(order, convert.calling(context)):
            if isinstance(event, Rendering):
                async for data, last in parts(event.png):
                    chunk = render_pb2.ImageChunk(image=event.image, data=data, last=last)
                    yield render_pb2.RenderResponse(image=chunk)
                if again:
                    found = await asyncio.to_thread(lambda png: apart(again, bytes(png)), event.png)
                    order = replace(order, differences=(*order.differences, *found))
            elif isinstance(event, Summary):
                yield await response(replace(event, differences=order.differences), order)
            else:
                yield await response(event, order)


async def parts(png: Spooled) -> AsyncIterator[tuple[bytes, bool]]:
    """A PNG in pieces, each with whether it is the last; read as they are sent."""
    for start in range(0, png.nbytes, CHUNK):
        yield await asyncio.to_thread(png.part, start, start + CHUNK), start + CHUNK >= png.nbytes


async def response(event: Event, order: Order) -> render_pb2.RenderResponse:
    """An event in the contract's words; not for pictures, which go in parts."""
    match event:
        case rendering.Queued(position):
            return render_pb2.RenderResponse(queued=render_pb2.Queued(position=position))
        case outbox.Started(waited):
            started = render_pb2.Started(queue_seconds=waited, prompt=order.settings.prompt)
            return render_pb2.RenderResponse(started=started)
        case outbox.Step(image, step):
            progress = render_pb2.StepProgress(image=image, step=step, steps=order.settings.steps)
            return render_pb2.RenderResponse(step=progress)
        case outbox.Preview(image, step, picture):
            png = await asyncio.to_thread(rendering.png_of, picture)
            return render_pb2.RenderResponse(preview=render_pb2.Preview(image=image, step=step, png=png))
        case Summary(manifests, seconds, differences, warnings):
            summary = render_pb2.RenderSummary(
                manifest_json=manifests, seconds=seconds, differences=differences, warnings=warnings
            )
            return render_pb2.RenderResponse(summary=summary)
    raise TypeError(event)


def _base(info: BaseInfo) -> render_pb2.Base:
    return render_pb2.Base(
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
        schedulers=info.schedulers,
        granularity=info.granularity,
        controls=[net.name for net in info.base.controls],
        control_modes={
            net.name: render_pb2.ControlModes(names=net.modes) for net in info.base.controls if net.modes
        },
        references=[adapter.name for adapter in info.base.references],
    )


def _trial(trial: Trial) -> render_pb2.Trial:
    return render_pb2.Trial(
        method=convert.told(trial.method, trial.parameters),
        stack=[convert.weighted(p.version.ref, p.weight) for p in trial.stack],
        retention=trial.retention,
        value=trial.value,
        prompt=trial.prompt,
    )


def _calibrated(
    pinned: Pinned, found: Calibration, told: Sequence[str], base: Base, *, known: bool = False
) -> render_pb2.CalibrateResponse:
    return render_pb2.CalibrateResponse(
        summary=render_pb2.CalibrateSummary(
            ref=pinned.version.ref,
            base=base.name,
            prompts=dict.fromkeys(told),
            inputs=len(set(map(reads, found.moments))),
            digest=found.digest,
            known=known,
        )
    )
