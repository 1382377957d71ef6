"""`atelier verify, backup, restore`: run on the machine that holds the data directory, without a server or
beside one.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from registry import keeping
from registry.errors import Conflict, NotFound, RegistryError

DAMAGED = {NotFound: 3, Conflict: 5}


def main() -> int:
    """The exit status: 0 sound, 3 nothing there, 4 refused, 5 damaged, or something is in the way."""
    parser = argparse.ArgumentParser(prog="atelier")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, extra in (("verify", ""), ("backup", "target"), ("restore", "source")):
        command = commands.add_parser(name)
        if extra:
            command.add_argument(extra, type=Path)
        command.add_argument("--data", type=Path, default=Path("atelier-data"))
        command.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    work: Callable[[keeping.Progress], keeping.Report]
    match arguments.command:
        case "verify":
            where, work = arguments.data, lambda told: keeping.verify(arguments.data, told)
        case "backup":
            where, work = (
                arguments.target,
                lambda told: keeping.backup(arguments.data, arguments.target, told),
            )
        case _:
            where, work = arguments.data, lambda told: keeping.restore(arguments.source, arguments.data, told)
    try:
        report = _watched(arguments.command, work)
    except RegistryError as error:
        print(f"atelier: {error}", file=sys.stderr)
        return DAMAGED.get(type(error), 4)
    except OSError as error:
        print(f"atelier: {error.filename or where}: {error.strerror or error}", file=sys.stderr)
        return 4
    print(
        json.dumps(asdict(report) | {"sound": report.sound}, indent=2)
        if arguments.json
        else _told(where, report)
    )
    return 0 if report.sound else 5


def _watched(label: str, work: Callable[[keeping.Progress], keeping.Report]) -> keeping.Report:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        return work(lambda done, total: progress.update(task, completed=done, total=total))


def _told(where: Path, report: keeping.Report) -> str:
    verdict = "sound" if report.sound else "DAMAGED"
    lines = [f"{where}: {verdict}, {report.versions} versions in {report.files} files"]
    for heading, found in (
        ("missing", report.missing),
        ("corrupt", report.corrupt),
        ("database", report.database),
        ("named by no version (`atelier gc` removes it)", report.orphans),
    ):
        lines += [f"  {heading}: {item}" for item in found]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
