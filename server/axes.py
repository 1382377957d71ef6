"""What varies in a sweep: axes, from what was asked to what a value does to a render.

    axes = read(request, stack, pin)       # checked as far as they can be without a render
    axes[0].put(render_request, 2)         # its third value, into the request of a cell

`path` names an axis as the contract does, `axes[0].weight.values`, and so do the errors.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atelier.v1 import compose_pb2, render_pb2, sweep_pb2
from compose.errors import ComposeError
from compose.settings import SEED_LIMIT
from compose.weights import Weight
from registry.errors import RegistryError
from registry.records import Version
from server import convert
from server.errors import BadRequest

CELLS_LIMIT = 256
Value = float | int | str | compose_pb2.Method
TOUCHED = {
    "weight": ("stack.weight", "stack.parts"),
    "version": ("stack", "ref", "name", "alias"),
    "method": ("method", "stack"),
    "seed": ("seed",),
    "prompt": ("prompt",),
    "guidance": ("guidance",),
    "steps": ("steps",),
    "scheduler": ("scheduler",),
}
"""What is at fault in a render when a value of an axis is: the fields of its error."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An entry of the stack: what was asked for, and the version it names."""

    asked: str
    version: Version


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that varies: a value for each column or row, with its label. `place` is that of its adapter
    in the stack, where it has one; `part` is where a weight varies, "" for everywhere; `named` are the
    versions of a version axis.
    """

    kind: str
    path: str
    values: tuple[Value, ...]
    labels: tuple[str, ...]
    place: int | None = None
    part: str = ""
    named: tuple[Adapter, ...] = ()

    def put(self, request: render_pb2.RenderRequest, index: int) -> None:
        """Makes a request one with this value."""
        value: Any = self.values[index]
        match self.kind:
            case "weight" if self.part:
                request.stack[self.place or 0].parts[self.part] = value
            case "weight":
                request.stack[self.place or 0].weight = value
            case "version":
                request.stack[self.place or 0].ref = value
            case "method":
                request.method.CopyFrom(value)
            case kind:
                setattr(request, kind, value)


Pin = Callable[[str], Version]


def read(
    request: sweep_pb2.SweepRequest, stack: Sequence[Adapter], pin: Pin, *, seed: int
) -> tuple[Axis, ...]:
    """The axes of a request over a pinned stack; seeds that are only counted start at `seed`. Raises
    BadRequest, ComposeError, RegistryError, each with the field at fault.
    """
    axes = tuple(_axis(axis, f"axes[{index}]", stack, pin, seed) for index, axis in enumerate(request.axes))
    if len({(axis.kind, axis.place, axis.part) for axis in axes}) < len(axes):
        raise BadRequest(
            f"both axes vary the {axes[0].kind}{_of(axes[0], stack)}; let one of them vary something else",
            field="axes[1]",
        )
    return axes


def count(request: sweep_pb2.SweepRequest) -> int:
    """Cells that a request asks for. Raises BadRequest for none, and for too many, before anything is
    resolved.
    """
    if not 1 <= len(request.axes) <= 2:
        raise BadRequest(
            f"a sweep has 1 or 2 axes, not {len(request.axes)}: say what varies from left to right, "
            "and what from top to bottom",
            field="axes",
        )
    cells = 1
    for index, axis in enumerate(request.axes):
        kind = axis.WhichOneof("what")
        if kind is None:
            raise BadRequest(f"axes[{index}] does not say what varies", field=f"axes[{index}]")
        told = getattr(axis, kind)
        found = len(told.refs if kind == "version" else told.values)
        if kind == "seed" and told.count:
            if found or told.count < 0:
                raise BadRequest(
                    f"axes[{index}].seed has {found} values and the count {told.count}; "
                    "give seeds, or how many",
                    field=f"axes[{index}].seed.count",
                )
            found = told.count
        if not found:
            path = _path(f"axes[{index}]", kind)
            raise BadRequest(f"{path} is empty; give at least one", field=path)
        cells *= found
    if cells > CELLS_LIMIT:
        raise BadRequest(
            f"the sweep has {cells} cells, the limit is {CELLS_LIMIT}; leave some values out", field="axes"
        )
    return cells


def _axis(axis: sweep_pb2.Axis, where: str, stack: Sequence[Adapter], pin: Pin, seed: int) -> Axis:
    kind = axis.WhichOneof("what") or ""
    path, told = _path(where, kind), getattr(axis, kind)
    place = None
    if kind in {"weight", "version"}:
        place = _place(told.adapter, stack, f"{where}.{kind}.adapter")
        if kind == "version":
            return _versions(told.refs, path, place, stack[place], pin)
    values: tuple[Value, ...] = tuple(told.values)
    if kind == "seed" and told.count:
        if seed + told.count > SEED_LIMIT:
            raise BadRequest(
                f"{where}.seed: {told.count} seeds from {seed} on go beyond {SEED_LIMIT}; begin lower",
                field=f"{where}.seed.count",
            )
        values = tuple(range(seed, seed + told.count))
    if kind == "weight":
        for index, value in enumerate(told.values):
            with at(f"{path}[{index}]"):
                (Weight.of_parts(1.0, {told.part: value}) if told.part else Weight(value)).check()
    part = told.part if kind == "weight" else ""
    labels = tuple(_label(kind, value, place, stack, part) for value in values)
    if twice := next((label for label, times in Counter(labels).items() if times > 1), None):
        raise BadRequest(f"{path} has {twice[:80]!r} twice; leave one out", field=path)
    return Axis(kind, path, values, labels, place, part)


def _versions(refs: Sequence[str], path: str, place: int, adapter: Adapter, pin: Pin) -> Axis:
    named = []
    for index, ref in enumerate(refs):
        with at(f"{path}[{index}]"):
            version = pin(ref)
        if version.name != adapter.version.name:
            raise BadRequest(
                f"{path}[{index}]: {version.ref} is no version of {adapter.version.name}; "
                f"a version axis has versions of one asset, {adapter.version.name}:1 for example",
                field=f"{path}[{index}]",
            )
        named.append(Adapter(ref, version))
    labels = tuple(
        one.version.ref
        if one.asked == one.version.ref or one.asked.startswith("sha256:")
        else f"{one.asked} = {one.version.ref}"
        for one in named
    )
    return Axis("version", path, tuple(one.version.ref for one in named), labels, place, named=tuple(named))


def _place(asked: str, stack: Sequence[Adapter], field: str) -> int:
    """Where in the stack an adapter is: by its reference as the stack has it, else by the asset's name."""
    for same in (
        [i for i, one in enumerate(stack) if one.asked == asked],
        [i for i, one in enumerate(stack) if asked in {one.version.ref, one.version.name}],
    ):
        if len(same) == 1:
            return same[0]
        if same:
            raise BadRequest(
                f"{asked[:80]!r} is {len(same)} times in the stack; name one of "
                f"{', '.join(stack[i].asked for i in same)} that is there once",
                field=field,
            )
    have = ", ".join(one.asked for one in stack) or "no adapters"
    raise BadRequest(f"{asked[:80]!r} is not in the stack, which has {have}; add it there", field=field)


def _label(kind: str, value: Any, place: int | None, stack: Sequence[Adapter], part: str) -> str:
    match kind:
        case "weight":
            names = [one.version.name for one in stack]
            name = names[place or 0]
            name = name if names.count(name) == 1 else stack[place or 0].asked
            return f"{name}/{part} {value:g}" if part else f"{name} {value:g}"
        case "method":
            name, parameters = convert.method(value)
            told = ", ".join(f"{key} {getattr(parameters, key)}" for key in sorted(parameters.given()))
            return f"{name} ({told})" if told else name
        case "seed" | "guidance":
            return f"{kind} {value:g}" if kind == "guidance" else f"seed {value}"
        case "steps":
            return steps_of(value)
        case _:
            return " ".join(str(value).split())


def steps_of(number: int) -> str:
    """`1 step`, `20 steps`."""
    return f"{number} step{'' if number == 1 else 's'}"


def _path(where: str, kind: str) -> str:
    return f"{where}.{kind}.{'refs' if kind == 'version' else 'values'}"


def _of(axis: Axis, stack: Sequence[Adapter]) -> str:
    inside = f" in {axis.part}" if axis.part else ""
    return "" if axis.place is None else f" of {stack[axis.place].version.name}{inside}"


class at:  # noqa: N801  # read as a word: `with at("axes[0].weight.values[2]")`
    """Says where a refusal belongs: its field, and the first words of its message."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ComposeError | RegistryError | BadRequest):
            raise type(error)(f"{self._path}: {error}", field=self._path) from None
