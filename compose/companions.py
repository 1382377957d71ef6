"""Models that stand beside a base and steer its renders: ControlNets (`compose.controls`) and IP-Adapters
(`compose.references`), found on disk and checked before anybody asks for them.

    Companion("canny", "ControlNetModel", Path("/models/canny"), "sha256:…", 361_000_000)

They are no part of the base's digest, for a bare render does not know of them; manifests name them by theirs.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from compose.errors import IncompatibleBase, InvalidRequest

LIMIT = 4
"""Controls of a render, and references of one."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
Shapes = Mapping[str, tuple[int, ...]]
Base = TypeVar("Base")


@dataclass(frozen=True, slots=True)
class Encoder:
    """What reads the pictures of an IP-Adapter; `parameters` are the numbers in its weights."""

    path: Path
    digest: str
    parameters: int


@dataclass(frozen=True, slots=True)
class Companion:
    """A ControlNet (`kind` is its class in diffusers) or an IP-Adapter (`kind` says how it reads pictures),
    under the name that a render asks for it by. A ControlNet may read pictures of several kinds, `modes` by
    number, and one that is `masked` reads where its picture is transparent.
    """

    name: str
    kind: str
    path: Path
    digest: str
    parameters: int
    encoder: Encoder | None = None
    modes: tuple[str, ...] = ()
    masked: bool = False


def numbers(companions: Iterable[Companion]) -> int:
    """In the weights of all of them; what has several names, or several share, is loaded from its place
    once.
    """
    found = tuple(companions)
    encoders = {one.encoder.path: one.encoder.parameters for one in found if one.encoder}
    return sum(({one.path: one.parameters for one in found} | encoders).values())


def told(text: str, option: str, bases: Mapping[str, Base]) -> tuple[Base, str, str]:
    """`BASE:NAME=PLACE` -> its three, of bases by name. Raises InvalidRequest."""
    left, equals, place = text.partition("=")
    base, colon, name = left.partition(":")
    if not (equals and colon and place and base):
        raise InvalidRequest(f"--{option} {text[:200]}: write BASE:NAME=PLACE", field=option)
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"--{option} {text[:200]}: {name[:80]!r} is no name; take up to 64 of a-z, 0-9, '.', '_', '-'",
            field=option,
        )
    if base not in bases:
        raise InvalidRequest(
            f"--{option} {text[:200]}: there is no base {base[:80]!r}; there is {', '.join(bases)}",
            field=option,
        )
    return bases[base], name, place


def configuration(path: Path, option: str) -> dict[str, Any]:
    """A model directory's config.json. Raises InvalidRequest for a place that is none."""
    if not path.is_dir():
        raise InvalidRequest(f"--{option}: there is no directory {path}", field=option)
    try:
        found = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise IncompatibleBase(f"{path / 'config.json'} cannot be read: {error}", field=option) from None
    if not isinstance(found, dict):
        raise IncompatibleBase(f"{path / 'config.json'} is no configuration", field=option)
    return found


def stored(path: Path, stem: str, option: str) -> Shapes:
    """Shapes of the tensors of a model directory, whose weights are `STEM.safetensors` or, in several files,
    what `STEM.safetensors.index.json` says, or the `variant`. Raises IncompatibleBase for missing and damaged
    files.
    """
    if variant(path, stem):
        return shapes(path / f"{stem}.{variant(path, stem)}.safetensors", option)
    index, one = path / f"{stem}.safetensors.index.json", path / f"{stem}.safetensors"
    if one.is_file() or not index.is_file():
        return shapes(one, option)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompatibleBase(f"{index} cannot be read: {error}", field=option) from None
    return {name: shape for file in files for name, shape in shapes(file, option).items()}


def variant(path: Path, stem: str) -> str | None:
    """`fp16` where the weights of a model directory are there as `STEM.fp16.safetensors` alone."""
    others = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    alone = (path / f"{stem}.fp16.safetensors").is_file() and not any((path / o).is_file() for o in others)
    return "fp16" if alone else None


def shapes(file: Path, option: str) -> Shapes:
    """Shapes of the tensors in a file, from its header. Raises IncompatibleBase."""
    if not file.is_file():
        raise IncompatibleBase(f"{file} is missing; download it again", field=option)
    try:
        with safe_open(file, "pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IncompatibleBase(f"{file} cannot be read: {error}", field=option) from None


def check_shapes(found: Shapes, wanted: Shapes, path: Path, option: str) -> None:
    """Raises IncompatibleBase for a tensor that is missing, too many, or of another shape than the
    configuration says.
    """
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            here, there = (str(shapes[name]) if name in shapes else "none" for shapes in (found, wanted))
            raise IncompatibleBase(
                f"{path} is damaged: of {name!r} there is {here}, its configuration wants {there}",
                field=option,
            )


def digest_of(path: Path) -> str:
    """sha256 over the names and bytes of a directory's weight and configuration files, in order of name."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in {".safetensors", ".json", ".txt"}:
            total.update(f"{digest_of_file(file)}  {file.relative_to(path).as_posix()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def digest_of_file(file: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
