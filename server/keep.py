"""`atelier verify, backup, restore, token`: run on the machine that holds the data directory, without a
server or beside one.
"""

import argparse
import json
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from registry import keeping
from registry.errors import Conflict, Damaged, NotFound, RegistryError
from server.arguments import Parser, while_read
from server.auth import Tokens, check_role

TOKEN_ACTIONS, USAGE = ("add", "list", "revoke"), 2
SOUND_SQLITE = (3, 51, 3)
STATUS: dict[type[Exception], int] = {NotFound: 3, Conflict: 5, Damaged: 5}


def main() -> int:
    """The exit status: 0 sound, 2 used wrongly, 3 nothing there, 4 refused, 5 damaged, or something is in
    the way.
    """
    parser = Parser(prog="atelier")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, extra in (("verify", ""), ("backup", "target"), ("restore", "source")):
        command = commands.add_parser(name)
        if extra:
            command.add_argument(extra, type=Path)
        command.add_argument("--data", type=Path, default=Path("atelier-data"))
        command.add_argument("--json", action="store_true")
    token = commands.add_parser("token")
    token.add_argument("action")
    token.add_argument("name", nargs="?", default="")
    token.add_argument("--role", default="reader")
    token.add_argument("--data", type=Path, default=Path("atelier-data"))
    arguments = parser.parse_args()
    if arguments.command == "token":
        return _token(arguments)
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
        return STATUS.get(type(error), 4)
    except OSError as error:
        print(f"atelier: {error.filename or where}: {error.strerror or error}", file=sys.stderr)
        return 4
    print(
        json.dumps(asdict(report) | {"sound": report.sound}, indent=2)
        if arguments.json
        else _told(where, report)
    )
    return 0 if report.sound else 5


def _token(arguments: argparse.Namespace) -> int:
    if arguments.action not in TOKEN_ACTIONS:
        known = ", ".join(TOKEN_ACTIONS)
        print(f"atelier: token has no {arguments.action!r}; it has {known}", file=sys.stderr)
        return USAGE
    if not arguments.name and arguments.action != "list":
        print(f"atelier: whose token? atelier token {arguments.action} NAME", file=sys.stderr)
        return USAGE
    try:
        check_role(arguments.role)
        arguments.data.mkdir(parents=True, exist_ok=True)
        tokens = Tokens(arguments.data)
        if arguments.action == "add":
            print(tokens.add(arguments.name, arguments.role))
            print("this is the only time it is shown; give it in ATELIER_TOKEN", file=sys.stderr)
        elif arguments.action == "revoke":
            tokens.revoke(arguments.name)
            left = "" if tokens.entries() else "; it was the last: a server started from now on asks for none"
            print(f"the token of {arguments.name} is no longer good{left}")
        else:
            print(
                "\n".join(f"{name}  {role}" for name, role in tokens.entries()) or "no tokens: none is needed"
            )
    except BrokenPipeError:
        raise
    except (RegistryError, OSError) as error:
        print(f"atelier: {error}", file=sys.stderr)
        return STATUS.get(type(error), 4)
    return 0


def _watched(label: str, work: Callable[[keeping.Progress], keeping.Report]) -> keeping.Report:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        return work(lambda done, total: progress.update(task, completed=done, total=total))


def _told(where: Path, report: keeping.Report) -> str:
    incomplete = report.missing and not (report.corrupt or report.database)
    verdict = "sound" if report.sound else "INCOMPLETE" if incomplete else "DAMAGED"
    lines = [f"{where}: {verdict}, {report.versions} versions in {report.files} files"]
    for heading, found in (
        ("missing", report.missing),
        ("corrupt", report.corrupt),
        ("database", report.database),
        ("named by no version (`atelier gc` removes it)", report.orphans),
    ):
        lines += [f"  {heading}: {item}" for item in found]
    if sqlite3.sqlite_version_info < SOUND_SQLITE:
        lines.append(
            f"  note: this SQLite ({sqlite3.sqlite_version}; mended in 3.51.3) can damage a database that "
            "two programs write to; Atelier has one writer, so let nothing else write to it"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with while_read():
        sys.exit(main())
