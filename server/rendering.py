"""A request for pictures, from what was asked to what is sent: orders, and how they run.

    order = rendering.order(request)                      # resolved, checked, prompt filled in
    async for event in rendering.run(order, caller):      # Queued, Started, Step, Preview, Rendering, Summary
        …

Whatever renders, a call, a job or a cell of a sweep, goes this way.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import json_format

from atelier.v1 import compose_pb2, render_pb2
from compose import manifest
from compose.errors import IncompatibleBase
from compose.methods import Parameters
from compose.render import Rendered, Settings
from registry.errors import Damaged
from server import convert, outbox
from server.engine import BaseInfo, Work
from server.errors import BadRequest
from server.job import Ask, Caller, Place
from server.pace import Effort
from server.pinned import Pinned, entries, fill
from server.repeats import Repeats
from server.scheduler import Scheduler
from server.stacks import Stacks

PREVIEW_LIMIT, PRIORITY_LIMIT = 1000, 10
VERSION = 1


@dataclass(frozen=True, slots=True)
class Order:
    """A render with its stack pinned and every value checked. `differences` are why a replay may not give the
    same pixels; with `keep` the pictures are there for a while for who asks again.
    """

    settings: Settings
    stack: tuple[Pinned, ...]
    method: str
    parameters: Parameters
    preview_every: int = 0
    differences: tuple[str, ...] = ()
    priority: int = 0
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Queued:
    """The order waits; orders before it."""

    position: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A finished picture as PNG, its manifest inside."""

    image: int
    png: bytes
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
    """Takes orders for one engine's base, and runs them through its scheduler."""

    def __init__(self, stacks: Stacks, queue: Scheduler, info: BaseInfo) -> None:
        self._stacks, self._queue, self._info = stacks, queue, info
        self._repeats: Repeats[Order] = Repeats()

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
        if request.base not in {"", self._info.base.name}:
            raise BadRequest(
                f"this server has no base {request.base!r}; it has {self._info.base.name}", field="base"
            )
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
        stack = self._stacks.pin(refs, method=method, parameters=parameters, bare=True)
        settings = self._settings(request, _saved(stack) if len(refs) == 1 else {})
        settings.check(self._info.granularity)
        settings = replace(settings, prompt=fill(settings.prompt, stack))
        settings.check(self._info.granularity)  # the prompt has grown
        return Order(settings, stack, method, parameters, request.preview_every, priority=request.priority)

    def again(self, text: str) -> Order:
        """The order that a picture's manifest tells of. Raises as `order` does."""
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
        stack = self._stacks.repin(told["stack"], method=method, parameters=parameters)
        differences = manifest.differences(told, self._info.base.digest, self._info.environment)
        differences += [
            f"{p.version.ref} was calibrated otherwise"
            for p, entry in zip(stack, told["stack"], strict=True)
            if p.moments != entry.get("moments", "")
        ]
        return Order(settings, stack, method, parameters, differences=tuple(differences))

    def place(self) -> AbstractContextManager[Place]:
        """Room for a request of many orders, so that none of them finds the queue full. Raises QueueFull,
        Draining.
        """
        return self._queue.place()

    def kept(self, order: Order) -> dict[str, Any]:
        """An order as JSON, for `resumed` to take up at another time."""
        told = {"count": order.settings.count, "preview_every": order.preview_every}
        return {"manifest": self._manifest(order, 0), "priority": order.priority, **told}

    def takes(self, told: Mapping[str, Any]) -> bool:
        """Whether a kept order is for this base."""
        return bool(json.loads(told["manifest"])["base"]["name"] == self._info.base.name)

    def resumed(self, told: Mapping[str, Any], done: int = 0) -> Order:
        """A kept order, without its first `done` pictures. Raises as `again` does."""
        order = self.again(told["manifest"])
        settings = replace(
            order.settings, seed=order.settings.seed + done, count=max(1, told["count"] - done)
        )
        return replace(
            order, settings=settings, preview_every=told["preview_every"], priority=told["priority"]
        )

    async def run(
        self, order: Order, caller: Caller, place: Place | None = None, *, durable: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Queues, and tells what happens. Leaving the generator cancels it; what is `durable` will be asked
        for again after a restart. Raises QueueFull, Draining, DeadlineExceeded.
        """
        seconds: dict[str, float] = {}
        ask = replace(self._ask(order), place=place, durable=durable)
        with self._queue.admit(ask, caller) as ticket:
            yield Queued(ticket.position)
            manifests: list[str] = []
            async for event in ticket.events():
                match event:
                    case outbox.Finished(image, picture):
                        begun = time.perf_counter()
                        text = self._manifest(order, image)
                        manifests.append(text)
                        png = await asyncio.to_thread(manifest.to_png, picture, text)
                        seconds["encode"] = seconds.get("encode", 0.0) + time.perf_counter() - begun
                        yield Rendering(image, png, text)
                    case outbox.Done(Rendered() as rendered):
                        yield Summary(
                            tuple(manifests),
                            {**seconds, **rendered.seconds},
                            order.differences,
                            _warnings(rendered, self._info),
                        )
                    case outbox.Started(waited, loaded):
                        seconds |= {"compose": loaded, "queue": waited}
                        yield event
                    case outbox.Step() | outbox.Preview():
                        yield event

    def _ask(self, order: Order) -> Ask:
        """An order as the queue sees it. Who wants the same manifest wants the same pixels."""
        settings, base = order.settings, self._info.base
        family = base.family

        def load() -> Work:
            try:
                composition = self._stacks.compose(
                    order.stack, family, method=order.method, parameters=order.parameters
                )
            except Damaged:
                self._stacks.check_there(order.stack)  # a file deleted while the order waited is no damage
                raise
            return Work(settings, composition, order.preview_every)

        stack = " + ".join(f"{p.version.ref} {p.weight}" for p in order.stack) or "the bare base"
        size = (settings.width, settings.height)
        return Ask(
            what=f"{settings.count} of {size[0]}x{size[1]}, {settings.steps} steps: {stack}",
            load=load,
            identity=(self._manifest(order, 0), settings.count, order.preview_every),
            key=(
                base.digest,
                self._stacks.key(order.stack, family, method=order.method, parameters=order.parameters),
            ),
            effort=Effort(
                (base.digest, *size, settings.guidance > 1, order.preview_every),
                settings.steps * settings.count,
            ),
            priority=order.priority,
            keep=order.keep,
        )

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

    def _manifest(self, order: Order, image: int) -> str:
        info, settings, parameters = self._info, order.settings, order.parameters
        told = {name: getattr(parameters, name) for name in sorted(parameters.given())}
        return json.dumps(
            {
                "manifest": VERSION,
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
                "scheduler": info.scheduler,
                "environment": info.environment,
            },
            sort_keys=True,
            ensure_ascii=False,
        )


def _saved(stack: Sequence[Pinned]) -> Mapping[str, Any]:
    """The document of the saved stack that was asked for; {} when something else was."""
    via = stack[0].via
    return via.facts["stack"] if via else {}


def _warnings(rendered: Rendered, info: BaseInfo) -> tuple[str, ...]:
    if not rendered.tokens_dropped:
        return ()
    return (
        f"the prompt is too long: {info.base.name} did not read its last {rendered.tokens_dropped} tokens",
    )


def _method(told: Mapping[str, Any]) -> tuple[str, Parameters]:
    try:
        return convert.method(json_format.ParseDict(dict(told), compose_pb2.Method()))
    except (json_format.ParseError, ValueError, OverflowError) as error:
        raise BadRequest(f"the manifest's method is damaged: {error}", field="manifest_json") from None
