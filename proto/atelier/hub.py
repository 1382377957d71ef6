"""`atelier hub …`: publish on the Hugging Face Hub, pull from it, bring both together."""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from atelier.client import Client
from atelier.console import (
    CONFLICT,
    UNAVAILABLE,
    USAGE,
    AsJson,
    app,
    command,
    err,
    fail,
    out,
    print_json,
    print_line,
)
from atelier.messages import HubProgress
from atelier.v1 import hub_pb2

group = typer.Typer(help="Publish, pull and sync adapters with the Hugging Face Hub.", no_args_is_help=True)
app.add_typer(group, name="hub")

Hub = Annotated[str, typer.Option("--hub", help="One of the server's Hubs; left out: its first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
DIRECTIONS, KEEPS = ("both", "push", "pull"), ("ours", "theirs", "both")


@contextmanager
def bars() -> Iterator[HubProgress]:
    """A bar for each asset on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def told(step: hub_pb2.HubStep) -> None:
            if step.name not in tasks:
                tasks[step.name] = progress.add_task(step.name, total=None)
            label, unit = f"{step.what} {step.name}", "cells" if step.what == "sweeping" else ""
            progress.update(
                tasks[step.name],
                description=label,
                completed=step.done,
                total=step.total or None,
                unit=unit,
            )

        yield told


class _Amount(DownloadColumn):
    """Bytes, or so many of what is no bytes."""

    def render(self, task: Task) -> Text:
        """The column of a task."""
        if unit := task.fields.get("unit"):
            return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {unit}")
        return super().render(task)


def push(
    ref: str,
    repo: Annotated[str, typer.Option(help="ORG/NAME; left out: where it was published before.")] = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    strip: Annotated[
        bool | None,
        typer.Option(
            "--strip/--no-strip",
            help="Leave out of the file's header what tells of its training; left out: as the last time.",
        ),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Show it in seven strengths, first.")] = False,
    relink: Annotated[
        bool, typer.Option("--relink", help="Publish in --repo from now on, instead of where it was.")
    ] = False,
    dry_run: DryRun = False,
    hub: Hub = "",
    as_json: AsJson = False,
) -> None:
    """Publish a version: weights, card and pictures in one commit, and a tag."""
    with Client() as client, bars() as told:
        done = client.hub_push(
            ref,
            repo=repo,
            private=private,
            strip=strip,
            dry_run=dry_run,
            sweep=sweep,
            relink=relink,
            hub=hub,
            told=told,
        )
    if as_json:
        print_json(done)
        return
    if dry_run:
        for file in done.files:
            print(f"{'would send' if file.fresh else 'is there  '}  {file.path}  {file.size_bytes} bytes")
        sys.stdout.write(f"\nREADME.md of {done.repo}, tag {done.tag}:\n\n")
        sys.stdout.write(done.card.decode(errors="replace"))
    else:
        how = "is published" if done.made else "was there already"
        tag = f", tag {done.tag}" if done.tag else ""
        print(f"{done.ref} {how}: {done.url} at {done.commit[:8]}{tag}")
    _notes(done.notes)


def pull(
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME[@REV]", help="A branch, a tag or a commit.")],
    name: Annotated[str, typer.Option(help="The asset's name; left out: the repository's.")] = "",
    file: Annotated[str, typer.Option(help="The file with the weights, where there are several.")] = "",
    without_card: Annotated[
        bool,
        typer.Option("--without-card", help="Leave a card there that cannot be one here; links nothing."),
    ] = False,
    hub: Hub = "",
    as_json: AsJson = False,
) -> None:
    """Take a version from a repository; without @REV it stays linked with its head, for syncs."""
    where, _, revision = repo.partition("@")
    if "@" in repo and not revision:
        raise fail(f"which revision? write {where}@v1, or {where} for the head of main", USAGE)
    with Client() as client, bars() as told:
        done = client.hub_pull(
            where,
            revision=revision,
            name=name,
            file=file,
            without_card=without_card,
            hub=hub,
            told=told,
        )
    if as_json:
        print_json(done)
        return
    fresh = "" if done.created else ", which was here already"
    print(f"{done.ref} is {done.repo} at {done.commit[:8]}{fresh}: {done.file}, {done.digest}")
    _notes(done.notes)


def sync(
    names: Annotated[list[str] | None, typer.Argument(help="Assets; none: all that are published.")] = None,
    direction: Annotated[str, typer.Option(help="both, push or pull.")] = "both",
    keep: Annotated[str, typer.Option(help="Where both sides changed: ours, theirs, or both.")] = "",
    delete: Annotated[
        bool, typer.Option("--delete", help="Take pictures away there that were taken away here.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two rounds of --watch.")] = 60.0,
    dry_run: DryRun = False,
    hub: Hub = "",
    as_json: AsJson = False,
) -> None:
    """Bring assets and their repositories together; where both sides changed, say so and change nothing."""
    if direction not in DIRECTIONS:
        raise fail(f"--direction {direction}: choose {', '.join(DIRECTIONS)}", USAGE)
    if keep not in {"", *KEEPS}:
        raise fail(f"--keep {keep}: choose {', '.join(KEEPS)}", USAGE)
    asked: dict[str, str | bool] = {
        "direction": direction,
        "keep": keep,
        "delete": delete,
        "dry_run": dry_run,
        "hub": hub,
    }
    said: dict[str, Said] = {}
    with Client() as client:
        while True:
            first = not said
            seen = _round(client, names or [], asked, said, as_json=as_json)
            if not watch:
                break
            if first:
                print(f"{_summary(seen)}; looking again every {every:g} s", file=sys.stderr, flush=True)
            time.sleep(every)
    if not as_json:
        print(_summary(seen))
    if seen["failed"]:
        raise fail(f"{seen['failed']} could not be synced", UNAVAILABLE)
    if seen["conflict"]:
        raise fail(f"{seen['conflict']} changed on both sides; choose with --keep", CONFLICT)


def _summary(seen: Counter[str]) -> str:
    told = ", ".join(f"{count} {action}" for action, count in sorted(seen.items()))
    return told or "nothing is published yet; `atelier hub push REF --repo ORG/NAME` publishes"


Said = tuple[str, str]
"""What was said of an asset: its action, and all of it but for seconds, of which fewer are left each time."""


def _round(
    client: Client,
    names: list[str],
    asked: dict[str, str | bool],
    said: dict[str, Said],
    *,
    as_json: bool,
) -> Counter[str]:
    """One sync; what was said of an asset before is not said again."""
    seen = Counter[str]()
    with bars() as told:
        for outcome in client.hub_sync(names, told=told, **asked):  # type: ignore[arg-type]  # as declared
            seen[outcome.action] += 1
            before = said.get(outcome.name)
            said[outcome.name] = (outcome.action, re.sub(r"\b\d+ s\b", "", str(outcome)))
            if before == said[outcome.name]:
                continue
            again = before is not None and before[0] in {"failed", "conflict"}
            if as_json:
                print_line(outcome)
            elif names or again or outcome.notes or outcome.action != "unchanged":
                _told(outcome)
    return seen


def _told(outcome: hub_pb2.SyncOutcome) -> None:
    held = f", version {outcome.number}" if outcome.action in {"published", "pulled", "both"} else ""
    print(f"{outcome.name}: {outcome.action}, {outcome.repo}{held}", flush=True)
    _notes(outcome.notes)
    for whose, difference in (("ours", outcome.ours), ("theirs", outcome.theirs)):
        if difference:
            print(f"  {whose}:")
            for line in difference.splitlines():
                print(f"    {line}")


def status(
    names: Annotated[list[str] | None, typer.Argument(help="Assets; none: all that are published.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which assets are published where, and whether something here was not published yet. Asks no Hub."""
    with Client() as client:
        answer = client.hub_status(names or [])
    if as_json:
        print_json(answer)
        return
    hubs = ", ".join(f"{hub.url}{'' if hub.has_token else ' (no token)'}" for hub in answer.hubs)
    print(f"hubs: {hubs}{'; offline' if answer.offline else ''}")
    if answer.links:
        table = Table("asset", "repository", "version", "commit", "here", box=None)
        for link in answer.links:
            number = str(link.number or "")
            table.add_row(link.name, link.repo, number, link.commit[:8], "ahead" if link.ahead else "")
        out.print(table)


def _notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


command(push, group)
command(pull, group)
command(sync, group)
command(status, group)
