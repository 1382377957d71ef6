"""`atelier sweep`: what varies as it is typed, the grid, the JSON beside it.

NAME=0:1.2:7   NAME=0,0.5,1          weights of an adapter of the stack (weight:NAME says so)
version:NAME=1,2,stable              versions of one
seed=1,2,3   seed=1:3   seed=+4      seeds; +4: so many from --seed on
method=naive,orthogonal/side=output  methods with what they are told
prompt=FILE   prompt=TEXT            a prompt a line; texts may be repeated
guidance=1:9:5   steps=4,8,20   scheduler=DDIMScheduler,EulerDiscreteScheduler
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from atelier.client import Client
from atelier.console import (
    NOT_FOUND,
    USAGE,
    AsJson,
    Energy,
    MethodName,
    Rank,
    Settings,
    StackOption,
    Timeout,
    check_picture,
    command,
    fail,
    how,
    pairs,
    picture,
    progress,
    size_of,
)
from atelier.picturing import (
    BaseName,
    Image,
    Mask,
    Priority,
    SchedulerName,
    Strength,
    When,
    schedules,
    scheduling,
)
from atelier.steering import Controls, References, steered
from atelier.sweeps import Cell, axis
from atelier.v1 import compose_pb2, sweep_pb2

STRENGTH = "0:1.2:7"
VALUES_LIMIT = 256
_REF = re.compile(r"sha256:[0-9a-f]{64}|[a-z0-9][a-z0-9._-]*([:@][A-Za-z0-9._-]+)?")
_FILE = re.compile(r"\S+\.(txt|text|csv|tsv|md)", re.IGNORECASE)
Values = Sequence[float | str | compose_pb2.Method]


@command
def sweep(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT or REF",
            help="What to draw, {hero} becomes hero's trigger; or, without --stack, one adapter to look at.",
        ),
    ] = "",
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="What varies from left to right: NAME=0:1.2:7, NAME/text_encoder=0,0.5,1, "
            "version:NAME=1,2,stable, seed=1:3, method=naive,tsv, prompt=FILE, guidance=1:9:5, steps=4,8,20. "
            "Left out: the strength of the only adapter, 0:1.2:7."
        ),
    ] = None,
    by: Annotated[list[str] | None, typer.Option(help="What varies from top to bottom.")] = None,
    stack: StackOption = "",
    method_name: MethodName = "naive",
    rank: Rank = None,
    energy: Energy = None,
    settings: Settings = [],  # noqa: B006
    negative: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Of all cells; left out, one for all.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of a cell in pixels.")] = "",
    when: When = [],  # noqa: B006
    scheduler: SchedulerName = "",
    image: Image = None,
    mask: Mask = None,
    strength: Strength = None,
    control: Controls = [],  # noqa: B006
    reference: References = [],  # noqa: B006
    base: BaseName = "",
    priority: Priority = None,
    timeout: Timeout = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the grid.")] = Path(
        "sweep.png"
    ),
    cells: Annotated[
        Path | None, typer.Option("--cells", help="Keep every cell, too, as a PNG in this directory.")
    ] = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="Show the grid with the version whose sweep it is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Render a grid in which one or two things vary; every cell can be made again by its PNG."""
    check_picture(output)
    if output.suffix.lower() == ".json":
        raise fail(
            f"{output} would be written twice: the JSON goes beside the grid; write -o NAME.png", USAGE
        )
    prompt, stack = ("", what) if what and not stack and _REF.fullmatch(what) else (what, stack)
    members = pairs(stack)
    only = members[0][0] if len(members) == 1 else ""
    axes = [_axis(over or _strength(only), "--over"), *([_axis(by, "--by")] if by else [])]
    if attach and not (only or any(_adapter(found) for found in axes)):
        raise fail("--attach: nothing in this sweep says with which version the grid is shown", USAGE)
    width, height = size_of(size)
    merging, steering = how(method_name, rank, energy, settings), steered(control, reference)
    if cells:
        cells.mkdir(parents=True, exist_ok=True)
    files: dict[tuple[int, int], str] = {}

    def keep(cell: Cell) -> None:
        if cells:
            path = cells / f"{output.stem}-{cell.column + 1}-{cell.row + 1}.png"
            path.write_bytes(cell.png)
            files[cell.column, cell.row] = str(path)

    with Client(timeout=timeout) as client:
        with progress("sweep", unit="cells") as done:
            swept = client.sweep(
                prompt,
                axes=axes,
                stack=members,
                method=merging,
                negative_prompt=negative,
                seed=seed,
                steps=steps,
                guidance=guidance,
                width=width,
                height=height,
                schedules=schedules(when, dict(members)),
                **scheduling(scheduler),
                image=picture(image) if image else b"",
                mask=picture(mask) if mask else b"",
                strength=strength,
                base=base,
                priority=priority,
                **steering,
                told=lambda p: done(p.cells_done + p.step / max(1, p.steps), p.cells),
                seen=keep,
            )
        document = swept.document()
        for cell in document["cells"]:
            if path := files.get((cell["column"], cell["row"])):
                cell["file"] = path
        beside = output.with_suffix(".json")
        output.write_bytes(swept.grid)
        beside.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        shown = _attached(client, document, swept.grid) if attach else []
    for note in swept.summary.warnings:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    seeds = {cell["manifest"]["seed"] for cell in document["cells"]}
    told = f", seed {seeds.pop()}" if len(seeds) == 1 else ""
    print(f"{output}: {len(swept.columns)} x {len(swept.rows)} cells{told}; {beside} tells how each was made")
    for ref in shown:
        print(f"{ref} is shown with it")


def _strength(only: str) -> list[str]:
    """The axis that nobody has to ask for."""
    if not only:
        raise fail("say what varies: --over NAME=0:1.2:7, seed=1:3, method=naive,tsv or another", USAGE)
    return [f"weight:{only}={STRENGTH}"]


def _attached(client: Client, document: Mapping[str, Any], grid: bytes) -> list[str]:
    """Shows the grid with the versions that vary in it, else with that of the only adapter; their names."""
    refs = []
    for found in document["axes"]:
        if found["varies"] == "version":
            refs += [value["ref"] for value in found["values"]]
        elif "adapter" in found:
            refs.append(found["adapter"]["ref"])
    refs = list(dict.fromkeys(refs or [document["stack"][0]["ref"]]))
    caption = f"sweep: {', by '.join(map(_range, document['axes']))}"
    caption += f"; {document['cells'][0]['manifest']['prompt']}" if document["prompt"] else ""
    for ref in refs:
        client.add_preview(ref, grid, caption=caption)
    return refs


def _range(found: Mapping[str, Any]) -> str:
    """An axis in a few words: `fungo 0 to 1.2`, or its labels."""
    labels = found["labels"]
    if found["varies"] in {"weight", "seed", "guidance"} and len(labels) > 1:
        return f"{labels[0]} to {labels[-1].split()[-1]}"
    return ", ".join(labels)


def _adapter(found: sweep_pb2.Axis) -> str:
    return found.weight.adapter or found.version.adapter


def _axis(specs: Sequence[str], option: str) -> sweep_pb2.Axis:
    """An axis as it is typed; only prompts may be said in several pieces."""
    kinds: set[tuple[str, str]] = set()
    values: list[float | str | compose_pb2.Method] = []
    of = ""
    for spec in specs:
        name, equals, told = spec.partition("=")
        if not (name and equals and told):
            raise fail(f"{option} {spec}: write NAME=0:1.2:7, seed=1:3, method=naive,tsv or another", USAGE)
        kind, colon, rest = name.partition(":")
        if colon and kind in {"weight", "version"}:
            of = rest
        elif name not in _READ or name in {"weight", "version"}:
            kind, of = "weight", name
        kinds.add((kind, of))
        values += _READ[kind](told, of, f"{option} {spec}")
    if len(kinds) > 1 or (len(specs) > 1 and "prompt" not in {kind for kind, _ in kinds}):
        raise fail(f"{option} is said {len(specs)} times; one thing varies there, so join the values", USAGE)
    ((kind, of),) = kinds
    first = values[0] if values else ""
    try:
        if kind == "seed" and isinstance(first, str):
            return axis(kind, count=int(first))
        of, _, part = of.partition("/")
        return axis(kind, *values, of=of, part=part)
    except ValueError as error:
        raise fail(f"{option} {specs[0]}: {error}", USAGE) from None


def _numbers(told: str, of: str, where: str) -> Values:
    """`0,0.5,1`, or `0:1.2:7`: seven from 0 to 1.2."""
    del of
    try:
        if ":" not in told:
            return [float(part) for part in told.split(",")]
        first, last, count = told.split(":")
        start, end, number = float(first), float(last), int(count)
    except ValueError:
        raise fail(f"{where}: write numbers, 0,0.5,1, or FROM:TO:COUNT, 0:1.2:7", USAGE) from None
    if not 1 <= number <= VALUES_LIMIT:
        raise fail(f"{where}: {number} values are not within 1 and {VALUES_LIMIT}", USAGE)
    return [round(start + (end - start) * i / max(1, number - 1), 10) for i in range(number)]


def _whole(told: str, of: str, where: str) -> Values:
    """The same, in whole numbers; those of a range are rounded."""
    found = [float(number) for number in _numbers(told, of, where) if isinstance(number, float)]
    if ":" in told and all(abs(number) < 1 << 31 for number in found):
        return list(dict.fromkeys(round(number) for number in found))
    if not all(number.is_integer() and abs(number) < 1 << 31 for number in found):
        raise fail(f"{where}: write whole numbers, 1 to 150", USAGE)
    return [int(number) for number in found]


def _seeds(told: str, of: str, where: str) -> Values:
    """`1,2,3`, `1:3`, or `+4`, which stays a text."""
    del of
    try:
        if told.startswith("+"):
            return [str(int(told[1:]))]
        found: list[float | str | compose_pb2.Method] = []
        for part in told.split(","):
            first, colon, last = part.partition(":")
            end = int(last) if colon else int(first)
            if not 0 <= end - int(first) < VALUES_LIMIT:
                raise fail(f"{where}: {part} is not 1 to {VALUES_LIMIT} seeds, the smaller first", USAGE)
            found += range(int(first), end + 1)
    except ValueError:
        raise fail(f"{where}: write seeds, 1,2,3 or 1:3, or +4 for so many", USAGE) from None
    return found


def _methods(told: str, of: str, where: str) -> Values:
    """`naive,orthogonal/side=output`."""
    del of, where
    found = []
    for part in told.split(","):
        name, *settings = part.strip().split("/")
        found.append(how(name, None, None, settings))
    return found


def _versions(told: str, of: str, where: str) -> Values:
    """`1,2,stable`, or whole references."""
    del where
    name = re.split("[:@]", of)[0]
    parts = [part.strip() for part in told.split(",")]
    return [
        part if ":" in part or "@" in part else f"{name}:{part}" if part.isdecimal() else f"{name}@{part}"
        for part in parts
    ]


def _prompts(told: str, of: str, where: str) -> Values:
    """The lines of a file, else the text itself. Ends the command for what looks like a file and is none."""
    del of
    try:
        lines = Path(told).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise fail(f"{where}: {told} is no file of text with a prompt a line", USAGE) from None
    except (OSError, ValueError):
        if _FILE.fullmatch(told):
            raise fail(f"{where}: there is no {told}", NOT_FOUND) from None
        return [told]
    return [line.strip() for line in lines if line.strip()]


def _names(told: str, of: str, where: str) -> Values:
    del of, where
    return [part.strip() for part in told.split(",")]


_READ: Mapping[str, Callable[[str, str, str], Values]] = {
    "weight": _numbers,
    "version": _versions,
    "seed": _seeds,
    "method": _methods,
    "prompt": _prompts,
    "guidance": _numbers,
    "steps": _whole,
    "scheduler": _names,
}
