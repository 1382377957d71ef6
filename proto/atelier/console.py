"""What the commands share: the app, failures as one line and an exit status, progress, JSON, typed stacks."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import grpc
import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from atelier.client import AtelierError
from atelier.messages import StackWeight, method
from atelier.typed import as_typed
from atelier.v1 import compose_pb2

USAGE, NOT_FOUND, INVALID, CONFLICT, UNAVAILABLE, INTERRUPTED = 2, 3, 4, 5, 6, 130
DAMAGED = CONFLICT
OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl"}
EXIT = {
    grpc.StatusCode.NOT_FOUND: NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT: INVALID,
    grpc.StatusCode.FAILED_PRECONDITION: INVALID,
    grpc.StatusCode.OUT_OF_RANGE: INVALID,
    grpc.StatusCode.UNAUTHENTICATED: INVALID,
    grpc.StatusCode.PERMISSION_DENIED: INVALID,
    grpc.StatusCode.ABORTED: CONFLICT,
    grpc.StatusCode.ALREADY_EXISTS: CONFLICT,
    grpc.StatusCode.DATA_LOSS: DAMAGED,
    grpc.StatusCode.UNAVAILABLE: UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: UNAVAILABLE,
}
P = ParamSpec("P")
PICTURE_LIMIT = 20 << 20

app = typer.Typer(
    help="A versioned catalog, exact composition and warm rendering of diffusion adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stacks = typer.Typer(help="Keep stacks: pinned lists of adapters with weights.", no_args_is_help=True)
app.add_typer(stacks, name="stack")
jobs = typer.Typer(help="Renders that are kept, and outlive hanging up.", no_args_is_help=True)
app.add_typer(jobs, name="job")
out, err = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True, soft_wrap=True)

StackOption = Annotated[
    str,
    typer.Option(
        "--stack",
        help="REF=WEIGHT,REF=WEIGHT; 1 when left out. REF=1/text_encoder=0 weighs parts.",
    ),
]
StackArgument = Annotated[
    list[str],
    typer.Argument(metavar="REF=WEIGHT...", help="Adapters; REF=1/text_encoder=0 weighs parts."),
]
MethodName = Annotated[str, typer.Option("--method", help="One of `atelier methods`.")]
Rank = Annotated[int | None, typer.Option(help="Rank of the result.")]
Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep, instead of a rank.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="NAME=VALUE", help="What else the method is told: mu=3.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Timeout = Annotated[float | None, typer.Option(help="Give up after this many seconds.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]


def fail(message: str, code: int) -> typer.Exit:
    """Says why on stderr; to be raised."""
    print(f"atelier: {message}", file=sys.stderr)
    return typer.Exit(code)


def command(function: Callable[P, None], group: typer.Typer = app) -> Callable[P, None]:
    """A command whose failures are one line and an exit status."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except AtelierError as error:
            raise fail(as_typed(str(error), kwargs), EXIT.get(error.code, 1)) from None
        except FileNotFoundError as error:
            raise fail(f"there is no {error.filename}", NOT_FOUND) from None
        except BrokenPipeError:  # whoever read has seen enough; what is left to flush goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise fail(f"{where}{error.strerror or error}", INVALID) from None
        except ValueError as error:  # protobuf's too: a number or a text that no message can hold
            raise fail(f"a value cannot be sent: {error}", INVALID) from None
        except KeyboardInterrupt:
            raise fail("interrupted", INTERRUPTED) from None

    group.command(
        function.__name__.rstrip("_").removeprefix("stack_").removeprefix("job_").replace("_", "-")
    )(run)
    return run


def _as_json(message: Message) -> dict[str, Any]:
    """A message as JSON. What is 0 or empty is there, too; only what may be absent is left out."""
    told: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return told


def print_line(message: Message) -> None:
    """A message as JSON in one line, at once."""
    print(json.dumps(_as_json(message), ensure_ascii=False), flush=True)


def print_json(*messages: Message, many: bool = False) -> None:
    """Messages as JSON: one object, or with `many` a list."""
    found = [_as_json(message) for message in messages]
    print(json.dumps(found if many else found[0], indent=2, ensure_ascii=False))


def pairs(text: str) -> list[tuple[str, StackWeight]]:
    """`REF=WEIGHT,REF` -> pairs."""
    return [pair(part.strip()) for part in text.split(",") if part.strip()]


def pair(text: str) -> tuple[str, StackWeight]:
    """`REF=WEIGHT/PART=FACTOR/…`; a number is 1 when left out."""
    head, *more = text.split("/")
    ref, weight = _number(head, text)
    parts = dict(_number(part, text) for part in more)
    if len(parts) < len(more):
        raise fail(f"a part is twice in {text!r}; give it one factor", USAGE)
    return ref, (weight, parts) if parts else weight


def _number(text: str, whole: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number) if number else 1.0
    except ValueError:
        raise fail(f"{number!r} in {whole!r} is not a weight; write {name}=0.8", USAGE) from None


def how(name: str, rank: int | None, energy: float | None, settings: Sequence[str]) -> compose_pb2.Method:
    """The method that the options ask for; ends the command for what no method can be told."""
    told: dict[str, float | str | bool | None] = {"rank": rank, "energy": energy}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise fail(f"--set {setting}: write NAME=VALUE, mu=3 for example", USAGE)
        if key == "name":
            raise fail(f"--set {setting}: the method itself is --method {value}", USAGE)
        if told.get(key) is not None:
            raise fail(f"{key} is given twice; say it once", USAGE)
        try:
            found = json.loads(value)
            told[key] = value if found is None else found
        except ValueError:
            told[key] = value
    try:
        return method(name, **told)
    except (ValueError, TypeError) as error:
        raise fail(f"--set {' '.join(settings)}: {error}", USAGE) from None


def check_directory(output: Path) -> None:
    """Ends the command when there is nowhere to write."""
    if output.is_dir():
        raise fail(f"{output} is a directory; name a file in it", INVALID)
    if not output.absolute().parent.is_dir():
        raise fail(f"there is no directory {output.parent}", NOT_FOUND)


def check_picture(output: Path) -> None:
    """Ends the command when there is nowhere to write a PNG, and when its name would say that it is none."""
    check_directory(output)
    if output.suffix.lower() in OTHER_PICTURES:
        raise fail(f"{output}: pictures are PNG, which carry what made them; write -o NAME.png", USAGE)


def check_place(output: Path) -> None:
    """Ends the command when no file can be put in a place: it would take that of a directory or device."""
    check_directory(output)
    if output.exists() and not output.is_file():
        raise fail(f"{output} is no file; choose another --output", INVALID)


def size_of(text: str) -> tuple[int | None, int | None]:
    """`64x48` -> width and height; nothing for "". Ends the command for anything else."""
    if not text:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise fail(f"{text!r} is not a size; write 64x64", USAGE)
    return int(width), int(height)


def picture(path: Path) -> bytes:
    """A picture's bytes; ends the command when they are of no picture that the server takes."""
    data = path.read_bytes()
    if not data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")) or len(data) > PICTURE_LIMIT:
        raise fail(f"{path} is no PNG, JPEG or WebP of at most {PICTURE_LIMIT >> 20} MiB", INVALID)
    return data


@contextmanager
def progress(label: str, *, unit: str) -> Iterator[Callable[[float, int], None]]:
    """A bar on a terminal; yields a function of done and total."""
    column = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), column, TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
