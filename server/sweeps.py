"""Sweeps: one request rendered again and again while one or two things in it change.

    plan = sweeps.plan(request)                    # every cell resolved and checked; nothing is rendered yet
    async for event in sweeps.run(plan, caller):   # Progress, Cell, Swept
        …

A cell is an order like any other (`server.rendering`): the same pixels, its own manifest, one place in the
queue at a time. The grid carries the sweep as JSON, its axes columns, then rows:

    {"sweep": 1, "base": {"name", "digest"}, "prompt",
     "stack": [{"asked", "ref", "digest"}…],
     "axes": [{"varies", "labels", "values", "adapter"?: {"asked", "ref", "digest"}, "part"?}…],
     "cells": [{"column", "row", "manifest": {…}}…]}
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format

from atelier.v1 import render_pb2, sweep_pb2
from compose import grid
from compose.bases import Base
from compose.errors import ComposeError
from compose.methods import Parameters
from compose.render import Picture
from compose.weights import AS_TRAINED, Weight
from registry.errors import RegistryError
from registry.records import Version
from server import convert, outbox
from server.axes import TOUCHED, Adapter, Axis, at, count, read, steps_of
from server.calibrations import calling
from server.errors import BadRequest
from server.job import Caller
from server.orders import Order
from server.pinned import Pinned
from server.rendering import Rendering, Renderings, Summary
from server.served import Served
from server.spool import Spooled
from server.stacks import Stacks

VERSION = 1


@dataclass(frozen=True, slots=True)
class Place:
    """A cell to be rendered."""

    column: int
    row: int
    order: Order


@dataclass(frozen=True, slots=True)
class Plan:
    """A sweep with every reference pinned: its stack with the weights that were asked for, its places in the
    order in which they are rendered, its prompt as it was asked for, and the seed that all share (None when
    it varies).
    """

    axes: tuple[Axis, ...]
    stack: tuple[Adapter, ...]
    weights: tuple[Weight, ...]
    places: tuple[Place, ...]
    prompt: str
    seed: int | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels from left to right."""
        return self.axes[0].labels

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels from top to bottom; one that is empty where nothing varies that way."""
        return self.axes[1].labels if len(self.axes) > 1 else ("",)


@dataclass(frozen=True, slots=True)
class Progress:
    """Cells that are finished, the place under way, and its denoising steps that are done."""

    done: int
    place: Place
    step: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A finished cell as PNG, its manifest inside."""

    place: Place
    png: Spooled


@dataclass(frozen=True, slots=True)
class Swept:
    """The end: the grid as PNG with the JSON inside, the JSON, seconds by phase, and what the caller should
    know.
    """

    png: Spooled
    sweep: str
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]


Event = Progress | Cell | Swept


@dataclass(slots=True)
class _Found:
    """What is known of the cells so far."""

    pictures: dict[tuple[int, int], Picture] = field(default_factory=dict)
    manifests: dict[tuple[int, int], str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)


class Sweeps:
    """Plans sweeps on an engine's bases, and runs them through its orders."""

    def __init__(self, stacks: Stacks, renderings: Renderings, served: Served) -> None:
        self._stacks, self._renderings, self._served = stacks, renderings, served

    def plan(self, request: sweep_pb2.SweepRequest) -> Plan:
        """What a request comes to. Raises RegistryError, ComposeError, BadRequest before any cell is
        rendered.
        """
        count(request)
        common = render_pb2.RenderRequest()
        common.CopyFrom(request.common)
        _check(common)
        with at("common.stack"):
            convert.stack(common.stack)
        known: dict[str, Version] = {}

        def pin(ref: str) -> Version:
            """The version a reference names; the same one whenever it is asked again."""
            if ref not in known:
                (first, *_) = self._stacks.pin([(ref, AS_TRAINED)], method="naive", parameters=Parameters())
                known[ref] = first.via or first.version
            return known[ref]

        stack = []
        for index, entry in enumerate(common.stack):
            with at(f"common.stack[{index}].ref"):
                stack.append(Adapter(entry.ref, pin(entry.ref)))
            entry.ref = stack[-1].version.ref
        if not common.HasField("seed"):
            common.seed = random.getrandbits(32)
        axes = read(request, stack, pin, seed=common.seed)
        varied = {axis.kind for axis in axes}
        pinned = self._stacks.pin(
            convert.stack(common.stack), method="naive", parameters=Parameters(), bare=True
        )
        with at("common.base"):
            common.base = self._served.under(pinned, common.base).name
        if not common.prompt and "prompt" not in varied:
            varying = [one.version for axis in axes for one in axis.named]
            common.prompt = self._prompt(common, pinned, varying or [one.version for one in stack])
        places = self._places(common, axes)
        self._compose(places, axes)
        return Plan(
            axes,
            tuple(stack),
            tuple(weight for _, weight in convert.stack(common.stack)),
            tuple(_least_switching(places)),
            "" if "prompt" in varied else common.prompt or _one({p.order.settings.prompt for p in places}),
            None if "seed" in varied else common.seed,
        )

    async def run(self, plan: Plan, caller: Caller) -> AsyncGenerator[Event, None]:
        """Renders the cells one after the other, then draws the grid. Leaving the generator cancels the cell
        under way.
        """
        found = _Found()
        settings = plan.places[0].order.settings
        side = grid.side(settings.width, settings.height, columns=len(plan.columns), rows=len(plan.rows))
        with self._renderings.place() as room:
            for done, place in enumerate(plan.places):
                yield Progress(done, place, 0)
                async with aclosing(self._renderings.run(place.order, caller, room)) as events:
                    async for event in events:
                        match event:
                            case outbox.Step(step=step):
                                yield Progress(done, place, step)
                            case Rendering(png=png, manifest=text):
                                at_place = place.column, place.row
                                found.manifests[at_place] = text
                                found.pictures[at_place] = await asyncio.to_thread(_thumbnail, png, side)
                                yield Cell(place, png)
                            case Summary(seconds=seconds, warnings=warnings):
                                for phase, spent in seconds.items():
                                    found.seconds[phase] = found.seconds.get(phase, 0.0) + spent
                                found.warnings |= dict.fromkeys(warnings)
        start = time.perf_counter()
        text = json.dumps(self._document(plan, found), ensure_ascii=False, sort_keys=True)
        drawn = self._renderings.spooled(await asyncio.to_thread(self._draw, plan, found, side, text))
        found.pictures.clear()  # who reads slowly holds no more than it takes
        found.seconds["grid"] = time.perf_counter() - start
        yield Swept(drawn, text, found.seconds, tuple(found.warnings))

    def _places(self, common: render_pb2.RenderRequest, axes: Sequence[Axis]) -> list[Place]:
        """Every cell as an order, row by row."""
        places = []
        for row in range(len(axes[1].values) if len(axes) > 1 else 1):
            for column in range(len(axes[0].values)):
                request = render_pb2.RenderRequest()
                request.CopyFrom(common)
                chosen = tuple(zip(axes, (column, row), strict=False))
                for axis, index in chosen:
                    axis.put(request, index)
                try:
                    places.append(Place(column, row, self._renderings.order(request)))
                except (ComposeError, RegistryError, BadRequest) as error:
                    raise _placed(error, chosen) from None
        return places

    def _compose(self, places: Sequence[Place], axes: Sequence[Axis]) -> None:
        """Composes every set of adapters once, at its strongest: what cannot be composed is refused now, not
        after an hour.
        """
        strongest: dict[object, Order] = {}
        for place in places:
            order = place.order
            key = order.method, order.parameters, tuple(p.content for p in order.stack)
            if key not in strongest or _strength(order) > _strength(strongest[key]):
                strongest[key] = order
        for order in strongest.values():
            try:
                self._stacks.compose(
                    order.stack, self._base(order).family, method=order.method, parameters=order.parameters
                )
            except (ComposeError, RegistryError) as error:
                raise _placed(error, [(axis, None) for axis in axes]) from None

    def _prompt(
        self, common: render_pb2.RenderRequest, stack: Sequence[Pinned], versions: Sequence[Version]
    ) -> str:
        """A prompt that calls all of the stack in a scene the base knows; "" where a saved stack has its own,
        in all of the `versions` that are rendered.

        Raises BadRequest for an adapter that no word calls.
        """
        saved = [version.facts.get("stack", {}).get("prompt", "") for version in versions]
        if len(common.stack) == 1 and all(saved):
            return ""
        named = {pinned.version.name: pinned for pinned in stack}
        if mute := next((p.version.ref for p in named.values() if not p.triggers), None):
            raise BadRequest(
                f"{mute} has no trigger word to make a prompt of; say what to draw", field="common.prompt"
            )
        # a trigger of several words is a phrase, and stands elsewhere in a sentence than a noun
        holes = {
            f"\0{index}\0" + (" \0" if " " in pinned.triggers[0] else ""): name
            for index, (name, pinned) in enumerate(named.items())
        }
        (prompt,) = calling(list(holes), self._served.named(common.base), 1)
        for hole, name in holes.items():
            prompt = prompt.replace(hole, f"{{{name}}}")
        return prompt

    def _base(self, order: Order) -> Base:
        return self._served.named(order.base)

    def _document(self, plan: Plan, found: _Found) -> dict[str, Any]:
        base = self._base(plan.places[0].order)
        return {
            "sweep": VERSION,
            "base": {"name": base.name, "digest": base.digest},
            "prompt": plan.prompt,
            "stack": [_named(adapter) for adapter in plan.stack],
            "axes": [_axis(axis, plan.stack) for axis in plan.axes],
            "cells": [
                {"column": column, "row": row, "manifest": json.loads(found.manifests[column, row])}
                for row in range(len(plan.rows))
                for column in range(len(plan.columns))
            ],
        }

    def _draw(self, plan: Plan, found: _Found, side: int, text: str) -> bytes:
        rows = [
            (label, [found.pictures[column, row] for column in range(len(plan.columns))])
            for row, label in enumerate(plan.rows)
        ]
        prompt = _one({place.order.settings.prompt for place in plan.places})
        names = " + ".join(dict.fromkeys(adapter.version.name for adapter in plan.stack))
        varied = f"{names or plan.places[0].order.base}: {' x '.join(axis.kind for axis in plan.axes)}"
        title = prompt or plan.prompt or varied
        picture = grid.draw(rows, columns=plan.columns, title=title, notes=self._notes(plan), side=side)
        return grid.to_png(picture, text)

    def _notes(self, plan: Plan) -> list[str]:
        """What all cells share, for the lines under the title; versions of a saved stack may have settings of
        their own.
        """
        order, kinds = plan.places[0].order, {axis.kind for axis in plan.axes}
        settings, all_of = order.settings, [place.order.settings for place in plan.places]
        kinds |= {name for name in ("steps", "guidance") if len({getattr(s, name) for s in all_of}) > 1}
        adapters = [self._adapter(plan, place) for place in range(len(plan.stack))]
        shared = [order.base, f"{settings.width}x{settings.height}"]
        shared += [order.method] if order.stack and "method" not in kinds else []
        shared += [steps_of(settings.steps)] if "steps" not in kinds else []
        shared += [f"guidance {settings.guidance:g}"] if "guidance" not in kinds else []
        shared += [f"seed {plan.seed}"] if plan.seed is not None else []
        negative = _one({s.negative_prompt for s in all_of})
        without = [f"without “{negative}”"] if negative else []
        return [*([" · ".join(adapters)] if adapters else []), " · ".join(shared), *without]

    def _adapter(self, plan: Plan, place: int) -> str:
        """An adapter with what calls it and how strongly it acts: `fungo:1 “fungo” at 0 to 1.2`."""
        version = plan.stack[place].version
        mine = [axis for axis in plan.axes if axis.place == place]
        seen = [
            p
            for o in plan.places
            for p in o.order.stack
            if version.name in {p.version.name, p.via and p.via.name}
        ]
        words = dict.fromkeys(p.triggers[0] for p in seen if p.triggers)
        name = version.ref if all(axis.kind != "version" for axis in mine) else version.name
        called = f" “{', '.join(words)}”" if words else ""
        ranges = {axis.part: _range(axis) for axis in mine if axis.kind == "weight"}
        whole = ranges.pop("", str(plan.weights[place]))
        return f"{name}{called} at {', '.join((whole, *(f'{part} {r}' for part, r in ranges.items())))}"


def _thumbnail(png: Spooled, side: int) -> Picture:
    return grid.thumbnail(bytes(png), side)


def _check(common: render_pb2.RenderRequest) -> None:
    """Raises BadRequest for what a render has and a sweep has not."""
    for name, plain in (("count", 1), ("batch", 1), ("preview_every", 0), ("request_id", "")):
        value = getattr(common, name)
        # an optional number that is said to be 0 is left to the render, which refuses it
        if value not in {plain, 0}:
            raise BadRequest(
                f"common.{name} {str(value)[:40]} is not for a sweep, whose cells are one picture each; "
                "leave it out",
                field=f"common.{name}",
            )


def _placed(
    error: ComposeError | RegistryError | BadRequest, chosen: Sequence[tuple[Axis, int | None]]
) -> ComposeError | RegistryError | BadRequest:
    """The error with the value of an axis that it is about, else with a field of what is common."""
    for axis, index in chosen:
        if error.field.startswith(TOUCHED[axis.kind]):
            path = axis.path if index is None else f"{axis.path}[{index}]"
            return type(error)(f"{path}: {error}", field=path)
    return type(error)(str(error), field=f"common.{error.field}" if error.field else "common")


def _least_switching(places: Sequence[Place]) -> list[Place]:
    """Cells of one stack together, in the order in which the stacks are met."""
    groups: dict[object, list[Place]] = {}
    for place in places:
        order = place.order
        key = order.method, order.parameters, tuple((p.content, p.weight, p.moments) for p in order.stack)
        groups.setdefault(key, []).append(place)
    return [place for group in groups.values() for place in group]


def _range(axis: Axis) -> str:
    weights = [value for value in axis.values if isinstance(value, float)]
    return f"{min(weights):g} to {max(weights):g}" if len(weights) > 1 else f"{weights[0]:g}"


def _one(texts: set[str]) -> str:
    """The text when there is one, "" when there are several."""
    return next(iter(texts)) if len(texts) == 1 else ""


def _strength(order: Order) -> float:
    weights = [p.weight for p in order.stack]
    return sum(abs(w.value) + sum(abs(factor) for _, factor in w.parts) for w in weights)


def _named(adapter: Adapter) -> dict[str, str]:
    version = adapter.version
    return {"asked": adapter.asked, "ref": version.ref, "digest": version.digest}


def _axis(axis: Axis, stack: Sequence[Adapter]) -> dict[str, Any]:
    values: list[Any] = list(axis.values)
    if axis.kind == "version":
        values = [_named(adapter) for adapter in axis.named]
    if axis.kind == "method":
        values = [json_format.MessageToDict(value, preserving_proto_field_name=True) for value in values]
    return {
        "varies": axis.kind,
        "labels": list(axis.labels),
        "values": values,
        **({"adapter": _named(stack[axis.place])} if axis.place is not None else {}),
        **({"part": axis.part} if axis.part else {}),
    }
