"""Between messages of atelier.v1 and the words of the rooms."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Literal

import grpc
from google.protobuf import json_format, struct_pb2

from atelier.v1 import catalog_pb2, compose_pb2, render_pb2
from compose.errors import InvalidRequest
from compose.merging import STACK_LIMIT
from compose.methods import Parameters
from compose.schedule import Phase, Schedule
from compose.weights import Weight
from registry.finding import FIELDS, Query
from registry.records import CardRevision, Event, Preview, Version
from server.auth import caller
from server.checkin import LORA, STACK, TEXTUAL_INVERSION
from server.errors import BadRequest
from server.job import Caller

TEXT_LIMIT, LABELS_LIMIT = 500, 20
_PARAMETERS = tuple(field.name for field in fields(Parameters))
KINDS = {
    LORA: catalog_pb2.KIND_LORA,
    TEXTUAL_INVERSION: catalog_pb2.KIND_TEXTUAL_INVERSION,
    STACK: catalog_pb2.KIND_STACK,
}


def version(found: Version) -> catalog_pb2.Version:
    """A version as a message."""
    facts = found.facts
    message = catalog_pb2.Version(
        name=found.name,
        number=found.number,
        digest=found.digest,
        kind=KINDS[found.kind],
        family=facts["family"],
        layout=facts["layout"],
        rank=facts["rank"],
        coverage=catalog_pb2.Coverage(**facts["coverage"]),
        triggers=[catalog_pb2.Trigger(**trigger) for trigger in facts["triggers"]],
        size_bytes=found.size_bytes,
        aliases=found.aliases,
        recipe_json=json.dumps(found.recipe, sort_keys=True) if found.recipe else "",
        components=facts["components"],
        targets=facts.get("targets", ()),
        card_digest=f"sha256:{found.card_digest}" if found.card_digest else "",
        tensor_digest=found.digests.tensors,
        body_digest=found.digests.body,
        about=_about(facts.get("about", {})),
        stack_json=stack_json(facts["stack"]) if "stack" in facts else "",
        origin_json=json.dumps(facts["origin"], sort_keys=True) if "origin" in facts else "",
    )
    message.create_time.FromDatetime(found.created_at)
    if found.deleted_at:
        message.delete_time.FromDatetime(found.deleted_at)
    return message


def _about(told: dict[str, Any]) -> catalog_pb2.About:
    fields = {"title", "author", "licence", "rating"} & told.keys()
    values = {field: catalog_pb2.Told(**told[field]) for field in fields}
    if "negative" in told:
        values["negative_prompt"] = catalog_pb2.Told(**told["negative"])
    weight = catalog_pb2.RecommendedWeight(**told["weight"]) if "weight" in told else None
    return catalog_pb2.About(**values, tags=told.get("tags", {}).get("value", ()), weight=weight)


def declared(found: Version) -> catalog_pb2.CheckInHeader:
    """What was said at a version's check-in, besides its card."""
    said = found.facts.get("declared", {})
    return catalog_pb2.CheckInHeader(
        name=found.name,
        base=said.get("base", ""),
        triggers=said.get("triggers", ()),
        adapter_config=said.get("adapter_config", "").encode(),
        file_name=found.facts.get("file_name", ""),
        size_bytes=found.size_bytes,
    )


def similar(found: Version, cosine: float) -> catalog_pb2.Similar:
    """A version that is like another one."""
    return catalog_pb2.Similar(version=version(found), cosine=cosine)


def preview(found: Preview) -> catalog_pb2.PreviewImage:
    """A picture shown with a version."""
    return catalog_pb2.PreviewImage(
        digest=found.digest, width=found.width, height=found.height, caption=found.caption
    )


def card_revision(found: CardRevision) -> catalog_pb2.CardRevision:
    """A card a version had."""
    digest = f"sha256:{found.digest}" if found.digest else ""
    message = catalog_pb2.CardRevision(
        revision=found.number, card=found.card, digest=digest, actor=found.actor
    )
    message.time.FromDatetime(found.at)
    return message


def caption(text: str) -> str:
    """A picture's caption: printable, of at most 300 characters."""
    return "".join(c for c in text if c.isprintable())[:300]


def query(request: catalog_pb2.ListAssetsRequest) -> Query:
    """What a list request asks for. Raises BadRequest."""
    if len(request.text) > TEXT_LIMIT or len(request.labels) > LABELS_LIMIT:
        raise BadRequest(f"at most {TEXT_LIMIT} characters of text and {LABELS_LIMIT} labels", field="text")
    for label in request.labels:
        if label.field not in FIELDS:
            raise BadRequest(
                f"{label.field!r} is no label; there are {', '.join(FIELDS)}", field="labels.field"
            )
    return Query(
        text=request.text,
        labels=[(label.field, label.value) for label in request.labels],
        made_after=_moment(request, "made_after"),
        made_before=_moment(request, "made_before"),
    )


def _moment(
    request: catalog_pb2.ListAssetsRequest, field: Literal["made_after", "made_before"]
) -> datetime | None:
    if not request.HasField(field):
        return None
    try:
        found: datetime = getattr(request, field).ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise BadRequest(f"{field} is not a time", field=field) from None
    return found


def event(found: Event) -> catalog_pb2.WatchEventsResponse:
    """A change as a message."""
    message = catalog_pb2.WatchEventsResponse(
        seq=found.seq,
        actor=found.actor,
        action=found.action,
        name=found.name,
        number=found.number,
        detail_json=json.dumps(found.detail, sort_keys=True),
    )
    message.time.FromDatetime(found.at)
    return message


def actor(context: grpc.aio.ServicerContext) -> str:
    """Who calls: the name of its token, else what its metadata says: at most 100 printable characters, ""
    when it does not.
    """
    if name := caller.get():
        return name
    told = dict(context.invocation_metadata() or ()).get("atelier-user", "")
    return "".join(c for c in str(told) if c.isprintable())[:100]


def calling(context: grpc.aio.ServicerContext) -> Caller:
    """Who calls, to be fair by: whom a token or the metadata names, else the connection; and until when."""
    remaining = context.time_remaining()
    deadline = None if remaining is None else time.monotonic() + remaining
    return Caller(actor(context) or context.peer(), deadline)


def stack_json(document: Mapping[str, Any]) -> str:
    """A saved stack's document."""
    return json.dumps(document, sort_keys=True, ensure_ascii=False)


def stack(refs: Sequence[compose_pb2.WeightedRef]) -> list[tuple[str, Weight]]:
    """References with their weights; 1 where none is said. Raises InvalidRequest for too many."""
    if len(refs) > STACK_LIMIT:
        raise InvalidRequest(f"a stack holds 1 to {STACK_LIMIT} adapters, not {len(refs)}", field="stack")
    return [
        (ref.ref, Weight.of_parts(ref.weight if ref.HasField("weight") else 1.0, ref.parts)) for ref in refs
    ]


def weighted(ref: str, weight: Weight) -> compose_pb2.WeightedRef:
    """A reference with its weight as a message."""
    return compose_pb2.WeightedRef(ref=ref, weight=weight.value, parts=dict(weight.parts))


def told(name: str, parameters: Parameters) -> compose_pb2.Method:
    """A method with what it is told as a message."""
    return compose_pb2.Method(
        name=name, **{field: getattr(parameters, field) for field in parameters.given()}
    )


def schedules(messages: Sequence[render_pb2.Schedule]) -> tuple[Schedule, ...]:
    """One for each adapter of a stack, or none."""
    return tuple(
        tuple(
            Phase(
                phase.start,
                phase.end,
                phase.weight if phase.HasField("weight") else 1.0,
                phase.end_weight if phase.HasField("end_weight") else None,
            )
            for phase in message.phases
        )
        for message in messages
    )


def struct(message: struct_pb2.Struct) -> dict[str, Any]:
    """Scheduler options as they were sent. Raises BadRequest for what JSON has no word for."""
    try:
        return json_format.MessageToDict(message)
    except Exception as error:  # not a number, or infinite: a class of its own in each protobuf
        raise BadRequest(f"scheduler_options cannot be read: {error}", field="scheduler_options") from None


def method(message: compose_pb2.Method) -> tuple[str, Parameters]:
    """A method's name and what it was told."""
    given = {name: getattr(message, name) for name in _PARAMETERS if message.HasField(name)}
    return message.name or "naive", Parameters(**given)
