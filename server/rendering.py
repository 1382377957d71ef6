"""A request for pictures, from what was asked to what is sent: orders, and how they run.

    order = rendering.order(request)                      # resolved, checked, prompt filled in
    async for event in rendering.run(order, caller):      # Queued, Started, Step, Preview, Rendering, Summary
        …

Whatever renders, a call, a job or a cell of a sweep, goes this way.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atelier.v1 import render_pb2
from compose import manifest
from compose.emphasis import parse
from compose.errors import IncompatibleBase
from compose.render import Rendered
from compose.schedule import Plan
from compose.schedulers import read_options
from compose.settings import Settings
from compose.source import BLACK, WHITE
from compose.words import called
from registry.errors import Damaged
from server import convert, outbox
from server.calls import current
from server.checkin import TEXTUAL_INVERSION
from server.engine import BaseInfo, Work
from server.errors import BadRequest
from server.guides import Sent, guides, guides_again
from server.job import Ask, Caller, Place
from server.orders import (
    Order,
    check_options,
    check_scheduler,
    check_schedules,
    method_again,
    nbytes,
    saved_settings,
    settled,
    source_again,
    source_of,
    steps_in,
)
from server.pace import Effort
from server.pictures import Original
from server.pinned import entries, fill
from server.repeats import Repeats
from server.scheduler import Scheduler
from server.served import served
from server.spool import Spooled
from server.stacks import Stacks, applied, merges

PREVIEW_LIMIT, PRIORITY_LIMIT = 1000, 10
NOTHING = Sent()
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,80}>")
"""How web UIs name adapters, in the prompt."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The order waits; orders before it."""

    position: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A finished picture as PNG, its manifest inside."""

    image: int
    png: Spooled
    manifest: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The end: manifests of all pictures, seconds by phase, and what the caller should know."""

    manifests: tuple[str, ...]
    seconds: Mapping[str, float]
    differences: tuple[str, ...]
    warnings: tuple[str, ...]


Event = Queued | outbox.Started | outbox.Step | outbox.Preview | Rendering | Summary


class Renderings:
    """Takes orders for an engine's bases, and runs them through its scheduler."""

    def __init__(self, stacks: Stacks, queue: Scheduler, infos: Mapping[str, BaseInfo]) -> None:
        self._stacks, self._queue, self._infos = stacks, queue, infos
        self._served = served(info.base for info in infos.values())
        self._repeats: Repeats[Order] = Repeats(weigh=nbytes)

    def order(self, request: render_pb2.RenderRequest, client: str = "") -> Order:
        """What a request comes to; one that the client sent before under its id to what it came to then.
        Raises RegistryError, ComposeError, BadRequest.
        """
        if not request.request_id:
            return self._order(request)
        return self._repeats.first(
            client, request.request_id, request, lambda: replace(self._order(request), keep=True)
        )

    def _order(self, request: render_pb2.RenderRequest) -> Order:
        if not 0 <= request.preview_every <= PREVIEW_LIMIT:
            raise BadRequest(
                f"preview_every {request.preview_every} is not within 0 and {PREVIEW_LIMIT}",
                field="preview_every",
            )
        if abs(request.priority) > PRIORITY_LIMIT:
            raise BadRequest(
                f"priority {request.priority} is not within {-PRIORITY_LIMIT} and {PRIORITY_LIMIT}",
                field="priority",
            )
        method, parameters = convert.method(request.method)
        refs = convert.stack(request.stack)
        schedules = convert.schedules(request.schedules)
        Plan(schedules).check(len(refs))
        check_schedules(schedules, method)
        stack = self._stacks.pin(
            refs,
            method=method,
            parameters=parameters,
            bare=True,
            schedules=schedules,
            base=request.base,
        )
        info = self._infos[self._served.under(stack, request.base).name]
        image = Original(request.image, "image", behind=WHITE) if request.image else None
        if image is None and (request.mask or request.HasField("strength")):
            name = "mask" if request.mask else "strength"
            raise BadRequest(f"{name} without an image: send the picture it is for", field=name)
        saved = saved_settings(stack) if len(refs) == 1 else {}
        settings = settled(request, info, saved, image.size if image else None)
        settings.check(info.granularity)
        settings = replace(
            settings,
            prompt=fill(settings.prompt, stack),
            negative_prompt=fill(settings.negative_prompt, stack, field="negative_prompt"),
        )
        settings.check(info.granularity)  # the prompts have grown
        check_options(info, settings)
        start = None
        if image is not None:
            strength = request.strength if request.HasField("strength") else None
            mask = Original(request.mask, "mask", behind=BLACK) if request.mask else None
            start = source_of(image, mask, settings, strength)
        order = Order(
            settings,
            stack,
            method,
            parameters,
            request.preview_every,
            base=info.base.name,
            source=start,
            priority=request.priority,
        )
        return replace(order, guides=guides(request, info.base, settings, order.kind))

    def again(self, text: str, sent: Sent = NOTHING) -> Order:
        """The order that a picture's manifest tells of. Raises as `order` does."""
        told = manifest.parse(text)
        name = str(told["base"].get("name"))
        if name not in self._infos:
            have = ", ".join(self._infos)
            raise IncompatibleBase(f"this picture was made on {name!r}, this server has {have}", field="base")
        info = self._infos[name]
        batch = told.get("batch", {"size": 1, "index": 0})
        settings = Settings(
            **{name: told[name] for name in ("prompt", "negative_prompt", "steps", "guidance")},
            seed=told["seed"] - batch["index"],
            width=told["width"],
            height=told["height"],
            count=batch["size"],
            batch=batch["size"],
            scheduler=str(told.get("scheduler", "")),
            scheduler_options=read_options(
                info.base, str(told.get("scheduler", "")), told.get("scheduler_options", {})
            ),
            literal=told["manifest"] < 2,
        )
        settings.check(info.granularity)
        check_scheduler(info, settings.scheduler)
        check_options(info, settings)
        method, parameters = method_again(told["method"])
        stack = self._stacks.repin(told["stack"], method=method, parameters=parameters, bare=True, base=name)
        check_schedules([p.schedule for p in stack], method)
        differences = manifest.differences(told, info.base.digest, info.environment)
        differences += [
            f"{p.version.ref} was calibrated otherwise"
            for p, entry in zip(stack, told["stack"], strict=True)
            if p.moments != entry.get("moments", "")
        ]
        order = Order(
            settings,
            stack,
            method,
            parameters,
            base=name,
            source=source_again(told, sent.image, sent.mask, settings),
            only=batch["index"] if batch["size"] > 1 else None,
            flattened=manifest.flattened(told),
        )
        steering, others = guides_again(told, info.base, sent, settings, order.kind)
        return replace(order, guides=steering, differences=(*differences, *others))

    def place(self) -> AbstractContextManager[Place]:
        """Room for a request of many orders, so that none of them finds the queue full. Raises QueueFull,
        Draining.
        """
        return self._queue.place()

    def kept(self, order: Order) -> dict[str, Any]:
        """An order as JSON, for `resumed` to take up at another time; the pictures it starts from aside."""
        settings = order.settings
        return {
            "manifest": self._manifest(order, 0),
            "count": settings.count,
            "batch": settings.batch,
            "preview_every": order.preview_every,
            "priority": order.priority,
        }

    def takes(self, told: Mapping[str, Any]) -> bool:
        """Whether a kept order is for a base that is here, with what steers it."""
        made = json.loads(told["manifest"])
        info = self._infos.get(made["base"]["name"])
        return info is not None and all(
            {one["name"] for one in made.get(what, ())} <= {one.name for one in getattr(info.base, what)}
            for what in ("controls", "references")
        )

    def resumed(self, told: Mapping[str, Any], done: int = 0, *, sent: Sent = NOTHING) -> tuple[Order, int]:
        """A kept order without the pictures that are done, and which is its first: that of the batch that was
        cut. Raises as `again` does.
        """
        order, batch = self.again(told["manifest"], sent), told["batch"]
        first = min(done, told["count"] - 1) // batch * batch
        settings = replace(
            order.settings, seed=order.settings.seed + first, count=told["count"] - first, batch=batch
        )
        more = {"preview_every": told["preview_every"], "priority": told["priority"]}
        return replace(order, settings=settings, only=None, **more), first

    async def run(
        self, order: Order, caller: Caller, place: Place | None = None, *, durable: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Queues, and tells what happens. Leaving the generator cancels it; what is `durable` will be asked
        for again after a restart. Raises QueueFull, Draining, DeadlineExceeded.
        """
        call, seconds = current(), dict[str, float]()
        call.about(
            base=order.base,
            steps=order.settings.steps,
            stack=len(order.stack),
            prompt=order.settings.prompt,
        )
        call.begin("queue")
        ask = replace(self._ask(order), place=place, durable=durable)
        with self._queue.admit(ask, caller) as ticket:
            yield Queued(ticket.position)
            manifests: list[str] = []
            async for event in ticket.events():
                match event:
                    case outbox.Finished(image, picture):
                        if order.only not in {None, image}:
                            continue
                        begun = time.perf_counter()
                        text = self._manifest(order, image)
                        manifests.append(text)
                        png = self.spooled(await asyncio.to_thread(png_of, picture, text))
                        call.took("encode", time.perf_counter() - begun)
                        seconds["encode"] = seconds.get("encode", 0.0) + time.perf_counter() - begun
                        yield Rendering(0 if order.only is not None else image, png, text)
                    case outbox.Done(Rendered() as rendered):
                        call.end("shared")
                        yield Summary(
                            tuple(manifests),
                            {**seconds, **rendered.seconds},
                            order.differences,
                            tuple(_warnings(rendered, order)),
                        )
                    case outbox.Started(waited, loaded):
                        seconds |= {"compose": loaded, "queue": waited}
                        call.end("queue")
                        if ticket.job.ask.call is not call:  # another's, whose phases these are
                            call.begin("shared")
                        yield event
                    case outbox.Step() | outbox.Preview():
                        if order.only is None:
                            yield event
                        elif order.only == event.image:
                            yield replace(event, image=0)

    def spooled(self, png: bytes) -> Spooled:
        """What may be read slowly."""
        return self._queue.spool.put(np.frombuffer(png, np.uint8))

    def _ask(self, order: Order) -> Ask:
        """An order as the queue sees it. Who wants the same manifest wants the same pixels."""
        settings, base = order.settings, self._infos[order.base].base
        family = base.family

        def load(check: Callable[[], None]) -> Work:
            try:
                composition = self._stacks.compose(
                    order.stack, family, method=order.method, parameters=order.parameters, check=check
                )
            except Damaged:
                self._stacks.check_there(order.stack)  # a file deleted while the order waited is no damage
                raise
            plan = replace(order.plan, schedules=composition.schedules)
            return Work(
                settings, composition, order.preview_every, plan, order.source, order.guides, base=order.base
            )

        stack = " + ".join(f"{p.version.ref} {p.weight}" for p in order.stack) or "the bare base"
        size = (settings.width, settings.height)
        kind = (
            settings.guidance > 1,
            settings.scheduler,
            min(settings.batch, settings.count),
            order.plan,
            len(order.stack) if order.plan.mode == "composite" else 0,  # each predicts in every step
            any(p.schedule for p in order.stack),
            order.source is None,
            order.preview_every,
        )
        return Ask(
            what=f"{settings.count} of {size[0]}x{size[1]}, {settings.steps} steps: {stack}",
            load=load,
            identity=(self._manifest(order, 0), settings.count, settings.batch, order.preview_every),
            key=(
                base.digest,
                self._stacks.key(order.stack, family, method=order.method, parameters=order.parameters),
            ),
            base=order.base,
            merges=merges(order.method),
            effort=Effort((base.digest, *size, *kind, *order.guides.names()), steps_in(order)),
            priority=order.priority,
            keep=order.keep,
        )

    def _manifest(self, order: Order, image: int) -> str:
        info, settings, parameters = self._infos[order.base], order.settings, order.parameters
        size = min(settings.batch, settings.count - image // settings.batch * settings.batch)
        told = {name: getattr(parameters, name) for name in sorted(parameters.given())}
        return json.dumps(
            {
                "manifest": 1 if settings.literal else manifest.VERSION,
                "base": {"name": info.base.name, "digest": info.base.digest},
                "stack": entries(order.stack),
                "method": {"name": order.method, **told},
                "prompt": settings.prompt,
                "negative_prompt": settings.negative_prompt,
                "seed": settings.seed + image,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "width": settings.width,
                "height": settings.height,
                "scheduler": settings.scheduler or info.scheduler,
                "environment": info.environment,
                **({"scheduler_options": dict(options)} if (options := settings.scheduler_options) else {}),
                **({"batch": {"size": size, "index": image % settings.batch}} if size > 1 else {}),
                **({"source": order.source.told()} if order.source else {}),
                **order.guides.told(info.base),
                **({"flattened": True} if order.flattened and (order.source or order.guides) else {}),
            },
            sort_keys=True,
            ensure_ascii=False,
        )


def png_of(picture: Spooled, text: str = "") -> bytes:
    """With its manifest, where there is one. Raises OSError."""
    return manifest.to_png(picture.array(), text)


def _warnings(rendered: Rendered, order: Order) -> Iterator[str]:
    """What looks right and is not what was meant."""
    if rendered.tokens_dropped:
        yield (f"the prompt is too long: {order.base} did not read its last {rendered.tokens_dropped} tokens")
    for place in rendered.idle:
        idle = applied(order.stack, order.method)[place].version.ref
        yield f"{idle} acted in none of the {order.settings.steps} steps: no step begins in its turn"
    for found in _TAG.findall(order.settings.prompt):
        yield f"{found!r} in the prompt is text here; name adapters in the stack"
    yield from _unheard(order)


def _unheard(order: Order) -> Iterator[str]:
    """Words that nothing says, and a negative prompt that nothing is guided away from."""
    settings = order.settings
    said = [
        text
        for prompt in (settings.prompt, settings.negative_prompt)
        for text, _ in ([(prompt, 1.0)] if settings.literal else parse(prompt))
    ]
    for pinned in order.stack:
        version = pinned.version
        if version.kind != TEXTUAL_INVERSION:
            continue
        words = version.facts.get("words") or pinned.triggers[:1] or [version.name]
        if not any(called(word, text) for word in words for text in said):
            yield f"{version.ref} does nothing here: the prompt does not say {' or '.join(words)}"
    if settings.negative_prompt and settings.guidance <= 1:
        yield f"the negative prompt does nothing at guidance {settings.guidance:g}; it takes more than 1"
