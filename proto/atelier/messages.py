"""What both clients share: requests, pictures put together, gRPC's errors turned into one."""

import getpass
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import grpc
from google.protobuf import json_format, struct_pb2

from atelier.v1 import catalog_pb2, compose_pb2, hub_pb2, render_pb2

DEFAULT_SERVER = "127.0.0.1:7431"
CHUNK = 1 << 20
PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the attempts to go on with a transfer that was cut."""
RESTART = (*PAUSES, *[5.0] * 10)
"""The same for those who watch: a server that starts anew warms a base first."""
_READS = {
    "atelier.v1.CatalogService": (
        "GetPreview",
        "GetUpload",
        "GetVersion",
        "ListAssets",
        "ListCards",
        "ListVersions",
    ),
    "atelier.v1.ComposeService": ("CompareVersions", "FindSimilar", "ListMethods"),
    "atelier.v1.RenderService": ("ListBases",),
    "atelier.v1.EngineService": ("GetStatus",),
    "atelier.v1.JobService": ("GetJob", "ListJobs"),
    "atelier.v1.HubService": ("Status",),
}
_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": name} for service, names in _READS.items() for name in names
            ],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
OPTIONS = [
    ("grpc.service_config", json.dumps(_CONFIG)),
    ("grpc.max_receive_message_length", 72 << 20),
    ("grpc.max_send_message_length", 72 << 20),
]
Part = catalog_pb2.CheckInRequest | bytes
"""A message of a check-in, or the chunk that makes one."""
_CHUNK = bytes([catalog_pb2.CheckInRequest.CHUNK_FIELD_NUMBER << 3 | 2])
"""How a field of bytes begins: its number, and that a length follows."""
Progress = Callable[[int, int], None]
"""Called with bytes (or steps) done, and all of them."""
HubProgress = Callable[[hub_pb2.HubStep], None]
"""Called with how far a push, a pull or a sync is."""
StackWeight = float | tuple[float, Mapping[str, float]]
"""A weight, or a weight with factors for parts of the base: `(0.8, {"text_encoder": 0})`."""
Stack = Mapping[str, StackWeight] | Sequence[tuple[str, StackWeight]]
"""References with weights; the order matters to ordered methods."""
Phase = tuple[float, float] | tuple[float, float, float] | tuple[float, float, float, float]
"""Start and end, shares of the steps; the factor on the weight there; and that at the end."""


def address_of(server: str) -> str:
    """`server`, else ATELIER_SERVER, else 127.0.0.1:7431; see `atelier.channels`."""
    return server or os.environ.get("ATELIER_SERVER", "") or DEFAULT_SERVER


def signature() -> tuple[tuple[str, str], ...]:
    """The metadata that tells who calls: ATELIER_USER, else the account's name; and ATELIER_TOKEN, for a
    server that wants one.
    """
    try:
        name = os.environ.get("ATELIER_USER") or getpass.getuser()
    except (OSError, KeyError):  # an account without a name, in a container
        name = ""
    told = (("atelier-user", "".join(c if c.isascii() and c.isprintable() else "?" for c in name)),)
    token = os.environ.get("ATELIER_TOKEN", "").strip()
    return (
        (*told, ("authorization", f"Bearer {token}"))
        if token.isascii() and token.isprintable() and token
        else told
    )


class AtelierError(Exception):
    """A call that failed: `code` is the gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture: its place in the request, and the PNG with its manifest inside."""

    index: int
    png: bytes


def assemble(parts: dict[int, bytearray], event: render_pb2.RenderResponse) -> Picture | None:
    """The picture that this event completes."""
    if not event.HasField("image"):
        return None
    chunk = event.image
    parts.setdefault(chunk.image, bytearray()).extend(chunk.data)
    return Picture(chunk.image, bytes(parts.pop(chunk.image))) if chunk.last else None


@contextmanager
def errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _translate(error, address) from None


def _translate(error: grpc.RpcError, address: str) -> AtelierError:
    code, details = error.code(), error.details() or ""
    # What a server says carries details; without them nobody was there to say it.
    said = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    if code is grpc.StatusCode.UNAVAILABLE and not said and "shutting down" not in details:
        details = f"no server answers at {address}; start one with `atelier serve`, or set ATELIER_SERVER"
        if address.startswith("grpcs://"):
            details += (
                ". If it runs, its certificate is not trusted here: ATELIER_CA names authorities to trust"
            )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and "allow more time" not in details:  # gRPC's own words
        details = "the deadline passed before the answer came; allow more time (--timeout), or ask for less"
    return AtelierError(code, details)


def weighted(stack: Stack) -> list[compose_pb2.WeightedRef]:
    pairs = stack.items() if isinstance(stack, Mapping) else stack
    split = ((ref, *(told if isinstance(told, tuple) else (told, {}))) for ref, told in pairs)
    return [compose_pb2.WeightedRef(ref=ref, weight=weight, parts=parts) for ref, weight, parts in split]


def list_request(
    text: str = "",
    *,
    labels: Iterable[tuple[str, str]] = (),
    made_after: datetime | None = None,
    made_before: datetime | None = None,
    page_token: str = "",
) -> catalog_pb2.ListAssetsRequest:
    """A question to the catalog: words, labels as (field, value), times of check-in; all must hold."""
    return catalog_pb2.ListAssetsRequest(
        text=text,
        labels=[catalog_pb2.Label(field=field, value=value) for field, value in labels],
        made_after=made_after,
        made_before=made_before,
        page_token=page_token,
    )


def method(name: str = "", **told: float | str | bool | None) -> compose_pb2.Method:
    """A merge method with what it is told (`rank=16`, `mu=3`, `mode="symmetric"`; None is not said);
    `Client.methods` lists them. Raises ValueError for a parameter that no method has, or a value it cannot
    have.
    """
    said = {key: value for key, value in told.items() if value is not None}
    known = set(compose_pb2.Method.DESCRIPTOR.fields_by_name) - {"name"}
    if unknown := sorted(said.keys() - known):
        raise ValueError(f"no method takes {unknown[0]!r}; there are {', '.join(sorted(known))}")
    try:
        return json_format.ParseDict({"name": name, **said}, compose_pb2.Method())
    except json_format.ParseError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def render_request(
    prompt: str,
    *,
    stack: Stack = (),
    method: compose_pb2.Method | None = None,
    negative_prompt: str = "",
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int | None = None,
    base: str = "",
    preview_every: int = 0,
    scheduler: str = "",
    scheduler_options: Mapping[str, Any] | None = None,
    image: bytes = b"",
    mask: bytes = b"",
    strength: float | None = None,
    batch: int | None = None,
    priority: int | None = None,
    request_id: str = "",
    schedules: Mapping[str, Sequence[Phase]] | None = None,
    controls: Sequence[render_pb2.Control] = (),
    references: Sequence[render_pb2.Reference] = (),
) -> render_pb2.RenderRequest:
    """A request; what is None is the base's default (the seed: the server's choice). Sizes in pixels.
    `schedules` says when an adapter of the stack acts, by its reference; `control` and `reference` make what
    steers it besides. Raises ValueError for a schedule of no adapter.
    """
    refs = [ref for ref, _ in (stack.items() if isinstance(stack, Mapping) else stack)]
    if unknown := next((ref for ref in schedules or {} if ref not in refs), None):
        raise ValueError(f"a schedule for {unknown!r}, which is not in the stack")
    return render_pb2.RenderRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        stack=weighted(stack),
        method=method,
        seed=seed,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
        count=count,
        base=base,
        preview_every=preview_every,
        scheduler=scheduler,
        scheduler_options=_struct(scheduler_options or {}),
        image=image,
        mask=mask,
        strength=strength,
        batch=batch,
        priority=priority,
        request_id=request_id,
        schedules=[_schedule(schedules.get(ref, ())) for ref in refs] if schedules else (),
        controls=controls,
        references=references,
    )


def control(
    name: str,
    image: bytes,
    *,
    weight: float | None = None,
    start: float | None = None,
    end: float | None = None,
    mode: str = "",
) -> render_pb2.Control:
    """A picture for one of the base's ControlNets, which acts from `start` to `end`, shares of the steps; to
    one that reads several kinds `mode` says which it is.
    """
    return render_pb2.Control(name=name, image=image, weight=weight, start=start, end=end, mode=mode)


def reference(name: str, image: bytes, *, weight: float | None = None) -> render_pb2.Reference:
    """A picture to resemble, by one of the base's IP-Adapters."""
    return render_pb2.Reference(name=name, image=image, weight=weight)


def _struct(told: Mapping[str, Any]) -> struct_pb2.Struct | None:
    return json_format.ParseDict(dict(told), struct_pb2.Struct()) if told else None


def _schedule(phases: Sequence[Phase]) -> render_pb2.Schedule:
    names = ("start", "end", "weight", "end_weight")
    return render_pb2.Schedule(
        phases=[render_pb2.Phase(**dict(zip(names, phase, strict=False))) for phase in phases]
    )


def check_in_parts(
    file: BinaryIO, header: catalog_pb2.CheckInHeader, progress: Progress | None
) -> Iterator[Part]:
    """What a check-in sends, from the header's offset on; the digest of the whole file comes last."""
    yield catalog_pb2.CheckInRequest(header=header)
    file.seek(0)
    seen, done = hashlib.sha256(), 0
    while chunk := file.read(CHUNK if done >= header.offset else min(CHUNK, header.offset - done)):
        seen.update(chunk)
        if done >= header.offset:
            yield chunk
        done += len(chunk)
        if progress:
            progress(done, header.size_bytes)
    yield catalog_pb2.CheckInRequest(digest=f"sha256:{seen.hexdigest()}")


def on_the_wire(part: Part) -> bytes:
    """The message as bytes. A chunk is copied once, by protobuf twice: into a message, and out of that."""
    if not isinstance(part, bytes):
        return part.SerializeToString()
    length, left = bytearray(), len(part)
    while left > 0x7F:  # seven bits a byte, the lowest first
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return b"".join((_CHUNK, length, part))


def check_in_header(
    path: Path,
    name: str,
    *,
    base: str,
    card: bytes,
    triggers: Iterable[str],
    alias: str,
    adapter_config: bytes,
    request_id: str,
    file_name: str,
    origin: Mapping[str, Any] | None,
) -> catalog_pb2.CheckInHeader:
    return catalog_pb2.CheckInHeader(
        name=name,
        base=base,
        card=card,
        triggers=list(triggers),
        alias=alias,
        file_name=(file_name or path.name).encode(errors="replace").decode(),
        adapter_config=adapter_config,
        request_id=request_id or str(uuid.uuid4()),
        size_bytes=path.stat().st_size,
        origin_json=json.dumps(origin, ensure_ascii=False) if origin else "",
    )
