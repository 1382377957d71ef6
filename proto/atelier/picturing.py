"""Commands that make pictures: `render`, `replay`, `bases`."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from atelier.client import Client, Rendering
from atelier.console import (
    INVALID,
    USAGE,
    AsJson,
    Energy,
    MethodName,
    Out,
    Rank,
    Settings,
    StackOption,
    Timeout,
    check_picture,
    command,
    fail,
    how,
    out,
    pairs,
    picture,
    print_json,
    progress,
    size_of,
)
from atelier.messages import Phase
from atelier.steering import ControlFiles, Controls, ReferenceFiles, References, steered
from atelier.v1 import render_pb2

PNG_LIMIT = 64 << 20
Image = Annotated[Path | None, typer.Option(help="A picture to start from.")]
Mask = Annotated[Path | None, typer.Option(help="Where to paint in --image: white is painted.")]


Prompt = Annotated[
    str,
    typer.Argument(
        help="{hero} becomes hero's trigger; (more:1.3), \\[less] emphasise. Left out: the saved stack's."
    ),
]
When = Annotated[
    list[str],
    typer.Option(
        metavar="REF=START..END[:WEIGHT[>WEIGHT]]",
        help="When an adapter acts, in shares of the steps: style=0.4..1, or with less and less weight "
        "style=0..1:1>0. May be repeated.",
    ),
]
Negative = Annotated[str, typer.Option(help="What to keep away from.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the first picture; the next has seed + 1.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")]
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels.")]
Count = Annotated[int | None, typer.Option(help="Pictures.")]
Batch = Annotated[int | None, typer.Option(help="Pictures at once: faster, and other pixels.")]
SchedulerName = Annotated[
    str,
    typer.Option(
        metavar="NAME[:OPTION=VALUE,…]",
        help="One of those `atelier bases` names, with options of its own: "
        "NAME:use_karras_sigmas=true; without a name the base's own.",
    ),
]
Strength = Annotated[float | None, typer.Option(help="How far from --image to go: above 0, up to 1.")]
BaseName = Annotated[str, typer.Option(help="One of `atelier bases`; the first when left out.")]
Priority = Annotated[int | None, typer.Option(help="Among your own requests, -10 to 10.")]


@command
def render(
    prompt: Prompt = "",
    stack: StackOption = "",
    method_name: MethodName = "naive",
    rank: Rank = None,
    energy: Energy = None,
    settings: Settings = [],  # noqa: B006
    when: When = [],  # noqa: B006
    negative: Negative = "",
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = "",
    count: Count = None,
    batch: Batch = None,
    scheduler: SchedulerName = "",
    image: Image = None,
    mask: Mask = None,
    strength: Strength = None,
    control: Controls = [],  # noqa: B006
    reference: References = [],  # noqa: B006
    base: BaseName = "",
    priority: Priority = None,
    timeout: Timeout = None,
    output: Out = Path("atelier.png"),
    as_json: AsJson = False,
) -> None:
    """Render a prompt with a stack; the PNG carries what made it."""
    check_prompt(prompt, stack)
    check_picture(output)
    width, height = size_of(size)
    merging = how(method_name, rank, energy, settings)
    with Client(timeout=timeout) as client:
        rendering = client.render(
            prompt,
            stack=pairs(stack),
            method=merging,
            negative_prompt=negative,
            seed=seed,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            count=count,
            batch=batch,
            **scheduling(scheduler),
            image=picture(image) if image else b"",
            mask=picture(mask) if mask else b"",
            strength=strength,
            base=base,
            priority=priority,
            schedules=schedules(when, dict(pairs(stack))),
            **steered(control, reference),
        )
        _save(rendering, output, as_json=as_json, many=bool(count and count > 1))


@command
def replay(
    png: Path,
    output: Out,
    image: Image = None,
    mask: Mask = None,
    control: ControlFiles = [],  # noqa: B006
    reference: ReferenceFiles = [],  # noqa: B006
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Render the manifest inside a PNG again: identical pixels on the same kind of device."""
    check_picture(output)
    if png.stat().st_size > PNG_LIMIT:
        raise fail(f"{png} has {png.stat().st_size} bytes, the limit is {PNG_LIMIT}", INVALID)
    with Client(timeout=timeout) as client:
        again = client.replay(
            png.read_bytes(),
            image=picture(image) if image else b"",
            mask=picture(mask) if mask else b"",
            controls=[picture(path) for path in control],
            references=[picture(path) for path in reference],
        )
        _save(again, output, as_json=as_json, many=False)


@command
def bases(as_json: AsJson = False) -> None:
    """The base models the server holds."""
    with Client() as client:
        found = client.bases()
    if as_json:
        print_json(*found, many=True)
        return
    table = Table("base", "family", "size", "steps", "guidance", "on", "steered by", "schedulers", box=None)
    for base in found:
        table.add_row(
            base.name,
            base.family,
            f"{base.width}x{base.height}",
            str(base.steps),
            f"{base.guidance:g}",
            f"{base.device} {base.dtype}",
            ", ".join((*(_control(base, name) for name in base.controls), *base.references)),
            ", ".join(base.schedulers),
        )
    out.print(table)


def _control(base: render_pb2.Base, name: str) -> str:
    modes = base.control_modes[name].names if name in base.control_modes else ()
    return f"{name} ({', '.join(modes)})" if modes else name


def schedules(when: list[str], stack: Iterable[str]) -> dict[str, list[Phase]]:
    """`REF=START..END[:WEIGHT[>WEIGHT]]`, one for each phase -> phases by reference."""
    have = list(stack)
    found: dict[str, list[Phase]] = defaultdict(list)
    for told in when:
        ref, _, phase = told.rpartition("=")
        span, _, weights = phase.partition(":")
        numbers = [*span.split(".."), *(weights.split(">") if weights else ())]
        try:
            start, end, *more = map(float, numbers)
            if not ref or len(more) > 2:
                raise ValueError(told)
        except ValueError:
            raise fail(f"--when {told}: write REF=0.4..1, or REF=0..0.5:0>1", USAGE) from None
        if ref not in have:
            raise fail(f"--when {told}: the stack has {', '.join(have) or 'no adapters'}", USAGE)
        found[ref].append((start, end, *more))  # type: ignore[arg-type]  # at most two more
    return dict(found)


def scheduling(told: str) -> dict[str, Any]:
    """`NAME:OPTION=VALUE,…` -> the settings `scheduler` and `scheduler_options`."""
    name, _, rest = told.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        option, equals, value = part.strip().partition("=")
        if not (option and equals):
            raise fail(f"--scheduler {told}: write NAME:OPTION=VALUE,OPTION=VALUE", USAGE)
        options[option] = _value(value)
    return {"scheduler": name, "scheduler_options": options}


def _value(text: str) -> Any:
    """true, false, null and numbers as in JSON; anything else is text."""
    try:
        found = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return text if isinstance(found, list | dict | str) else found


def check_prompt(prompt: str, stack: str) -> None:
    """Ends the command when it is not said what to draw."""
    if not (prompt or stack):
        raise fail("say what to draw: a prompt, or --stack with a saved stack", USAGE)


def _save(rendering: Rendering, output: Path, *, as_json: bool, many: bool) -> None:
    files: list[str] = []
    with progress("denoising", unit="steps") as done:
        for picture in rendering.pictures(done):
            path = output.with_stem(f"{output.stem}-{picture.index + 1}") if many else output
            path.write_bytes(picture.png)
            files.append(str(path))
    summary = rendering.summary
    if as_json:
        manifests: list[Any] = [json.loads(text) for text in summary.manifest_json]
        told = {
            "files": files,
            "manifests": manifests,
            "seconds": dict(summary.seconds),
            "differences": list(summary.differences),
            "warnings": list(summary.warnings),
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for path_name, text in zip(files, summary.manifest_json, strict=True):
        print(f"{path_name}: seed {json.loads(text)['seed']}")
    for note in (*summary.differences, *summary.warnings):
        print(f"note: {note}", file=sys.stderr)
