"""Manifests: everything needed to make a picture again, as JSON inside its PNG (an iTXt chunk named
`atelier`).

    {"manifest": 2, "base": {"name", "digest"},
     "stack": [{"ref", "digest", "adapter_config", "weight", "words", "groups"?, "parts"?, "phases"?}…],
     "method": {"name", …},
     "prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height", "scheduler",
     "scheduler_options"?: {…}, "batch"?: {"size", "index"}, "source"?: {"image", "strength", "mask"?},
     "controls"?: [{"name", "digest", "image", "weight", "start", "end", "mode"?, "masked"?}…],
     "references"?: [{"name", "digest", "encoder", "image", "weight"}…],
     "flattened"?: true, "environment": {…}}

`prompt` is what was encoded, after `{name}` was filled in; `seed` is the picture's own; `batch` says with how
many others it was rendered at once; a control's `mode` is its number. Pictures that are not said to be
`flattened` (`compose.source`) were taken without their transparency. Manifest 1 is of prompts without
emphasis, one window of them.
"""

import io
import json
import platform
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from compose import grid
from compose.errors import InvalidRequest
from compose.render import Picture
from compose.settings import BATCH_LIMIT, PIXELS_LIMIT, PROMPT_LIMIT

VERSION = 2
CHUNK = "atelier"
PNG_LIMIT, TEXT_LIMIT, STRING_LIMIT = 64 << 20, 256 << 10, 4 * PROMPT_LIMIT
_FIELDS: dict[str, tuple[type, ...]] = {
    "base": (dict,),
    "stack": (list,),
    "method": (dict,),
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "steps": (int,),
    "guidance": (int, float),
    "width": (int,),
    "height": (int,),
    "environment": (dict,),
}
_STACK_FIELDS: dict[str, tuple[type, ...]] = {
    "ref": (str,),
    "digest": (str,),
    "weight": (int, float),
    "words": (list,),
    "adapter_config": (str,),
}
_NUMBER_LIMIT = 1 << 64


def environment(device: torch.device, dtype: str) -> dict[str, str]:
    """What the same pixels need besides the same request."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {platform.machine()}",
        "dtype": dtype,
        "threads": "" if cuda else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def flattened(manifest: Mapping[str, Any]) -> bool:
    """Whether what is transparent in the pictures that were sent lay on a colour."""
    return bool(manifest.get("flattened"))


def differences(manifest: Mapping[str, Any], base_digest: str, here: Mapping[str, str]) -> list[str]:
    """Why a replay here may not give the same pixels; empty when it will."""
    there = manifest["environment"]
    found = [
        f"{key} was {there.get(key, 'not recorded')}, here it is {value}"
        for key, value in here.items()
        if there.get(key) != value
    ]
    if manifest["base"].get("digest") != base_digest:
        found.insert(0, f"the base was {manifest['base'].get('digest')}, here it is {base_digest}")
    return found


def to_png(picture: Picture, manifest: str = "") -> bytes:
    """The picture `[height, width, 3]` as PNG, with its manifest inside."""
    info = PngImagePlugin.PngInfo()
    if manifest:
        info.add_itxt(CHUNK, manifest)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "png", pnginfo=info)
    return out.getvalue()


def from_png(data: bytes) -> str:
    """The manifest inside a PNG. Raises InvalidRequest when there is none."""
    if len(data) > PNG_LIMIT:
        raise InvalidRequest(f"the PNG has {len(data)} bytes, the limit is {PNG_LIMIT}", field="png")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:  # reads the chunks before the pixels
            large = image.width * image.height > PIXELS_LIMIT
            if not large and not {CHUNK, grid.CHUNK} & image.info.keys():
                image.load()  # and those behind them, where some tools put what is text
            text, of_sweep = image.info.get(CHUNK), grid.CHUNK in image.info
    except UnidentifiedImageError:
        raise InvalidRequest("this is no PNG; send one that Atelier rendered", field="png") from None
    except Exception as error:  # Pillow's parsers raise whatever they stumble over
        raise InvalidRequest(f"this is no PNG: {error}", field="png") from None
    if of_sweep and not text:
        raise InvalidRequest(
            "this PNG is the grid of a sweep; replay one of its cells (atelier sweep --cells DIR keeps them)",
            field="png",
        )
    if text is None and large:
        raise InvalidRequest(
            f"this PNG has no manifest before its pixels, and {image.width}x{image.height} of them, which is "
            "more than a render has; send the picture that Atelier rendered",
            field="png",
        )
    if not isinstance(text, str):
        raise InvalidRequest(
            "this PNG carries no manifest: it was not made by Atelier, or was saved again without it",
            field="png",
        )
    return text


def parse(text: str) -> dict[str, Any]:
    """A manifest's fields, checked. Raises InvalidRequest."""
    if len(text) > TEXT_LIMIT:
        raise InvalidRequest(
            f"the manifest has {len(text)} characters, the limit is {TEXT_LIMIT}", field="manifest_json"
        )
    try:
        manifest = json.loads(text)
        _check_values(manifest)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the manifest is damaged: {error}", field="manifest_json") from None
    if not isinstance(manifest, dict) or manifest.get("manifest") not in (1, VERSION):
        raise InvalidRequest("this is no manifest that this version of Atelier reads", field="manifest_json")
    _check(manifest, _FIELDS)
    if manifest["seed"] < 0:
        raise InvalidRequest(
            f"the manifest's seed {manifest['seed']} is below 0, which no render has", field="manifest_json"
        )
    for entry in manifest["stack"]:
        if not isinstance(entry, dict):
            raise InvalidRequest("the manifest's stack is damaged", field="manifest_json")
        _check(entry, _STACK_FIELDS)
        if not all(isinstance(word, str) for word in entry["words"]):
            raise InvalidRequest("the manifest's words are not text", field="manifest_json")
        groups = entry.get("groups", {})
        if not (isinstance(groups, dict) and all(isinstance(words, list) for words in groups.values())):
            raise InvalidRequest("the manifest's groups of words are damaged", field="manifest_json")
        parts = entry.get("parts", {})
        if not (isinstance(parts, dict) and all(type(factor) in (int, float) for factor in parts.values())):
            raise InvalidRequest("the manifest's weights by part are damaged", field="manifest_json")
        _check_phases(entry.get("phases", []))
    _check_optional(manifest)
    return manifest


def _check_phases(phases: object) -> None:
    """They are numbers here; whether they make a schedule is said where it is made."""
    if not (
        isinstance(phases, list)
        and all(isinstance(phase, list) and len(phase) in (3, 4) for phase in phases)
        and all(type(number) in (int, float) for phase in phases for number in phase)
    ):
        raise InvalidRequest("the manifest's phases are damaged", field="manifest_json")


def _check_optional(manifest: Mapping[str, Any]) -> None:
    batch, source = manifest.get("batch", {"size": 1, "index": 0}), manifest.get("source")
    _check({"batch": batch}, {"batch": (dict,)})
    _check(batch, {"size": (int,), "index": (int,)})
    if not 0 <= batch["index"] < batch["size"] <= BATCH_LIMIT or batch["index"] > manifest["seed"]:
        raise InvalidRequest("the manifest's batch is damaged", field="manifest_json")
    if not isinstance(manifest.get("scheduler_options", {}), dict):
        raise InvalidRequest("the manifest's scheduler options are damaged", field="manifest_json")
    if not isinstance(manifest.get("flattened", True), bool):
        raise InvalidRequest("the manifest's 'flattened' is neither true nor false", field="manifest_json")
    _check_guides(manifest, "controls", "weight", "start", "end")
    _check_guides(manifest, "references", "weight")
    if source is not None:
        _check({"source": source}, {"source": (dict,)})
        _check(source, {"image": (str,), "strength": (int, float)})
        if not isinstance(source.get("mask", ""), str):
            raise InvalidRequest("the manifest's source is damaged", field="manifest_json")


def _check_guides(manifest: Mapping[str, Any], what: str, *numbers: str) -> None:
    """What is out of range is said where it is used."""
    entries = manifest.get(what, [])
    _check({what: entries}, {what: (list,)})
    for entry in entries:
        _check({what: entry}, {what: (dict,)})
        _check(entry, dict.fromkeys(("name", "digest", "image"), (str,)))
        _check({"encoder": entry.get("encoder", "")}, {"encoder": (str,)})
        _check(entry, dict.fromkeys(numbers, (int, float)))
        _check({"mode": entry.get("mode", 0)}, {"mode": (int,)})
        if not isinstance(entry.get("masked", True), bool):
            raise InvalidRequest("the manifest's 'masked' is neither true nor false", field="manifest_json")


def _check(found: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    for name, kinds in fields.items():
        if not isinstance(found.get(name), kinds) or isinstance(found.get(name), bool):
            raise InvalidRequest(
                f"the manifest's {name!r} is missing or of the wrong kind", field="manifest_json"
            )


def _check_values(value: object) -> None:
    """Raises ValueError for a number out of range, or a text too long or not UTF-8, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_values(key)
            _check_values(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner)
    elif isinstance(value, str):
        if len(value.encode()) > STRING_LIMIT:
            raise ValueError(f"a text of more than {STRING_LIMIT} bytes")
    elif isinstance(value, int | float) and not -_NUMBER_LIMIT < value < _NUMBER_LIMIT:
        raise ValueError("a number out of range")
