"""`atelier …`: a gRPC client like any other.

Tables, pictures' paths and JSON go to stdout; progress and errors to stderr. Exit status: 0 done, 1 a fault,
2 usage, 3 not found, 4 invalid input, 5 conflict or damaged, 6 unavailable or over capacity, 130
interrupted.
"""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from atelier import (
    composing,  # noqa: F401
    curating,  # noqa: F401  # its commands come after those of local
    hub,  # noqa: F401
    jobs,  # noqa: F401
    local,  # noqa: F401  # its commands come first in the help
    picturing,  # noqa: F401
    sweeping,  # noqa: F401
    top,  # noqa: F401
    views,
)
from atelier.client import Client
from atelier.console import (
    USAGE,
    AsJson,
    Out,
    app,
    check_place,
    command,
    fail,
    out,
    picture,
    print_json,
    print_line,
    progress,
)


@command
def checkin(
    file: Annotated[Path, typer.Argument(help="A safetensors file, or a PEFT directory.")],
    name: Annotated[str, typer.Option(help="The asset's name.")],
    base: Annotated[str, typer.Option(help="The base it must fit; inferred when left out.")] = "",
    card: Annotated[Path | None, typer.Option(help="The model card.")] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option(help="A word that calls it, or GROUP=WORD for opt-in ones; may be repeated."),
    ] = None,
    alias: Annotated[str, typer.Option(help="An alias to put on the new version.")] = "",
    preview: Annotated[
        list[Path] | None, typer.Option(help="A picture to show with it; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter in: it becomes the next version of NAME."""
    pictures = [picture(path) for path in preview or ()]
    if file.is_dir():
        card = card or next((p for p in [file / "README.md"] if p.is_file()), None)
        file = file / "adapter_model.safetensors"
    with Client() as client, progress(file.name, unit="bytes") as told:
        answer = client.check_in(
            file,
            name=name,
            base=base,
            card=card.read_bytes() if card else b"",
            triggers=trigger or [],
            alias=alias,
            adapter_config=_adapter_config(file),
            progress=told,
        )
        families = {base.family for base in client.bases()}
        for data in pictures:
            client.add_preview(f"{answer.version.name}:{answer.version.number}", data)
    if as_json:
        print_json(answer)
    else:
        out.print(views.checked_in(answer, families))


def _adapter_config(file: Path) -> bytes:
    """PEFT's configuration beside the weights: `adapter_config.json`, or `<stem>.adapter_config.json`."""
    beside = [file.with_name(f"{file.stem}.adapter_config.json")]
    if file.stem == "adapter_model":
        beside.append(file.with_name("adapter_config.json"))
    return next((path.read_bytes() for path in beside if path.is_file()), b"")


@command
def list_(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words it is found by; the last may be only begun.")
    ] = None,
    kind: Annotated[str, typer.Option(help="lora or textual_inversion.")] = "",
    base: Annotated[str, typer.Option(help="The family of base models: pocket, sd1, sd2, sdxl.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A tag of its card; may be repeated.")] = None,
    trigger: Annotated[str, typer.Option(help="The word that calls it.")] = "",
    author: Annotated[str, typer.Option(help="Who made it.")] = "",
    licence: Annotated[str, typer.Option(help="As its card spells it.")] = "",
    after: Annotated[datetime | None, typer.Option(help="Checked in on this day or later (UTC).")] = None,
    before: Annotated[datetime | None, typer.Option(help="Checked in before this day (UTC).")] = None,
    as_json: AsJson = False,
) -> None:
    """The newest version of every asset, or of those that are asked for."""
    asked = {"kind": kind, "base": base, "trigger": trigger, "author": author, "licence": licence}
    labels = [(field, value) for field, value in asked.items() if value] + [("tag", one) for one in tag or ()]
    with Client() as client:
        versions = list(
            client.list(" ".join(words or ()), labels=labels, made_after=after, made_before=before)
        )
    if as_json:
        print_json(*versions, many=True)
    elif versions:
        out.print(views.table(versions))
    else:
        print(
            "nothing answers that; `atelier list` shows what there is"
            if words or labels or after or before
            else views.EMPTY
        )


@command
def show(ref: str, as_json: AsJson = False) -> None:
    """One version with its card."""
    with Client() as client:
        answer = client.get(ref)
    if as_json:
        print_json(answer)
    else:
        out.print(views.version(answer))


@command
def history(name: str, as_json: AsJson = False) -> None:
    """Every version of an asset, newest first."""
    with Client() as client:
        versions = client.history(name)
    if as_json:
        print_json(*versions, many=True)
    else:
        out.print(views.table(versions))


@command
def diff(before: str, after: str, as_json: AsJson = False) -> None:
    """What two versions differ in: facts, card, and how far each layer moved."""
    with Client() as client:
        answer = client.compare(before, after)
        cards = [client.get(f"{v.name}:{v.number}").card for v in (answer.before, answer.after)]
    if as_json:
        print_json(answer)
    else:
        out.print(views.difference(answer, *(card.decode(errors="replace") for card in cards)))


@command
def alias(
    name: str,
    alias: str,
    version: Annotated[int, typer.Argument(help="The version it shall name; left out: read it.")] = 0,
    expect: Annotated[
        int | None, typer.Option(help="Move it only if it names this version now (0: none).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version, or read it."""
    with Client() as client:
        answer = client.set_alias(name, alias, version, expected=expect)
    if as_json:
        print_json(answer)
        return
    before = answer.previous_number
    moved = f", was {name}:{before}" if version and before not in {0, version} else ""
    print(f"{name}@{alias} is {name}:{answer.version.number}{moved}")


@command
def delete(ref: str, as_json: AsJson = False) -> None:
    """Hide a version; `atelier undelete` brings it back."""
    with Client() as client:
        version = client.delete(ref)
    if as_json:
        print_json(version)
    else:
        gone = f"{version.name}:{version.number}"
        print(f"{gone} is deleted; `atelier undelete {gone}` brings it back until it is purged")


@command
def undelete(ref: str, as_json: AsJson = False) -> None:
    """Bring a deleted version back, by NAME:NUMBER."""
    with Client() as client:
        version = client.undelete(ref)
    if as_json:
        print_json(version)
    else:
        print(f"{version.name}:{version.number} is back")


@command
def gc(
    dry_run: Annotated[bool, typer.Option(help="Say what would go, and remove nothing.")] = False,
    retention: Annotated[float, typer.Option(help="Purge what was deleted this many days ago.")] = 30.0,
    grace: Annotated[float, typer.Option(help="Keep every file younger than this many days.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Purge versions deleted long ago, and files nobody names."""
    with Client() as client:
        answer = client.collect_garbage(
            dry_run=dry_run, retention=_days(retention, "--retention"), grace=_days(grace, "--grace")
        )
    if as_json:
        print_json(answer)
    else:
        print(views.garbage(answer, dry_run=dry_run))


def _days(number: float, option: str) -> timedelta:
    if not 0 <= number <= 36500:
        raise fail(f"{option} {number:g} is not within 0 and 36500 days", USAGE)
    return timedelta(days=number)


@command
def watch(
    since: Annotated[int, typer.Option(min=0, help="The number of the last event you have seen.")] = 0,
    follow: Annotated[bool, typer.Option(help="Wait for more.")] = True,
    as_json: AsJson = False,
) -> None:
    """Print every change of the catalog as it happens; --json prints one object a line."""
    with Client() as client:
        for event in client.watch(since, wait=follow):
            if as_json:
                print_line(event)
            else:
                out.print(views.event(event))


@command
def download(ref: str, output: Out) -> None:
    """Write a version's exact bytes to a file."""
    check_place(output)
    with Client() as client, progress(ref, unit="bytes") as told:
        version = client.download(ref, output, progress=told)
    print(f"{output}: {version.name}:{version.number}, {version.size_bytes} bytes, {version.digest}")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
