"""Controls and references of a render: from what was asked, or from a manifest and the pictures sent again.

Sent.of(request).files()                      # what a job keeps: {"image", "mask", "control0", …}
guides(request, base, settings)               # checked, decoded, of the render's size
guides_again(told, base, sent, settings)      # what a manifest says, of pictures with its digests
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from atelier.v1 import render_pb2
from compose.bases import Base
from compose.companions import LIMIT
from compose.controls import Control
from compose.errors import IncompatibleBase, InvalidRequest
from compose.guiding import Guides
from compose.manifest import flattened
from compose.references import SIDE_LIMIT, Reference
from compose.settings import Settings
from compose.source import BLACK, CLEAR, WHITE
from server.errors import BadRequest
from server.pictures import Original, Picture, digest


@dataclass(frozen=True, slots=True)
class Sent:
    """The pictures of a request, as they were sent."""

    image: bytes = b""
    mask: bytes = b""
    controls: tuple[bytes, ...] = ()
    references: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, request: render_pb2.RenderRequest) -> "Sent":
        """Those of a request to render."""
        controls, references = (
            [one.image for one in told] for told in (request.controls, request.references)
        )
        return cls(request.image, request.mask, tuple(controls), tuple(references))

    @classmethod
    def again(cls, request: render_pb2.ReplayRequest) -> "Sent":
        """Those that came with a manifest."""
        return cls(
            request.image, request.mask, tuple(request.control_images), tuple(request.reference_images)
        )

    @classmethod
    def kept(cls, files: Mapping[str, bytes]) -> "Sent":
        """Those that a job has kept."""

        def numbered(what: str) -> tuple[bytes, ...]:
            return tuple(files[f"{what}{i}"] for i in range(LIMIT) if f"{what}{i}" in files)

        return cls(
            files.get("image", b""), files.get("mask", b""), numbered("control"), numbered("reference")
        )

    def files(self) -> dict[str, bytes]:
        """What a job keeps of them, by name."""
        found = {"image": self.image, "mask": self.mask}
        for what, pictures in (("control", self.controls), ("reference", self.references)):
            found |= {f"{what}{i}": data for i, data in enumerate(pictures)}
        return found


def guides(request: render_pb2.RenderRequest, base: Base, settings: Settings, kind: str) -> Guides:
    """What steers a render that starts from `kind`: "" for nothing, "image" or "mask". Raises InvalidRequest,
    IncompatibleBase, BadRequest.
    """
    _check_number(request.controls, "controls")
    masked = {net.name for net in base.controls if net.masked}
    controls = [
        Control(
            told.name,
            _fitted(
                _given(told.image, f"controls[{i}]"),
                f"controls[{i}].image",
                settings,
                CLEAR if told.name in masked else BLACK,
            ),
            weight=told.weight if told.HasField("weight") else 1.0,
            start=told.start,
            end=told.end if told.HasField("end") else 1.0,
            digest=digest(told.image),
            mode=told.mode,
        )
        for i, told in enumerate(request.controls)
    ]
    _check_number(request.references, "references")
    references = [
        Reference(
            told.name,
            _shrunk(_given(told.image, f"references[{i}]"), f"references[{i}].image", WHITE),
            weight=told.weight if told.HasField("weight") else 1.0,
            digest=digest(told.image),
            behind=WHITE,
        )
        for i, told in enumerate(request.references)
    ]
    found = Guides(tuple(controls), tuple(references))
    found.check(base, kind)
    return found


def guides_again(
    told: Mapping[str, Any], base: Base, sent: Sent, settings: Settings, kind: str
) -> tuple[Guides, list[str]]:
    """What a manifest says steered its render, and in what it is another now. Raises as `guides` does, and
    BadRequest when the pictures are not those.
    """
    controls, differences = [], list[str]()
    pictures = {digest(data): data for data in sent.controls}
    _check_number(told.get("controls", ()), "controls")
    for entry in told.get("controls", ()):
        data = _same(pictures, entry, "control")
        behind = CLEAR if entry.get("masked") else BLACK if flattened(told) else ""
        controls.append(
            Control(
                entry["name"],
                _fitted(data, "control_images", settings, behind),
                weight=float(entry["weight"]),
                start=entry["start"],
                end=entry["end"],
                digest=entry["image"],
                mode=str(entry.get("mode", "")),
            )
        )
    pictures = {digest(data): data for data in sent.references}
    _check_number(told.get("references", ()), "references")
    behind = WHITE if flattened(told) else ""
    references = [
        Reference(
            entry["name"],
            _shrunk(_same(pictures, entry, "reference"), "reference_images", behind),
            weight=float(entry["weight"]),
            digest=entry["image"],
            behind=behind,
        )
        for entry in told.get("references", ())
    ]
    _all_used(sent.controls, {entry["image"] for entry in told.get("controls", ())}, "control")
    _all_used(sent.references, {entry["image"] for entry in told.get("references", ())}, "reference")
    found = Guides(tuple(controls), tuple(references))
    try:
        found.check(base, kind)
    except InvalidRequest as error:
        raise (IncompatibleBase if error.field.endswith((".name", ".mode")) else InvalidRequest)(
            f"this picture cannot be made again: {error}", field="manifest_json"
        ) from None
    now = found.told(base)
    for what, kind in (("controls", "ControlNet"), ("references", "IP-Adapter")):
        for was, here in zip(told.get(what, ()), now.get(what, ()), strict=True):
            differences += [
                f"the {part} {was['name']} was {was.get(key, 'not recorded')}, here it is {here[key]}"
                for part, key in ((kind, "digest"), ("image encoder of", "encoder"))
                if key in here and was.get(key) != here[key]
            ]
    return found, differences


def _check_number(told: Sequence[object], what: str) -> None:
    if len(told) > LIMIT:
        raise BadRequest(f"{len(told)} {what}, the limit is {LIMIT}", field=what)


def _given(data: bytes, field: str) -> bytes:
    if not data:
        raise BadRequest(f"{field} has no image: send the picture that it is about", field=f"{field}.image")
    return data


def _same(pictures: Mapping[str, bytes], entry: Mapping[str, Any], what: str) -> bytes:
    """The picture that a manifest names. Raises BadRequest."""
    if entry["image"] not in pictures:
        raise BadRequest(
            f"this picture was made with the {what} {entry['image']} for {entry['name']}; send that with it",
            field=f"{what}_images",
        )
    return pictures[entry["image"]]


def _all_used(pictures: Sequence[bytes], used: Container[str], what: str) -> None:
    """Raises BadRequest for a picture that a manifest does not name."""
    if left := next((found for data in pictures if (found := digest(data)) not in used), None):
        raise BadRequest(
            f"this picture was made without the {what} {left}; leave it out", field=f"{what}_images"
        )


def _fitted(data: bytes, field: str, settings: Settings, behind: str) -> Picture:
    """A picture of the render's size."""
    return Original(data, field, behind=behind).fitted((settings.width, settings.height))


def _shrunk(data: bytes, field: str, behind: str) -> Picture:
    """A picture for an image encoder, which makes it smaller still."""

    def made(image: Image.Image) -> Image.Image:
        small = image.copy()
        small.thumbnail((SIDE_LIMIT, SIDE_LIMIT), Image.Resampling.LANCZOS)
        return small

    return Original(data, field, behind=behind).made("reference", (SIDE_LIMIT,), made)
