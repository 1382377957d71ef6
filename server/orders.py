"""What a request for pictures comes to: an order, and the parts that it is made of."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from atelier.v1 import compose_pb2, render_pb2
from compose.guiding import UNGUIDED, Guides
from compose.manifest import flattened
from compose.methods import Parameters
from compose.prompts import check_negative
from compose.schedule import MODES, Plan, Schedule
from compose.schedulers import read_options, rehearse
from compose.settings import SIDE_LIMIT, Settings
from compose.source import BLACK, WHITE, Source, fitting, source
from server import convert
from server.engine import BaseInfo
from server.errors import BadRequest
from server.pictures import Original, digest
from server.pinned import Pinned


@dataclass(frozen=True, slots=True)
class Order:
    """A render with its stack pinned and every value checked. `differences` are why a replay may not give the
    same pixels; `only` is the one picture of a batch that is wanted; with `keep` the pictures are there for a
    while for who asks again. `flattened` as in a manifest.
    """

    settings: Settings
    stack: tuple[Pinned, ...]
    method: str
    parameters: Parameters
    preview_every: int = 0
    differences: tuple[str, ...] = ()
    base: str = ""
    source: Source | None = None
    guides: Guides = UNGUIDED
    only: int | None = None
    priority: int = 0
    keep: bool = False
    flattened: bool = True

    @property
    def kind(self) -> str:
        """What it starts from: "" for nothing, an "image", or a "mask" in one."""
        return "" if self.source is None else "image" if self.source.mask is None else "mask"

    @property
    def plan(self) -> Plan:
        """When what is applied acts; schedules come with the composition."""
        mode = self.method if self.method in MODES else ""
        return Plan((), mode, self.parameters.every or 1)


def nbytes(order: Order) -> int:
    """Of the pictures that it starts from, and that steer it."""
    if order.source is None:
        return order.guides.nbytes()
    mask = 0 if order.source.mask is None else order.source.mask.nbytes
    return order.guides.nbytes() + order.source.picture.nbytes + mask


def steps_in(order: Order) -> int:
    """Denoising steps in all, those of a batch at once."""
    settings, strength = order.settings, order.source.strength if order.source else 1.0
    return int(settings.steps * strength) * math.ceil(settings.count / settings.batch)


def settled(
    request: render_pb2.RenderRequest,
    info: BaseInfo,
    saved: Mapping[str, Any],
    image: tuple[int, int] | None = None,
) -> Settings:
    """A request's settings: what it does not say, its saved stack's, that of a picture of this size, or the
    base's own.
    """
    base, width, height = info.base, info.size, info.size
    check_scheduler(info, request.scheduler)
    if image is not None and not (request.HasField("width") or request.HasField("height")):
        width, height = fitting(image, info.granularity, max(info.size, SIDE_LIMIT // 2))
    return Settings(
        prompt=request.prompt or saved.get("prompt", ""),
        negative_prompt=request.negative_prompt or saved.get("negative_prompt", ""),
        seed=request.seed if request.HasField("seed") else random.getrandbits(32),
        steps=request.steps if request.HasField("steps") else saved.get("steps", base.steps),
        guidance=request.guidance if request.HasField("guidance") else saved.get("guidance", base.guidance),
        width=request.width if request.HasField("width") else width,
        height=request.height if request.HasField("height") else height,
        count=request.count if request.HasField("count") else 1,
        batch=request.batch if request.HasField("batch") else 1,
        scheduler=request.scheduler,
        scheduler_options=read_options(base, request.scheduler, convert.struct(request.scheduler_options)),
    )


def check_schedules(schedules: Sequence[Schedule], method: str) -> None:
    if any(schedules) and method != "naive":
        raise BadRequest(f"schedules go with the method naive, not with {method!r}", field="schedules")


def check_options(info: BaseInfo, settings: Settings) -> None:
    """Raises InvalidRequest for steps and scheduler options that come to nothing, and for a negative prompt
    where there is none.
    """
    check_negative(info.base.family, settings.negative_prompt)
    size = {"width": settings.width, "height": settings.height}
    rehearse(info.base, settings.scheduler, settings.scheduler_options, settings.steps, **size)


def check_scheduler(info: BaseInfo, name: str) -> None:
    """Raises BadRequest for one that the base cannot be rendered with."""
    if name and name not in info.schedulers:
        raise BadRequest(
            f"the scheduler {name[:80]!r} cannot be used with {info.base.name}; "
            f"there are {', '.join(info.schedulers)}",
            field="scheduler",
        )


def source_again(told: Mapping[str, Any], image: bytes, mask: bytes, settings: Settings) -> Source | None:
    """The picture that a manifest says its own started from. Raises BadRequest for another, for none, and for
    one that it did not start from.
    """
    was = told.get("source") or {}
    for name, data in (("image", image), ("mask", mask)):
        if was.get(name) and was[name] != (digest(data) if data else ""):
            raise BadRequest(
                f"this picture was made from the {name} {was[name]}; send that with it", field=name
            )
        if data and not was.get(name):
            raise BadRequest(f"this picture was made without any {name}; leave it out", field=name)
    if not was:
        return None
    flat = flattened(told)
    start = Original(image, "image", behind=WHITE if flat else "")
    over = Original(mask, "mask", behind=BLACK if flat else "") if was.get("mask") else None
    return source_of(start, over, settings, was["strength"])


def source_of(image: Original, over: Original | None, settings: Settings, strength: float | None) -> Source:
    """The picture that a render starts from, and the mask over it if there is one. Raises InvalidRequest."""
    size = settings.width, settings.height
    found = source(
        image.fitted(size),
        over.mask(size) if over else None,
        strength=strength,
        digest=image.digest,
        mask_digest=over.digest if over else "",
    )
    found.check(settings.steps)
    return found


def saved_settings(stack: Sequence[Pinned]) -> Mapping[str, Any]:
    """The document of the saved stack that was asked for; {} when something else was."""
    via = stack[0].via
    return via.facts["stack"] if via else {}


def method_again(told: Mapping[str, Any]) -> tuple[str, Parameters]:
    try:
        return convert.method(json_format.ParseDict(dict(told), compose_pb2.Method()))
    except (json_format.ParseError, ValueError, OverflowError) as error:
        raise BadRequest(f"the manifest's method is damaged: {error}", field="manifest_json") from None
