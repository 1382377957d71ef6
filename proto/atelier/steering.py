"""`--control NAME/MODE=FILE@WEIGHT:START..END` and `--reference NAME=FILE@WEIGHT` as they are typed."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from atelier.console import USAGE, fail, picture
from atelier.messages import control, reference

_NUMBER = r"(\d*\.?\d+)"
_CONTROL = re.compile(rf"([^=/]+)(?:/([^=]+))?=(.+?)(?:@{_NUMBER}?(?::{_NUMBER}\.\.{_NUMBER})?)?")
_REFERENCE = re.compile(rf"([^=]+)=(.+?)(?:@{_NUMBER})?")

Controls = Annotated[
    list[str],
    typer.Option(
        "--control",
        metavar="NAME[/MODE]=FILE[@WEIGHT[:START..END]]",
        help="A picture that says where things are, for one of the base's ControlNets: canny=edges.png@0.8, "
        "or for a part of the steps canny=edges.png@0.8:0..0.6; union/depth=depth.png for one that reads "
        "several kinds. May be repeated.",
    ),
]
References = Annotated[
    list[str],
    typer.Option(
        "--reference",
        metavar="NAME=FILE[@WEIGHT]",
        help="A picture to resemble, by one of the base's IP-Adapters. May be repeated.",
    ),
]
ControlFiles = Annotated[
    list[Path], typer.Option("--control", help="A picture that it was steered by. May be repeated.")
]
ReferenceFiles = Annotated[
    list[Path], typer.Option("--reference", help="A picture that it resembles. May be repeated.")
]


def steered(controls: list[str], references: list[str]) -> dict[str, Any]:
    """The settings `controls` and `references`. Ends the command for what is mistyped, and for a file that is
    no picture.
    """
    found: dict[str, Any] = {"controls": [], "references": []}
    for told in controls:
        name, mode, file, *numbers = _parts(_CONTROL, told, "--control", "NAME=FILE@0.8:0..0.6")
        weight, start, end = (None if text is None else float(text) for text in numbers)
        image = picture(Path(file))
        found["controls"].append(control(name, image, weight=weight, start=start, end=end, mode=mode or ""))
    for told in references:
        name, file, weight = _parts(_REFERENCE, told, "--reference", "NAME=FILE@0.8")
        found["references"].append(
            reference(name, picture(Path(file)), weight=float(weight) if weight else None)
        )
    return found


def _parts(pattern: re.Pattern[str], told: str, option: str, example: str) -> list[Any]:
    matched = pattern.fullmatch(told)
    if matched is None:
        raise fail(f"{option} {told}: write {example}", USAGE)
    return list(matched.groups())
