"""The kernel that patches any number of layers of a GPU in one launch.

    live = round(golden + sum_p weight_p up_p @ down_p)         float32, one rounding

Each program writes one tile of one layer: it reads its golden weights once, adds what each part brings, in
their order, and writes the live weights once, so that a switch moves hardly more bytes than a copy. What a
tile comes to depends on its layer's parts alone, not on what else is written with it. Products are made on
tensor cores of tf32: each factor is split into what a tf32 holds and the rest, and three products come to
float32's accuracy ("3xTF32" of NVIDIA's CUTLASS; Triton's own `tf32x3` looks for NaN at every step, which
costs as much again).
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
from compose.switchboard import HEAD, PART

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _write(
    table,
    owner,
    columns,
    parts,
    LIVE: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
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
    if WIDE > 1:  # every row of a weight begins where 16 bytes can be moved at once
        live = tl.multiple_of(live, 16)
        golden = tl.multiple_of(golden, 16)
        k = tl.multiple_of(k, WIDE)
    tile = tl.program_id(0) - tl.load(row + 4).to(tl.int32)
    across = tl.cdiv(k, COLUMNS)
    m = (tile // across) * ROWS + tl.arange(0, ROWS)
    n = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    # Turned: tensor cores want r side by side in the second factor. From -0, which leaves a golden -0 alone;
    # `tl.full` would take -0.0 for 0.
    total = tl.full((COLUMNS, ROWS), -0x80000000, tl.int32).to(tl.float32, bitcast=True)
    for part in range(parts):
        cell = row + HEAD + PART * part
        up = tl.load(cell).to(tl.pointer_type(tl.float32))
        down = tl.load(cell + 1).to(tl.pointer_type(tl.float32))
        rank = tl.load(cell + 2).to(tl.int32)
        weight = tl.load(cell + 3).to(tl.int32).to(tl.float32, bitcast=True)
        if WIDE > 1:
            down = tl.multiple_of(down, 16)
        if EVEN:  # as is every row of an up
            up = tl.multiple_of(up, 16)
            rank = tl.multiple_of(rank, 4)
        for start in range(0, rank, DEEP):
            r = start + tl.arange(0, DEEP)
            left = tl.load(up + m[:, None] * rank + r[None, :], (m[:, None] < d) & (r[None, :] < rank), 0.0)
            right = tl.load(down + r[:, None] * k + n[None, :], (r[:, None] < rank) & (n[None, :] < k), 0.0)
            left, right = tl.trans(left * weight), tl.trans(right)
            upper_left, upper_right = _upper(left), _upper(right)
            lower_left, lower_right = left - upper_left, right - upper_right
            total = tl.dot(upper_right, lower_left, total, input_precision="tf32")
            total = tl.dot(lower_right, upper_left, total, input_precision="tf32")
            total = tl.dot(upper_right, upper_left, total, input_precision="tf32")
    inside = (m[:, None] < d) & (n[None, :] < k)
    place = m[:, None].to(tl.int64) * k + n[None, :]
    found = tl.load(golden + place, mask=inside, other=0.0).to(tl.float32) + tl.trans(total)
    tl.store(live + place, found.to(LIVE), mask=inside)


@triton.jit
def _upper(x):  # what of a float32 a tf32 holds
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@dataclass(frozen=True, slots=True)
class Fused:
    """The kernel, ready to run; `deep` columns of a part's up to a step."""

    tile: tuple[int, int] = (64, 128)
    deep: int = 16
    warps: int = 4

    def __call__(
        self, table: Tensor, owner: Tensor, dtype: torch.dtype, *, aligned: bool, even: bool
    ) -> None:
        columns = table.shape[1]
        shape = TYPES[dtype], 16 // dtype.itemsize if aligned else 1, even, HEAD, PART, *self.tile, self.deep
        parts = (columns - HEAD) // PART
        with torch.cuda.device_of(table):  # Triton launches on the current device, wherever a tensor lies
            _write[(len(owner),)](table, owner, columns, parts, *shape, num_warps=self.warps, num_stages=1)


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
    head = [live.data_ptr(), golden.data_ptr(), d, k, 0]
    part = [up.data_ptr(), down.data_ptr(), rank, int(np.float32(0.5).view(np.int32))]
    kernel(torch.tensor([head + part], device=device), owner, dtype, aligned=aligned, even=even)
    meant = golden.double() + 0.5 * up.double() @ down.double()
    return torch.allclose(live.double(), meant, rtol=torch.finfo(dtype).eps, atol=3e-5)
