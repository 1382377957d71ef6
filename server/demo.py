"""`atelier demo`: the main job on the embedded base, through the client, against a server of its own.

demo/run-1/catalog            the catalog, to go on with: atelier serve --data demo/run-1/catalog
demo/run-1/contact-sheet.png  every adapter alone, the live stack, the three merges
demo/run-1/sweep.png          a character at growing strength
"""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from atelier.client import AtelierError, Client, axis, method
from atelier.v1 import compose_pb2
from compose import pocket
from compose.manifest import to_png
from compose.render import Picture
from compose.sheet import contact_sheet
from server.arguments import Parser, while_read

CHARACTERS, STYLES, WORDS = ("milo", "fungo"), ("ochreframe", "nightbars"), ("tealish", "rosy")
MERGES: Mapping[str, compose_pb2.Method] = {
    "naive": method("naive"),
    "svd": method("svd", rank=4),
    "orthogonal": method("orthogonal"),
}
STACK = (("milo", 1.0), ("ochreframe", 1.0))
SWEEP = (0.2, 0.5, 0.8, 1.1, 1.5)
SCENE = "a {{milo}} on a {} background"
BACKGROUNDS = ("blue", "yellow", "purple", "green", "white")
SEED = 11


@dataclass(slots=True)
class Demo:
    """A client, and a diary of what was done and how long it took."""

    client: Client
    diary: list[tuple[str, str, float]] = field(default_factory=list)

    @contextmanager
    def timed(self, did: str, what: str) -> Iterator[list[str]]:
        """Writes down what the block did, with what it has to add, and how long it took."""
        start, more = time.perf_counter(), [what]
        yield more
        self.diary.append((did, ": ".join(more), time.perf_counter() - start))

    def check_in(self) -> None:
        """Checks the embedded adapters in, each with its card and in its own layout."""
        for name in (*CHARACTERS, *STYLES, *WORDS):
            file = pocket.ADAPTERS / f"{name}.safetensors"
            config = file.with_name(f"{name}.adapter_config.json")
            with self.timed("check in", name) as entry:
                answer = self.client.check_in(
                    file,
                    name=name,
                    base="pocket",
                    card=file.with_suffix(".md").read_bytes(),
                    adapter_config=config.read_bytes() if config.is_file() else b"",
                    alias="stable",
                )
                v = answer.version
                entry.append(f"{v.layout}, rank {v.rank}, {v.coverage.bound} of {v.coverage.total} layers")

    def merge(self) -> None:
        """Merges the character and the style three ways."""
        for name, how in MERGES.items():
            with self.timed("merge", f"{' + '.join(ref for ref, _ in STACK)}, {name}"):
                self.client.merge(STACK, name=f"milo-framed-{name}", method=how)

    def row(self, prompt: str, stack: tuple[tuple[str, float], ...]) -> list[Picture]:
        """The prompt on every background, at fixed seeds."""
        pictures = []
        for index, background in enumerate(BACKGROUNDS):
            text = prompt.replace("BACKGROUND", background)
            (picture,) = self.client.render(text, stack=stack, seed=SEED + index).pictures()
            pictures.append(np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")))
        return pictures

    def sheet(self) -> Picture:
        """Every adapter alone, the live stack, the merges."""
        star, on = "a red star", "on a BACKGROUND background"
        framed = f"a {{milo}} {on}, {{ochreframe}}"
        plan: list[tuple[str, str, tuple[tuple[str, float], ...]]] = [
            ("base\nno adapter", f"{star} {on}", ()),
            *((f"{name}\ncharacter", f"a {{{name}}} {on}", ((name, 1.0),)) for name in CHARACTERS),
            *((f"{name}\nstyle", f"{star} {on}, {{{name}}}", ((name, 1.0),)) for name in STYLES),
            *((f"{name}\ntextual inversion", f"a {{{name}}} heart {on}", ((name, 1.0),)) for name in WORDS),
            ("milo + ochreframe\nlive stack, 1 + 1", framed, STACK),
            *((f"merged: {name}\nbaked version", framed, ((f"milo-framed-{name}", 1.0),)) for name in MERGES),
        ]
        rows = []
        for label, prompt, stack in plan:
            with self.timed("render", f"{len(BACKGROUNDS)} × {label.splitlines()[0]}"):
                rows.append((label, self.row(prompt, stack)))
        return contact_sheet(rows, title="Atelier on pocket: adapters alone, stacked, merged")

    def sweep(self) -> bytes:
        """The character at growing strength."""
        axes = [axis("weight", *SWEEP, of="milo"), axis("prompt", *(SCENE.format(b) for b in BACKGROUNDS))]
        with self.timed("sweep", f"milo at {SWEEP[0]:g} to {SWEEP[-1]:g}") as entry:
            swept = self.client.sweep(axes=axes, stack={"milo": 1.0}, seed=SEED)
            entry.append(f"{len(swept.columns)} x {len(swept.rows)} cells")
        return swept.grid


@contextmanager
def server(data: Path) -> Iterator[str]:
    """A server process on a free port; its address."""
    where = ["--data", str(data), "--listen", "127.0.0.1:0", "--log-level", "warning"]
    command = [sys.executable, "-m", "server", *where]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("listening on "):
            raise SystemExit(f"atelier demo: the server did not start (exit status {process.wait()})")
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def fresh_directory(output: Path) -> Path:
    """`output/run-N`, made by us alone."""
    output.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        try:
            (output / f"run-{number}").mkdir()
        except FileExistsError:
            continue
        return output / f"run-{number}"
    raise AssertionError("itertools.count does not end")


def main() -> int:
    """Runs the demo; the exit status."""
    parser = Parser(prog="atelier demo")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where pictures and catalog go")
    parser.add_argument("--keep-serving", action="store_true", help="leave a server running at the end")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    begun = time.perf_counter()
    try:
        run = fresh_directory(arguments.output)
        with server(run / "catalog") as address, Client(address) as client:
            started = time.perf_counter()
            demo = Demo(client)
            with console.status("checking in"):
                demo.check_in()
            with console.status("merging"):
                demo.merge()
            with console.status("rendering the contact sheet"):
                (run / "contact-sheet.png").write_bytes(to_png(demo.sheet()))
            with console.status("rendering the strength sweep"):
                (run / "sweep.png").write_bytes(demo.sweep())
    except AtelierError as error:
        print(f"atelier demo: {error}", file=sys.stderr)
        return 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("did", "what", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    table.add_row("start", "server, base pocket", f"{started - begun:.2f}")
    for did, what, seconds in demo.diary:
        table.add_row(did, what, f"{seconds:.2f}")
    table.add_row("all", "", f"{time.perf_counter() - begun:.2f}", style="bold")
    console.print(table)
    print(f"\nlook at  {run / 'contact-sheet.png'}\n         {run / 'sweep.png'}")
    serve = ["serve", "--data", str(run / "catalog")]
    print(f"\ngo on    atelier {' '.join(serve)}")
    print(
        '         atelier render "a {milo} on a blue background" --stack milo=0.9,nightbars=0.5 -o milo.png'
    )
    if arguments.keep_serving:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "server", *serve[1:]])
    return 0


if __name__ == "__main__":
    with while_read():
        sys.exit(main())
