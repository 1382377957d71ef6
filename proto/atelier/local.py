"""Commands that run the server's own code on this machine, in place of this process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from atelier.console import UNAVAILABLE, AsJson, Out, app, command, fail

DATA = Path("atelier-data")
Data = Annotated[Path, typer.Option(help="The catalog's directory.")]


def _run_server(module: str, arguments: list[str]) -> None:
    if importlib.util.find_spec("torch") is None:
        raise fail("the server is not installed here; pip install 'atelier[server]'", UNAVAILABLE)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # every thread's arena keeps what uploads have freed
    command = [sys.executable, "-m", module, *arguments]
    if os.name == "posix":
        os.execv(command[0], command)
    raise typer.Exit(subprocess.call(command))


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def serve(context: typer.Context) -> None:
    """Serve a catalog and warm bases; its options: atelier serve --help."""
    _run_server("server", context.args)


@command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where pictures and catalog go.")] = Path(
        "demo"
    ),
    keep_serving: Annotated[bool, typer.Option(help="Leave the server running at the end.")] = False,
) -> None:
    """Check in, merge three ways, render, and look: the main job on the embedded base."""
    _run_server("server.demo", [f"--output={output}", *(["--keep-serving"] if keep_serving else [])])


@command
def convert(
    file: Annotated[Path, typer.Argument(help="A torch pickle: an embedding or a LoRA (.pt, .bin, .ckpt).")],
    output: Out,
    second: Annotated[
        Path | None,
        typer.Option(
            help="Its other half: SDXL's words are in two files (learned_embeds_2), which become one."
        ),
    ] = None,
) -> None:
    """Turn a torch pickle into safetensors, in a process of limited memory, time and disk."""
    halves = [f"--second={second}"] if second else []
    _run_server("server.unpickle", [*halves, "--", str(file), str(output)])


@command
def extract(
    tuned: Annotated[Path, typer.Argument(help="A fine-tuned checkpoint: a diffusers directory.")],
    output: Out,
    base: Annotated[str, typer.Option(help="What it was tuned from: pocket, or a diffusers directory.")],
    rank: Annotated[int, typer.Option(help="The most any layer may have.")] = 64,
    energy: Annotated[float, typer.Option(help="The share of every layer's change to keep.")] = 0.99,
    as_json: AsJson = False,
) -> None:
    """Turn a full checkpoint into a LoRA: what was trained, in as many directions as it needs."""
    how = ["--base", base, "--rank", str(rank), "--energy", str(energy), *(["--json"] if as_json else [])]
    _run_server("server.extract", [str(tuned), str(output), *how])


@command
def token(
    action: Annotated[str, typer.Argument(help="add, list or revoke.")],
    name: Annotated[str, typer.Argument(help="Whose it is.")] = "",
    role: Annotated[
        str,
        typer.Option(help="reader (sees, renders), writer (also changes) or admin (also collects garbage)."),
    ] = "reader",
    data: Data = DATA,
) -> None:
    """Say who may call the server; with the first token, everybody needs one."""
    names = [name] if name else []
    _run_server("server.keep", ["token", f"--role={role}", f"--data={data}", "--", action, *names])


@command
def verify(data: Data = DATA, as_json: AsJson = False) -> None:
    """Read every file of a data directory again; exit 5 when something is missing or damaged."""
    _keep("verify", data, as_json)


@command
def backup(target: Path, data: Data = DATA, as_json: AsJson = False) -> None:
    """Copy a data directory to TARGET, also while it is served; again, only what is new."""
    _keep("backup", data, as_json, str(target))


@command
def restore(source: Path, data: Data = DATA, as_json: AsJson = False) -> None:
    """Make a data directory from the backup in SOURCE."""
    _keep("restore", data, as_json, str(source))


def _keep(command: str, data: Path, as_json: bool, *paths: str) -> None:
    # `=` and `--`: a name may begin with a dash
    told = ["--json"] if as_json else []
    _run_server("server.keep", [command, f"--data={data}", *told, *(["--", *paths] if paths else [])])
