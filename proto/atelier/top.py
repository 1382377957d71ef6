"""`atelier top`: what the machine is doing, on one screen that stays.

Two columns where there is room, one under the other where there is not; a list that does not fit says how
much is left out. 80 by 24 shows everything.
"""

import sys
from collections.abc import Iterator
from itertools import chain
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atelier.client import Client
from atelier.console import UNAVAILABLE, AsJson, command, fail, out, print_json, print_line
from atelier.v1 import engine_pb2
from atelier.views import size

WIDE, ALL = 120, 100
OUTCOMES = ("done", "cancelled", "deadline", "refused", "failed")
_STYLES = {"done": "green", "failed": "red", "refused": "yellow"}


@command
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between frames.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Watch the machine: who waits, what runs, how fast; --json prints one object a line."""
    with Client() as client:
        if once:
            status = client.status()
            if as_json:
                print_json(status)
            else:
                out.print(frame(status, width=out.width, height=0))
            return
        watching = client.watch_status(interval)
        if as_json:
            for status in watching:
                print_line(status)
        else:
            _live(watching)
        raise fail(f"the server at {client.address} has shut down", UNAVAILABLE)  # nothing else ends it


def _live(watching: Iterator[engine_pb2.Status]) -> None:
    status = next(watching, None)
    if status is None:
        return
    if not sys.stdout.isatty():
        for now in chain([status], watching):
            out.print(frame(now, width=out.width, height=0))
        return
    first = frame(status, width=out.width, height=out.height)
    with Live(first, console=out, screen=True, auto_refresh=False) as live:
        for status in watching:
            live.update(frame(status, width=out.width, height=out.height), refresh=True)


def frame(status: engine_pb2.Status, *, width: int, height: int) -> RenderableType:
    """The screen for a console of that size; height 0 shows all there is."""
    spare = height - 20 if height else 2 * ALL  # 20 lines of a narrow screen are always there
    if width < WIDE:
        few = max(2, spare // 3)
        lists = [_waiting(status, max(2, spare - few)), _latencies(status), _held(status, few)]
        return Group(_head(status), Text(), _running(status), *lists)
    left = [_running(status), _waiting(status, max(2, spare + 9))]
    right = [_phases(status), _held(status, max(2, spare + 2))]
    columns = Table.grid(padding=(0, 4), expand=True)
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    columns.add_row(Group(*left), Group(*right))
    return Group(_head(status), Text(), columns)


def _head(status: engine_pb2.Status) -> RenderableType:
    rates, memory = status.rates, status.memory
    told = [
        (f"{rates.renders:.2f}", " renders/s  "),
        (f"{rates.steps:.1f}", " steps/s  "),
        (f"{rates.requests:.1f}", " calls/s (1 min)"),
    ]
    first = Text.assemble(
        ("atelier ", "bold"),
        f"{status.versions['atelier']}  up {_time(status.uptime_seconds)}  ",
        *(part for number, unit in told for part in ((number, "bold"), (unit, "dim"))),
    )
    line = Text.assemble(("memory ", "dim"), size(memory.resident_bytes))
    if memory.device_total_bytes:
        used = f"{size(memory.device_used_bytes)} of {size(memory.device_total_bytes)}"
        line.append_text(Text.assemble(("  device ", "dim"), used))
    for name in OUTCOMES:
        if count := status.outcomes.get(name, 0):
            line.append_text(Text.assemble("  ", (str(count), _STYLES.get(name, "")), (f" {name}", "dim")))
    budget = Text.assemble(
        ("budget ", "dim"),
        f"{size(sum(part.size_bytes for part in memory.parts))} of {size(memory.budget_bytes)}",
        overflow="ellipsis",
        no_wrap=True,
    )
    for part in memory.parts:
        budget.append_text(Text.assemble((f"  {part.name} ", "dim"), size(part.size_bytes)))
    if memory.host_golden_bytes:
        budget.append_text(Text.assemble(("  golden on the host ", "dim"), size(memory.host_golden_bytes)))
    return Group(first, line, budget)


def _running(status: engine_pb2.Status) -> RenderableType:
    if not status.queue.running:
        return Group(Text("running", style="bold"), Text("nothing", style="dim"), Text())
    lines: list[RenderableType] = [Text("running", style="bold")]
    for job in status.queue.running:
        picture = f"picture {job.image + 1} of {job.images}, " if job.images > 1 else ""
        done = job.image * job.steps + job.step
        lines.append(
            Text.assemble(
                f"{job.kind} of {_short(job.client, 24)} on {job.base}: {job.phase}, {picture}",
                f"step {job.step} of {job.steps}, {job.seconds:.1f} s",
                (f"  {_short(job.request_id, 12)}", "dim"),
                overflow="ellipsis",
                no_wrap=True,
            )
        )
        lines.append(ProgressBar(total=max(1, job.images * job.steps), completed=done, width=40))
    return Group(*lines, Text())


def _waiting(status: engine_pb2.Status, room: int) -> RenderableType:
    queue = status.queue
    title = f"waiting  {queue.waiting} of {queue.capacity}" + (", shutting down" if queue.draining else "")
    if queue.coalesced:
        title += f", {queue.coalesced} shared a job"
    if not queue.jobs:
        return Group(Text(title, style="bold"), Text())
    grid = _grid("client", "what", "waited", "priority", "")
    for job in queue.jobs[:room]:
        many = f" +{job.callers - 1}" if job.callers > 1 else ""
        grid.add_row(
            f"{_short(job.client, 24)}{many}",
            _short(job.kind, 32),
            f"{job.waited_seconds:.1f} s",
            str(job.priority or ""),
            job.phase if job.phase != "waiting" else "",
        )
    return Group(Text(title, style="bold"), grid, _more(queue.waiting, min(room, len(queue.jobs))))


def _phases(status: engine_pb2.Status) -> RenderableType:
    if not status.phases:
        return Text()
    grid = _grid("phase", "p50", "p95", "p99", "of")
    for phase in status.phases:
        times = (_milliseconds(phase.p50), _milliseconds(phase.p95), _milliseconds(phase.p99))
        grid.add_row(phase.phase, *times, str(phase.count))
    return Group(grid, Text())


def _latencies(status: engine_pb2.Status) -> RenderableType:
    """The same across, for a narrow screen."""
    if not status.phases:
        return Text()
    grid = _grid("ms", *(phase.phase for phase in status.phases))
    for name in ("p50", "p95", "p99"):
        times = [getattr(phase, name) * 1e3 for phase in status.phases]
        grid.add_row(name, *(f"{time:.{int(time < 1000)}f}" for time in times))  # 80 columns hold no more
    return Group(grid, Text())


def _held(status: engine_pb2.Status, room: int) -> RenderableType:
    """What is there already: bases, adapters, and how often they were wanted."""
    lines = [
        Text.assemble(
            ("base ", "bold"), f"{base.name} on {base.device}, {base.dtype}, {size(base.size_bytes)}"
        )
        for base in status.bases
    ]
    asked = [(cache, cache.hits + cache.misses) for cache in status.caches if cache.hits + cache.misses]
    hits = ", ".join(f"{cache.name} {cache.hits / count:.0%} of {count}" for cache, count in asked)
    if hits:
        lines.append(Text.assemble(("found there ", "bold"), hits))
    held = status.adapters
    title = Text.assemble(
        ("adapters ", "bold"),
        f"{held.count} held, {size(held.size_bytes)} of {size(held.budget_bytes)}, {held.merges} merges kept",
    )
    grid = Table.grid(padding=(0, 2))
    for adapter in held.adapters[:room]:
        grid.add_row(_short(adapter.ref or adapter.digest, 40), size(adapter.size_bytes))
    return Group(*lines, title, grid, _more(held.count, min(room, len(held.adapters))))


def _more(count: int, shown: int) -> Text:
    return Text(f"… and {count - shown} more" if count > shown else "", style="dim")


def _grid(*headings: str) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if number < 1 else "right", no_wrap=True)
    return grid


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _time(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours}:{minutes % 60:02}:{int(seconds) % 60:02}"


def _short(text: str, limit: int) -> str:
    clean = "".join(c for c in text if c.isprintable())
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"
