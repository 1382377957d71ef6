"""Eigenvectors of many small matrices on a GPU, whose library takes one matrix after the other.

One-sided Jacobi (Hestenes, 1958; Demmel and Veselic, 1992) on the rows of a symmetric positive semidefinite
M: plane rotations make every two of them orthogonal, J M = diag(values) V', values the lengths of the rows.
One program takes one matrix, and all pairs of a round of a round-robin tournament at once; sweeps of
n - 1 rounds converge quadratically in the end. What a matrix comes to does not depend on the others.
"""

from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from compose.compiling import goes

LARGEST = 256
"""Rows of a matrix beyond which the library is faster."""

CHUNK, WARPS = 16, 8
"""Columns that a program takes at a time, and its warps. All columns at once, in registers, took twice as
long: no second program fits beside it.
"""

SWEEPS, ENOUGH = 100, 1e-10
"""Sweeps at most, until no two rows are further from orthogonal when they are turned: about 10 where values
lie close together, 25 of 256 rows whose values go down to 1e-6 of the largest, 42 where to 1e-14.
"""


@triton.jit
def _orthogonalise(
    rows,
    floors,
    n,
    ENOUGH: tl.constexpr,
    SWEEPS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    matrix = rows + tl.program_id(0).to(tl.int64) * n * n
    floor = tl.load(floors + tl.program_id(0))  # the square of a row no longer than that is rounding
    pair = tl.arange(0, PAIRS)
    here = pair < n // 2
    lane = tl.arange(0, CHUNK)
    sweep = 0
    worst = tl.full((), 1.0, tl.float64)
    while (sweep < SWEEPS) & (worst > ENOUGH):
        worst = tl.full((), 0.0, tl.float64)
        for turn in range(n - 1):
            p = matrix + ((turn + pair) % (n - 1)) * n
            q = matrix + tl.where(pair == 0, n - 1, (turn + (n - 1) - pair) % (n - 1)) * n
            xx = tl.zeros((PAIRS,), tl.float64)
            yy = tl.zeros((PAIRS,), tl.float64)
            xy = tl.zeros((PAIRS,), tl.float64)
            for start in range(0, n, CHUNK):
                column = start + lane
                inside = here[:, None] & (column[None, :] < n)
                x = tl.load(p[:, None] + column[None, :], inside, 0.0)
                y = tl.load(q[:, None] + column[None, :], inside, 0.0)
                xx += tl.sum(x * x, 1)
                yy += tl.sum(y * y, 1)
                xy += tl.sum(x * y, 1)
            turns = (tl.minimum(xx, yy) > floor) & (xy != 0.0)
            cosine = tl.where(turns, tl.abs(xy) / tl.sqrt(tl.maximum(xx * yy, 1e-300)), 0.0)
            worst = tl.maximum(worst, tl.max(cosine, 0))
            zeta = (yy - xx) / tl.where(turns, 2.0 * xy, 1.0)
            tangent = tl.where(zeta < 0.0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
            tangent = tl.where(turns, tangent, 0.0)
            c = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            s = c * tangent
            for start in range(0, n, CHUNK):
                column = start + lane
                inside = here[:, None] & (column[None, :] < n)
                x = tl.load(p[:, None] + column[None, :], inside, 0.0)
                y = tl.load(q[:, None] + column[None, :], inside, 0.0)
                tl.store(p[:, None] + column[None, :], c[:, None] * x - s[:, None] * y, inside)
                tl.store(q[:, None] + column[None, :], s[:, None] * x + c[:, None] * y, inside)
            tl.debug_barrier()  # the next round pairs rows that other threads wrote
        sweep += 1


def eigh(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues `[L, n]` and eigenvectors `[L, n, n]` of symmetric positive semidefinite matrices
    `[L, n, n]`, computed in float64. Eigenvectors of values below 1e-15 of the largest may be anything.
    Raises LinAlgError for NaN and infinity.
    """
    n = batch.shape[-1]
    even = n + n % 2
    rows = torch.zeros(len(batch), even, even, dtype=torch.float64, device=batch.device)
    rows[:, :n, :n] = batch
    size = torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True)
    if not size.isfinite().all():
        raise torch.linalg.LinAlgError("a matrix has NaN or infinity in it")  # type: ignore[attr-defined]
    rows /= torch.where(size > 0, size, 1)  # the kernel multiplies squares of rows
    floors = torch.full_like(size, 1e-30)
    pairs = max(2, triton.next_power_of_2(even // 2))
    with torch.cuda.device_of(rows):  # Triton launches on the current device, wherever a tensor lies
        _orthogonalise[(len(batch),)](
            rows, floors, even, ENOUGH, SWEEPS, pairs, CHUNK, num_warps=WARPS, num_stages=1
        )
    values, order = torch.linalg.vector_norm(rows, dim=-1).sort(dim=-1)
    vectors = rows.gather(1, order.unsqueeze(-1).expand(-1, -1, even))[:, even - n :, :n]
    values = values[:, even - n :]
    vectors = vectors / torch.where(values > 0, values, 1).unsqueeze(-1)
    values = values * size.squeeze(-1)
    return values.to(batch.dtype), vectors.mT.contiguous().to(batch.dtype)


@cache
def ready(device: torch.device) -> bool:
    """Whether the kernel compiles for a device, and is right there."""
    return goes(f"eigenvectors on {device}", partial(_is_right, device), "those of the GPU's library")


def _is_right(device: torch.device) -> bool:
    X = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    M = X @ X.mT
    values, vectors = eigh(M)
    return torch.allclose(vectors * values.unsqueeze(-2) @ vectors.mT, M)
