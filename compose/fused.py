"""The kernel that patches any number of layers of a GPU in one launch.

    live = round(golden + sum_p weight_p up_p @ down_p)         float32, one rounding

Each program writes one tile of one layer: it reads its golden weights once, adds what each part brings, in
their order, and writes the live weights once, so that a switch moves hardly more bytes than a copy. What a
tile comes to depends on its layer's parts alone, not on what else is written with it. Products are made on
tensor cores of float16, of factors in two halves each (`compose.halves`). While those of one step are made,
the factors of the next are on their way, and the golden weights come into the card's cache.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from compose.compiling import goes
from compose.switchboard import HEAD, PART, tell

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["columns"])  # or a fifth adapter would be compiled for amid a render
def _write(
    table,
    owner,
    columns,
    LIVE: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    ASK: tl.constexpr,
    HEAD: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEEP: tl.constexpr,
):  # `table` and `owner` as `compose.switchboard` has them
    row = table + tl.load(owner + tl.program_id(0)).to(tl.int64) * columns
    live = tl.load(row).to(tl.pointer_type(LIVE))
    golden = tl.load(row + 1).to(tl.pointer_type(LIVE))
    d = tl.load(row + 2).to(tl.int32)
    k = tl.load(row + 3).to(tl.int32)
    tile = tl.program_id(0) - tl.load(row + 4).to(tl.int32)
    parts = tl.load(row + 5).to(tl.int32)
    back = _single(row + 6)
    if WIDE > 1:  # every row of a weight begins where 16 bytes can be moved at once
        live = tl.multiple_of(live, 16)
        golden = tl.multiple_of(golden, 16)
        k = tl.multiple_of(k, WIDE)
    across = tl.cdiv(k, COLUMNS)
    top, side = (tile // across) * ROWS, (tile % across) * COLUMNS
    m, n = top + tl.arange(0, ROWS), side + tl.arange(0, COLUMNS)
    corner = top.to(tl.int64) * k + side
    cell, start = row + HEAD, 0
    left, up_by, right, down_by, rank = _factors(cell, parts > 0, start, d, k, m, n, WIDE, EVEN, DEEP)
    if ASK:
        _ask(golden + corner, d - top, k - side, k, LIVE, ROWS, COLUMNS)
    # From -0, which leaves a golden -0 alone; `tl.full` would take -0.0 for 0.
    total = tl.full((ROWS, COLUMNS), -0x80000000, tl.int32).to(tl.float32, bitcast=True)
    while parts > 0:
        left_high, left_low = _halves(left * up_by)
        right_high, right_low = _halves(right * down_by)
        done = start + DEEP >= rank
        start = tl.where(done, 0, start + DEEP)
        cell += tl.where(done, PART, 0)
        parts -= done.to(tl.int32)
        # Of the next round: they are on their way while this one's products are made.
        left, up_by, right, down_by, rank = _factors(cell, parts > 0, start, d, k, m, n, WIDE, EVEN, DEEP)
        total = tl.dot(left_low, right_high, total)
        total = tl.dot(left_high, right_low, total)
        total = tl.dot(left_high, right_high, total)
    inside = (m[:, None] < d) & (n[None, :] < k)
    place = tl.arange(0, ROWS)[:, None] * k + tl.arange(0, COLUMNS)[None, :]
    found = tl.load(golden + corner + place, mask=inside, other=0.0).to(tl.float32) + total * back
    tl.store(live + corner + place, found.to(LIVE), mask=inside)


@triton.jit
def _factors(cell, there, start, d, k, m, n, WIDE: tl.constexpr, EVEN: tl.constexpr, DEEP: tl.constexpr):
    """A part's columns of up and rows of down from `start` on, each with what moves it; its rank."""
    up = tl.load(cell, there, 0).to(tl.pointer_type(tl.float32))
    down = tl.load(cell + 1, there, 0).to(tl.pointer_type(tl.float32))
    rank = tl.load(cell + 2, there, 0).to(tl.int32)
    if WIDE > 1:
        down = tl.multiple_of(down, 16)
    if EVEN:  # as is every row of an up
        up = tl.multiple_of(up, 16)
        rank = tl.multiple_of(rank, 4)
    r = start + tl.arange(0, DEEP)
    left = tl.load(up + m[:, None] * rank + r[None, :], (m[:, None] < d) & (r[None, :] < rank), 0.0)
    right = tl.load(down + r[:, None] * k + n[None, :], (r[:, None] < rank) & (n[None, :] < k), 0.0)
    return left, _single(cell + 3, there), right, _single(cell + 4, there), rank


@triton.jit
def _ask(corner, d, k, stride, LIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Has a tile of a weight `[d, k]` brought near, by lines of 128 bytes."""
    LINE: tl.constexpr = 1024 // LIVE.primitive_bitwidth
    m = tl.minimum(tl.arange(0, ROWS), d - 1)
    n = tl.minimum(tl.arange(0, COLUMNS // LINE) * LINE, k - 1)
    line = corner + m[:, None] * stride + n[None, :]
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _single(address, there=True):
    return tl.load(address, there, 0).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):  # what of a float32 a float16 holds, and the rest
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@dataclass(frozen=True, slots=True)
class Fused:
    """The kernel, ready to run; `deep` columns of a part's up to a step."""

    tile: tuple[int, int] = (64, 128)
    deep: int = 16
    warps: int = 4

    def __call__(
        self, table: Tensor, owner: Tensor, dtype: torch.dtype, *, aligned: bool, even: bool
    ) -> None:
        wide = 16 // dtype.itemsize if aligned else 1
        asks = table.is_cuda and torch.version.hip is None
        shape = TYPES[dtype], wide, even, asks, HEAD, PART, *self.tile, self.deep
        with torch.cuda.device_of(table):  # Triton launches on the current device, wherever a tensor lies
            _write[(len(owner),)](table, owner, table.shape[1], *shape, num_warps=self.warps, num_stages=1)


def ready(device: torch.device, dtypes: Iterable[torch.dtype]) -> Fused | None:
    """The kernel, compiled for these types; None where that does not go, or not right."""
    return Fused() if all(_goes(device, dtype) for dtype in dtypes) else None


@cache
def _goes(device: torch.device, dtype: torch.dtype) -> bool:
    right = partial(_is_right, Fused(), device, dtype)
    return dtype in TYPES and goes(f"switching {dtype} on {device}", right, "layer by layer")


def _is_right(kernel: Fused, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers of every kind, each compiled by itself, come out as torch has them, to rounding."""
    kinds = ((160, 24, True, True), (160, 23, True, False), (163, 23, False, False))
    return all(_comes_out(kernel, device, dtype, *kind) for kind in kinds)


def _comes_out(
    kernel: Fused, device: torch.device, dtype: torch.dtype, k: int, rank: int, aligned: bool, even: bool
) -> bool:
    g, d = torch.Generator().manual_seed(0), 160
    golden = torch.randn(d, k, generator=g).to(device, dtype)
    up, down = torch.randn(d, rank, generator=g).to(device), torch.randn(rank, k, generator=g).to(device)
    live, programs = torch.zeros_like(golden), math.prod(map(triton.cdiv, (d, k), kernel.tile))
    owner = torch.zeros(programs, dtype=torch.int32, device=device)
    told = np.array([[up.data_ptr(), down.data_ptr(), rank, 4, 4, np.float32(0.5).view(np.int32)]])
    head = [live.data_ptr(), golden.data_ptr(), d, k, 0]
    table = torch.tensor([[*head, *tell(told)[0]]], device=device)
    kernel(table, owner, dtype, aligned=aligned, even=even)
    meant = golden.double() + 0.5 * up.double() @ down.double()
    return torch.allclose(live.double(), meant, rtol=torch.finfo(dtype).eps, atol=3e-5)
