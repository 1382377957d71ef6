"""Putting stacks on in one launch, on a GPU: what differs between two stacks is a comparison of two tables
of numbers, and the layers that do are written by one kernel (`compose.fused`).

A row of a table is a layer of the base; in it, for every adapter of the stack: the addresses of its factors,
their rank, how large they are and the bits of the float32 weight, or zeros where it has no part. What
addresses tell of is held for as long as its stack is on. What a layer comes to depends on its row alone.
Tables, and what leads from one to the next, are kept for stacks that come by turns.
"""

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compose import halves
from compose.arenas import Arena, needs_forming
from compose.factors import Factors, Layers
from compose.layerwise import Stack, check_shape
from compose.weights import Weight

Numbers = NDArray[np.int64]
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

HEAD, PART = 7, 5
"""Columns that tell the kernel of a layer (live, golden, d, k, its first program, how many parts it has, what
their sum is multiplied by), and of each part (up, down, rank, what the two are multiplied by, as
`compose.halves` says).
"""

CELL = 6
"""Columns of a table that tell of a part: up, down, rank, the exponents of up and down, weight."""

KEPT, PROGRAMS = 64, 16
"""Tables, ways from one to another, and weights by part of an adapter; and sets of programs, of which the
device holds 4 bytes each: 1 MB to a set of all of SDXL's layers, 6 MB to FLUX.1's.
"""

_serial = itertools.count(1)


class Kernel(Protocol):
    """What writes layers: `compose.fused`."""

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a layer that one program writes."""

    def __call__(
        self, table: Tensor, owner: Tensor, dtype: torch.dtype, *, aligned: bool, even: bool
    ) -> None:
        """Writes the layers of a table `[n, HEAD + PART * parts]`; `owner` is the row of each program.
        Rows of a weight begin at multiples of 16 bytes where `aligned`, those of an up where `even`.
        """


@dataclass(frozen=True, slots=True)
class Bound:
    """An adapter on a base: the rows of its layers, `[n]`; a table's columns of each, but the weight; which
    are a text encoder's; the tensors behind the addresses. Not plain: a layer is a DoRA's, or no pair of
    factors, or of numbers too large for the kernel.
    """

    names: tuple[str, ...]
    rows: Numbers
    cells: Numbers
    text: NDArray[np.bool_]
    held: tuple[Tensor, ...]
    plain: bool
    serial: int = field(default_factory=lambda: next(_serial))
    _by_part: dict[Weight, NDArray[np.float64]] = field(default_factory=dict)

    def bits(self, weight: Weight, scale: float) -> Numbers:
        """The weight of each layer, `scale` times that in the denoiser: the bits of a float32."""
        values = self._values(weight)
        if scale != 1.0:
            values = np.where(self.text, values, values * scale)
        return _bits(values.astype(np.float32))

    def _values(self, weight: Weight) -> NDArray[np.float64]:
        if not weight.parts:
            return np.full(len(self.names), weight.value)
        return _kept(self._by_part, weight, lambda: np.array([weight.of(name) for name in self.names]))


@dataclass(frozen=True, slots=True)
class _Table:
    """Every layer of the base, `[layers, CELL * adapters]`."""

    cells: Numbers
    serial: int = field(default_factory=lambda: next(_serial))


@dataclass(frozen=True, slots=True)
class _Launch:
    """Layers of one type of numbers that are written at once."""

    table: Tensor
    rows: Numbers
    dtype: torch.dtype
    aligned: bool
    even: bool


@dataclass(slots=True)
class _Move:
    """From one table to another: the rows that differ, and how they are written, once that is known."""

    rows: Numbers
    from_host: list[tuple[Arena, list[str]]] = field(default_factory=list)
    launches: list[_Launch] = field(default_factory=list)


def find_kernel(arenas: Sequence[Arena]) -> Kernel | None:
    """What writes the layers of these arenas at once; None where they do not lie on one GPU that Triton
    compiles for.
    """
    devices = {arena.live.device for arena in arenas}
    if len(devices) != 1 or not arenas[0].live.is_cuda:
        return None
    try:
        from compose import fused
    except ImportError:  # Triton is not there for every system
        return None
    return fused.ready(arenas[0].live.device, {arena.live.dtype for arena in arenas})


class Switchboard:
    """The layers of a base's arenas and what each has on. Not thread-safe."""

    def __init__(self, base: str, arenas: Sequence[Arena], kernel: Kernel) -> None:
        self._base, self._arenas, self._kernel = base, arenas, kernel
        self._names = [name for arena in arenas for name in arena.names]
        self._row = {name: row for row, name in enumerate(self._names)}
        self._text = np.array([name.startswith("text_encoder") for name in self._names])
        self._arena = np.repeat(np.arange(len(arenas)), [len(arena.names) for arena in arenas])
        self._head = np.zeros((len(self._names), 4), np.int64)
        self._head[:, 0] = np.concatenate([_addresses(arena.live) for arena in arenas])
        self._head[:, 2:4] = np.concatenate([[arena.live.shape[1:]] * len(arena.names) for arena in arenas])
        kinds = [(a.live.dtype, a.live[0].nbytes // a.live.shape[1] % 16 == 0) for a in arenas]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind = np.array([self._kinds.index(kind) for kind in kinds])[self._arena]
        self._table = self._bare = _Table(np.zeros((len(self._names), CELL), np.int64))
        self._on: tuple[Bound, ...] = ()
        self._known: dict[int, tuple[weakref.ref[Layers], Bound]] = {}
        self._tables: OrderedDict[object, _Table] = OrderedDict()
        self._moves: OrderedDict[tuple[int, int], _Move] = OrderedDict()
        self._programs: OrderedDict[bytes, tuple[Numbers, Tensor]] = OrderedDict()

    def acts_on_text(self) -> bool:
        """Whether something was put on a text encoder."""
        return bool(self._table.cells[self._text].any())

    def bound(self, stack: Stack) -> tuple[Bound, ...] | None:
        """The adapters of a stack on this base; None where one is not plain. Raises IncompatibleBase."""
        found = tuple(self._bound(layers) for layers, _ in stack)
        return found if all(bound.plain for bound in found) else None

    def apply(
        self,
        on: Sequence[Bound],
        weights: Sequence[Weight],
        factors: Sequence[float],
        check: Callable[[], None],
    ) -> None:
        """As `WarmPipeline.apply`; `check` is called once, before anything is written."""
        key = tuple(bound.serial for bound in on), tuple(weights), tuple(factors)
        table = _kept(self._tables, key, lambda: self._table_of(on, weights, factors)) if on else self._bare
        before = self._table
        move = _kept(self._moves, (before.serial, table.serial), lambda: _Move(_changed(before, table)))
        if move.rows.size:
            check()
            self._write(move, table)
        self._table, self._on = table, tuple(on)

    def _table_of(self, on: Sequence[Bound], weights: Sequence[Weight], factors: Sequence[float]) -> _Table:
        cells = np.zeros((len(self._names), CELL * len(on)), np.int64)
        for place, (bound, weight) in enumerate(zip(on, weights, strict=True)):
            bits = bound.bits(weight, factors[place] if factors else 1.0)
            mine = np.column_stack([bound.cells, bits])
            mine[bits & 0x7FFFFFFF == 0] = 0  # of weight 0
            cells[bound.rows, CELL * place : CELL * (place + 1)] = mine
        return _Table(cells)

    def _write(self, move: _Move, table: _Table) -> None:
        """All or nothing: after a failure every layer is golden, or where not even that succeeds, unknown."""
        try:
            if not move.launches:
                move.from_host, move.launches = self._planned(move.rows, table)
            for arena, names in move.from_host:
                arena.restore(names)
            for launch in move.launches:
                _, owner = self._programs_of(launch.rows)
                self._kernel(launch.table, owner, launch.dtype, aligned=launch.aligned, even=launch.even)
        except BaseException:
            self._table = _Table(np.full_like(self._bare.cells, -1))
            for arena in self._arenas:
                arena.restore(arena.names)
            self._table, self._on = self._bare, ()
            raise

    def _planned(self, rows: Numbers, table: _Table) -> tuple[list[tuple[Arena, list[str]]], list[_Launch]]:
        """What is copied from golden weights in host memory first, and what is launched then."""
        from_host, launches = [], []
        for place in np.unique(self._arena[rows]):
            arena, mine = self._arenas[place], self._arena == place
            golden = _addresses(arena.copied())
            if arena.golden_is_on_host:  # it is copied onto the live ones, and read there
                from_host.append((arena, [self._names[row] for row in rows if mine[row]]))
                golden = self._head[mine, 0]
            self._head[mine, 1] = golden
        for kind in np.unique(self._kind[rows]):
            some, (dtype, aligned) = rows[self._kind[rows] == kind], self._kinds[kind]
            first, owner = self._programs_of(some)
            told = np.column_stack([self._head[some], first, tell(table.cells[some])])
            even = aligned and not (told[:, HEAD + 2 :: PART] % 4).any()
            launches.append(_Launch(torch.from_numpy(told).to(owner.device), some, dtype, aligned, even))
        return from_host, launches

    def _programs_of(self, rows: Numbers) -> tuple[Numbers, Tensor]:
        """The first program of each row, and the row of each program, on the device."""

        def make() -> tuple[Numbers, Tensor]:
            d, k = self._head[rows, 2], self._head[rows, 3]
            counts = -(-d // self._kernel.tile[0]) * -(-k // self._kernel.tile[1])
            owner = torch.from_numpy(np.repeat(np.arange(len(rows), dtype=np.int32), counts))
            return np.cumsum(counts) - counts, owner.to(self._arenas[0].live.device)

        return _kept(self._programs, rows.tobytes(), make, most=PROGRAMS)

    def _bound(self, layers: Mapping[str, Factors]) -> Bound:
        known = self._known.get(id(layers))
        if known and known[0]() is layers:
            return known[1]
        found = self._bind(layers)
        if isinstance(layers, Layers):
            self._known[id(layers)] = weakref.ref(layers, _forgetting(self, id(layers))), found
        return found

    def _bind(self, layers: Mapping[str, Factors]) -> Bound:
        device = self._arenas[0].live.device
        rows: list[int] = []
        cells: list[tuple[int, int, int]] = []
        held: list[Tensor] = []
        plain = True
        for name, part in layers.items():
            row = self._row.get(name, -1)
            check_shape(self._base, name, part, tuple(self._head[row, 2:4].tolist()) if row >= 0 else None)
            if needs_forming(part):  # then nobody asks for addresses
                plain = False
                continue
            up, down = _addressable(part.up, device), _addressable(part.down, device)
            if up.shape[1] != down.shape[0]:
                raise RuntimeError(
                    f"{name!r}: up {tuple(up.shape)} and down {tuple(down.shape)} do not multiply"
                )
            rows.append(row)
            cells.append((up.data_ptr(), down.data_ptr(), up.shape[1]))
            held += [up, down]
        sizes = _sizes(held)
        plain = plain and bool((sizes <= halves.LARGEST).all())
        found = np.column_stack([np.array(cells, np.int64).reshape(-1, 3), sizes.reshape(-1, 2)])
        where = np.array(rows, np.int64)
        return Bound(tuple(layers), where, found, self._text[where], tuple(held), plain)


def _forgetting(board: Switchboard, key: int) -> Callable[[object], None]:
    """What lets an adapter's addresses go once it is gone; does not keep the board."""
    whose = weakref.ref(board)

    def forget(_: object) -> None:
        if there := whose():
            there._known.pop(key, None)

    return forget


def _kept(kept: dict[K, T], key: K, make: Callable[[], T], *, most: int = KEPT) -> T:
    """What is kept under a key, or is made now; of more than so many the first one goes."""
    if key in kept:
        if isinstance(kept, OrderedDict):
            kept.move_to_end(key)
        return kept[key]
    made = kept[key] = make()
    if len(kept) > most:
        del kept[next(iter(kept))]
    return made


def _changed(before: _Table, after: _Table) -> Numbers:
    """The rows that differ, where the narrower table has no further parts."""
    wide, narrow = sorted((before.cells, after.cells), key=lambda cells: -cells.shape[1])
    width = narrow.shape[1]
    differ = (wide[:, :width] != narrow).any(1) | wide[:, width:].any(1)
    return np.flatnonzero(differ).astype(np.int64)


def tell(cells: Numbers) -> Numbers:
    """Of rows `[n, CELL * p]`, what the kernel is told after the head's first columns: of the parts that are
    there, one after the other.
    """
    parts = cells.reshape(len(cells), -1, CELL)
    order = np.argsort(parts[:, :, 2] == 0, axis=1, kind="stable")
    parts = np.take_along_axis(parts, order[:, :, None], axis=1)
    weight = parts[:, :, 5].astype(np.int32).view(np.float32)
    ups, downs, back = (_bits(by) for by in halves.moves(weight, parts[:, :, 3], parts[:, :, 4]))
    told = np.concatenate([parts[:, :, :3], ups[:, :, None], downs[:, :, None]], axis=2)
    return np.column_stack([np.count_nonzero(parts[:, :, 2], axis=1), back, told.reshape(len(cells), -1)])


def _bits(values: halves.Single) -> Numbers:
    return values.view(np.int32).astype(np.int64)


def _sizes(factors: list[Tensor]) -> Numbers:
    """How large the numbers of each are: `halves.exponents`."""
    if not factors:
        return np.zeros(0, np.int64)
    largest = torch.stack(torch._foreach_norm(factors, float("inf")))
    return halves.exponents(largest.cpu().double().numpy())


def _addressable(factor: Tensor, device: torch.device) -> Tensor:
    found = factor.to(device, torch.float32).contiguous()
    return found if found.data_ptr() % 16 == 0 else found.clone()


def _addresses(stacked: Tensor) -> Numbers:
    return stacked.data_ptr() + np.arange(len(stacked), dtype=np.int64) * stacked[0].nbytes
