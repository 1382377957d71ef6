"""Modes of union ControlNets, which read pictures of several kinds: what they are called, and which is meant.

    named_modes("ControlNetUnionModel", 8, [], path)   # ("openpose", "depth", "hed", "canny", …)
    number_of(net, "depth", "controls[0]")             # 1, as "1" is

A model's configuration says how many modes it has, and no names: those of the published models are known
here, others are named where the model is served, and a number always says which.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from compose.companions import Companion
from compose.errors import InvalidRequest

PLAIN, UNION = "ControlNetModel", "ControlNetUnionModel"
SD3, FLUX = "SD3ControlNetModel", "FluxControlNetModel"
_XINSIR = ("openpose", "depth", "hed", "canny", "normal", "segment")
_MODES: Mapping[tuple[str, int], tuple[str, ...]] = {
    (UNION, 6): _XINSIR,
    (UNION, 8): (*_XINSIR, "tile", "repaint"),
    (FLUX, 10): ("canny", "tile", "depth", "blur", "pose", "gray", "lq"),
}
"""What the modes of published union ControlNets are called, by number, of those with so many: xinsir's two
for SDXL, and those of InstantX and Shakker Labs for FLUX.1, whose last three are not trained.
"""
_WORD = re.compile(r"(?=.*[a-z])[a-z0-9][a-z0-9_-]{0,31}")
INPAINT = "inpaint"
"""What a server says of a ControlNet of SD 1, 2 or XL that reads where its picture is transparent: its files
do not.
"""


def named_modes(kind: str, number: int, words: Sequence[str], path: Path) -> tuple[str, ...]:
    """Names of this many modes, by number; what has none is called by its number. Raises InvalidRequest."""
    if words and not number:
        hint = f"; it may be said to be {INPAINT}, no more" if kind == PLAIN else ""
        raise InvalidRequest(
            f"--control: {path} has no modes to be named {', '.join(words)[:80]}{hint}", field="control"
        )
    wrong = [word for word in words if not _WORD.fullmatch(word) or words.count(word) > 1]
    if wrong:
        raise InvalidRequest(
            f"--control: {wrong[0][:80]!r} is no name of a mode; take up to 32 of a-z, 0-9, '_', '-', each "
            "name once, and more than digits",
            field="control",
        )
    if len(words) > number:
        raise InvalidRequest(f"--control: {path} has {number} modes, not {len(words)}", field="control")
    names = tuple(words) or _MODES.get((kind, number), ())
    return (*names, *map(str, range(len(names), number)))


def number_of(net: Companion, mode: str, field: str) -> int | None:
    """Of a mode, which is said by name or number; None for a ControlNet without. Raises InvalidRequest."""
    if not net.modes:
        if mode:
            raise InvalidRequest(
                f"{field}.mode {mode[:80]!r} says nothing to {net.name}, which reads pictures of one kind; "
                "leave it out",
                field=f"{field}.mode",
            )
        return None
    if mode in net.modes:
        return net.modes.index(mode)
    if mode.isascii() and mode.isdecimal() and len(mode) < 9 and int(mode) < len(net.modes):
        return int(mode)
    wrong = f"{mode[:80]!r} is none of {net.name}'s" if mode else f"is missing: say what {net.name} reads"
    raise InvalidRequest(
        f"{field}.mode {wrong}; take one of {', '.join(net.modes)}, or its number, 0 to {len(net.modes) - 1}",
        field=f"{field}.mode",
    )
