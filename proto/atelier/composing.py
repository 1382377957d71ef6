"""The commands that compose: merges, methods, saved stacks, calibration, who fights whom."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from atelier import verdicts, views
from atelier.client import Client
from atelier.console import (
    CONFLICT,
    INVALID,
    USAGE,
    AsJson,
    Energy,
    MethodName,
    Rank,
    Settings,
    StackArgument,
    check_directory,
    check_picture,
    command,
    err,
    fail,
    how,
    out,
    pair,
    print_json,
    progress,
    stacks,
)
from atelier.messages import method
from atelier.v1 import render_pb2

BaseName = Annotated[
    str, typer.Option(help="One of `atelier bases`; left out: the first of the stack's family.")
]
Size = Annotated[int | None, typer.Option(help="Pixels a side; left out: the base's own.")]


@command
def merge(
    stack: StackArgument,
    name: Annotated[str, typer.Option(help="The asset that receives the result.")],
    method_name: MethodName = "naive",
    rank: Rank = None,
    energy: Energy = None,
    settings: Settings = [],  # noqa: B006
    alias: Annotated[str, typer.Option(help="An alias to put on it.")] = "",
    base: BaseName = "",
    as_json: AsJson = False,
) -> None:
    """Merge adapters into one version, exactly. For orthogonal and activation the first is protected most."""
    merging = how(method_name, rank, energy, settings)
    with Client() as client, err.status("merging"):
        answer = client.merge(
            [pair(text) for text in stack], name=name, method=merging, alias=alias, base=base
        )
    if as_json:
        print_json(answer)
    else:
        out.print(views.merged(answer))


def stack_save(
    name: Annotated[str, typer.Argument(help="The asset that receives it.")],
    stack: StackArgument,
    prompt: Annotated[str, typer.Option(help="The prompt it is rendered with when none is given.")] = "",
    negative: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    alias: Annotated[str, typer.Option(help="An alias to put on it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Keep a stack, pinned: what it renders never drifts."""
    with Client() as client:
        answer = client.save_stack(
            [pair(text) for text in stack],
            name=name,
            alias=alias,
            prompt=prompt,
            negative_prompt=negative,
            steps=steps,
            guidance=guidance,
        )
    if as_json:
        print_json(answer)
    else:
        out.print(views.stack_saved(answer))


def stack_update(
    ref: Annotated[str, typer.Argument(help="The saved stack.")],
    yes: Annotated[bool, typer.Option("--yes", help="Save it when something moves.")] = False,
) -> None:
    """Show what a stack's references name now; with --yes, save that as its next version."""
    with Client() as client:
        version = client.get(ref).version
        if not version.stack_json:
            raise fail(f"{ref} is no stack; `atelier stack save` makes one", INVALID)
        was = json.loads(version.stack_json)
        asked = [(name, (weight, parts[0] if parts else {})) for name, weight, *parts in was["asked"]]
        settings = {key: was.get(key) for key in ("steps", "guidance")}
        settings |= {key: was.get(key, "") for key in ("prompt", "negative_prompt")}
        now = json.loads(client.save_stack(asked, name=version.name, dry_run=True, **settings).stack_json)
        moves = views.moves(was["members"], now["members"])
        if not moves:
            print(f"{version.name}:{version.number}: nothing moved")
            return
        print("\n".join(moves))
        if not yes:
            print(f"nothing was changed; `atelier stack update {ref} --yes` saves this")
            return
        answer = client.save_stack(asked, name=version.name, **settings)
    print(f"saved as {answer.version.name}:{answer.version.number}")


command(stack_save, stacks)
command(stack_update, stacks)


@command
def methods(as_json: AsJson = False) -> None:
    """The merge methods, what each is told, and where it comes from."""
    with Client() as client:
        found = client.methods()
    if as_json:
        print_json(*found, many=True)
    else:
        out.print(views.methods(found))


@command
def calibrate(
    ref: Annotated[str, typer.Argument(help="A LoRA.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt that calls it; may be repeated. Left out: its trigger in common scenes."),
    ] = None,
    pictures: Annotated[int | None, typer.Option(help="Pictures to render.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of each.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is measured already.")] = False,
    base: BaseName = "",
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Measure what flows through the base while a LoRA is rendered alone: for activation, regmean and
    inspect.
    """
    with Client() as client, progress(f"calibrating {ref}", unit="steps") as done:
        summary = client.calibrate(
            ref,
            prompts=prompt or (),
            pictures=pictures,
            steps=steps,
            again=again,
            base=base,
            size=size,
            progress=done,
        )
    if as_json:
        print_json(summary)
    elif summary.known:
        print(f"{summary.ref} is calibrated on {summary.base} already; --again measures it anew")
    else:
        prompts = verdicts.counted(len(summary.prompts), "prompt")
        print(f"{summary.ref}: {summary.inputs} inputs measured on {summary.base}, {prompts}")


@command
def inspect(
    stack: StackArgument,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write a heat map, PNG.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, not the parts.")] = False,
    base: BaseName = "",
    as_json: AsJson = False,
) -> None:
    """Say who fights whom in a stack, and where, before anyone renders it, and what to do."""
    if output:
        check_picture(output)
    with Client() as client:
        answer = client.inspect(
            [pair(text) for text in stack], picture=bool(output), layers=layers, base=base
        )
    if output:
        output.write_bytes(answer.picture)
        answer.ClearField("picture")
    if as_json:
        print_json(answer)
    else:
        out.print(verdicts.inspection(answer, base))
        if output:
            print(f"{output}: the heat map")


@command
def remake(ref: str, as_json: AsJson = False) -> None:
    """Make a merged version again from its recipe and compare the bytes; exit 5 when they differ."""
    with Client() as client, err.status("merging"):
        answer = client.remake(ref)
    if as_json:
        print_json(answer)
    else:
        for note in answer.differences:
            print(f"note: {note}", file=sys.stderr)
        print(
            f"{answer.version.name}:{answer.version.number}: "
            + ("the same bytes" if answer.same else answer.digest)
        )
    if not answer.same:
        raise fail("the recipe does not give these bytes here", CONFLICT)


@command
def resize(
    ref: Annotated[str, typer.Argument(help="A LoRA.")],
    name: Annotated[str, typer.Option(help="The asset that receives the result.")],
    rank: Rank = None,
    energy: Energy = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep singular values above the largest over this, instead.")
    ] = None,
    alias: Annotated[str, typer.Option(help="An alias to put on it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Give a LoRA the rank it needs: the best approximation of that rank, its error told."""
    if rank is None and energy is None and ratio is None:
        raise fail("say how far: --rank, --energy or --ratio", USAGE)
    wanted = method("svd", rank=rank, energy=energy, ratio=ratio)
    with Client() as client:
        answer = client.merge({ref: 1.0}, name=name, method=wanted, alias=alias)
    if as_json:
        print_json(answer)
    else:
        out.print(views.merged(answer))


@command
def tune(
    stack: StackArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt that calls all of it; may be repeated. Left out: the triggers in common scenes."
        ),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Find the weights, too: each from low up until it just takes effect."),
    ] = False,
    pictures: Annotated[int | None, typer.Option(help="Pictures for each trial.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of each.")] = None,
    base: BaseName = "",
    size: Size = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a sheet of the trials, PNG.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the method, the order and the weights that leave most of every adapter, by looking at pictures."""
    if output:
        check_picture(output)
    pairs = [pair(text) for text in stack]
    with Client() as client, err.status("rendering trials") as status:

        def tried(trial: render_pb2.Trial) -> None:
            status.update(f"rendering trials: {verdicts.trial(trial)}")

        summary = client.tune(
            pairs,
            prompts=prompt or (),
            pictures=pictures,
            steps=steps,
            weights=weights,
            base=base,
            size=size,
            tried=tried,
        )
    if output:
        output.write_bytes(summary.picture)
    summary.ClearField("picture")
    if as_json:
        print_json(summary)
    else:
        out.print(verdicts.tuned(summary, base))
        if output:
            print(f"{output}: the trials, the best first")


@command
def save_as(
    layout: Annotated[str, typer.Argument(metavar="FORMAT", help="diffusers, kohya or peft.")],
    ref: Annotated[str, typer.Argument(help="A LoRA.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write; a directory for peft.")],
) -> None:
    """Write a LoRA in the layout of another program, at the same strength."""
    check_directory(output)
    without: list[str] = []
    with Client() as client, err.status("converting"):
        files = client.save_as(ref, layout, left_out=without.extend)
    for name, data in files.items():
        path = output if len(files) == 1 else output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"{path}: {len(data)} bytes")
    if without:
        print(f"not in it, for it is in no layer: {', '.join(without)}")
