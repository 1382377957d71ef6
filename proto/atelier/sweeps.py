"""A sweep as both clients ask for it, and what comes of it.

swept = client.sweep(
    "portrait of {fungo}",
    stack={"fungo": 1.0, "ochreframe": 0.5},
    axes=[axis("weight", 0, 0.5, 1, of="fungo"), axis("seed", 1, 2, 3)],
)
Path("sweep.png").write_bytes(swept.grid)
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from atelier.messages import render_request
from atelier.v1 import compose_pb2, sweep_pb2

KINDS = ("weight", "seed", "prompt", "method", "version", "guidance", "steps", "scheduler")
Told = Callable[[sweep_pb2.SweepProgress], None]


@dataclass(frozen=True, slots=True)
class Cell:
    """A finished cell: its column and row, from 0, and the PNG with its manifest inside."""

    column: int
    row: int
    png: bytes


Seen = Callable[[Cell], None]


@dataclass(slots=True)
class Sweep:
    """A finished sweep: labels of its columns and rows, the grid as PNG, and the summary."""

    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    grid: bytes = b""
    summary: sweep_pb2.SweepSummary = field(default_factory=sweep_pb2.SweepSummary)

    def document(self) -> dict[str, Any]:
        """Its JSON: axes, what each reference named, the manifest of each cell."""
        found: dict[str, Any] = json.loads(self.summary.sweep_json)
        return found


def axis(
    kind: str,
    *values: float | str | compose_pb2.Method,
    of: str = "",
    part: str = "",
    count: int | None = None,
) -> sweep_pb2.Axis:
    """What varies: `weight` and `version` of an adapter (`of`), `seed`, `prompt`, `method`, `guidance`,
    `steps`, `scheduler`. A weight may vary in a `part` of the base only; `count` takes so many seeds from the
    first one on. Raises ValueError.
    """
    if kind not in KINDS:
        raise ValueError(f"nothing varies by {kind!r}; there are {', '.join(KINDS)}")
    if bool(of) != (kind in {"weight", "version"}):
        raise ValueError(f"{kind}: say of which adapter" if not of else f"{kind} is not of one adapter")
    told: dict[str, Any] = {"values" if kind != "version" else "refs": list(values)}
    if of:
        told["adapter"] = of
    if part:
        if kind != "weight":
            raise ValueError(f"{kind} has no part; only a weight varies in a part of the base")
        told["part"] = part
    if count is not None:
        if kind != "seed":
            raise ValueError(f"{kind} is not counted; give its values")
        told["count"] = count
    if kind == "method":
        told["values"] = [compose_pb2.Method(name=m) if isinstance(m, str) else m for m in values]
    try:
        made = getattr(sweep_pb2, f"{kind.capitalize()}Axis")(**told)
    except TypeError as error:  # a value of another type
        raise ValueError(f"{kind}: {error}") from None
    return sweep_pb2.Axis(**{kind: made})


def sweep_request(prompt: str, axes: Sequence[sweep_pb2.Axis], **settings: Any) -> sweep_pb2.SweepRequest:
    """A request; the settings are those of `render_request`, for all cells."""
    return sweep_pb2.SweepRequest(common=render_request(prompt, **settings), axes=axes)


@dataclass(slots=True)
class Gathering:
    """Puts a sweep together from its events; tells of progress and of every finished cell."""

    told: Told | None
    seen: Seen | None
    sweep: Sweep = field(default_factory=Sweep)
    _cell: bytearray = field(default_factory=bytearray)
    _grid: bytearray = field(default_factory=bytearray)

    def take(self, event: sweep_pb2.SweepResponse) -> None:
        """The next event."""
        match event.WhichOneof("event"):
            case "plan":
                self.sweep.columns, self.sweep.rows = list(event.plan.columns), list(event.plan.rows)
            case "progress" if self.told:
                self.told(event.progress)
            case "cell":
                self._cell.extend(event.cell.data)
                if event.cell.last:
                    if self.seen:
                        self.seen(Cell(event.cell.column, event.cell.row, bytes(self._cell)))
                    self._cell.clear()
            case "grid":
                self._grid.extend(event.grid.data)
            case "summary":
                self.sweep.grid, self.sweep.summary = bytes(self._grid), event.summary
