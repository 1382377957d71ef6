"""What the element-wise methods share: trimming, electing signs, dropping; and dense updates, one layer at a
time.

The result of an element-wise rule on B A has full rank: it has to be formed (`[d, k]`, in blocks of rows),
and what leaves is its best approximation of the rank asked for (the summed rank without one), with the error
told.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from compose.factors import NEGLIGIBLE
from compose.groups import Group, Member
from compose.lapack import alone
from compose.methods.method import Outcome, Parameters, finished

_ROWS = 256
_OVERSAMPLING, _ITERATIONS = 8, 4


def threshold(x: Tensor, density: float, sizes: Tensor | None = None) -> Tensor:
    """Per leading index, the size of the smallest of the int(density n) largest entries, `[L]`; infinity for
    none. `sizes` `[L]` is n where the rest of the entries is there for the batch's sake, and zero.
    """
    flat = x.abs().flatten(1)
    found = torch.full((len(flat),), float("inf"), dtype=x.dtype, device=x.device)
    wanted = [flat.shape[1]] * len(flat) if sizes is None else sizes.tolist()
    for size in sorted(set(wanted)):
        if keep := int(density * size):
            same = [layer for layer, of in enumerate(wanted) if of == size]
            part = flat if len(same) == len(flat) else flat[same]
            found[same] = part.kthvalue(flat.shape[1] - keep + 1, dim=1).values
    return found


def trim(x: Tensor, limits: Tensor) -> Tensor:
    """x `[L, a, b]` where it is as large as its limit, 0 elsewhere."""
    return torch.where(x.abs() >= limits[:, None, None], x, 0)


def elect(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The disjoint mean of TIES (Yadav et al., NeurIPS 2023): parts `[L, a, b]`, weights `[L]`.

    Every entry takes the sign of the sum; the weighted entries of that sign are added up and divided by their
    number. A negative weight turns its part around first. A sum that is rounding beside the largest has no
    sign: opposites cancel.
    """
    turned = [part * weight.sign()[:, None, None] for part, weight in zip(parts, weights, strict=True)]
    together = sum(turned[1:], turned[0])
    rounding = 16 * torch.finfo(together.dtype).eps
    largest = torch.stack([part.abs().amax((1, 2)) for part in turned]).amax(0)
    sign = torch.where(together.abs() > rounding * largest[:, None, None], together.sign(), 0)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, weight in zip(turned, weights, strict=True):
        agrees = (part.sign() == sign) & (sign != 0)
        total += torch.where(agrees, part * weight.abs()[:, None, None], 0)
        count += agrees
    return total / count.clamp_min(1)


def add(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The weighted sum of parts `[L, a, b]`, weights `[L]`."""
    terms = [part * weight[:, None, None] for part, weight in zip(parts, weights, strict=True)]
    return sum(terms[1:], terms[0])


Rule = Callable[[Tensor], Tensor]
"""What is done to the blocks of rows `[rows, k]` of one update, the first block first."""


def largest(group: Group, layer: int, member: Member, density: float) -> Rule:
    """Keeps the share `density` of an update's largest entries. How large they are is kept."""
    limits: dict[tuple[int, int], Tensor] = group.once(("largest", density), dict)
    if (layer, member.index) not in limits:
        update = member.up[layer] @ member.down[layer]
        limits[layer, member.index] = threshold(update[None], density)[0]
    limit = limits[layer, member.index]
    return lambda block: torch.where(block.abs() >= limit, block, 0)


def dropping(density: float, seed: int | None, layer: str, member: int) -> Rule:
    """DARE: keeps each entry with the probability `density`, and divides what is kept by it (Yu et al., ICML
    2024, arXiv 2311.03099). One stream of random numbers for each layer and member, the same on every
    device.
    """
    stream = torch.Generator("cpu").manual_seed(_seed(seed or 0, f"{layer}#{member}"))

    def rule(block: Tensor) -> Tensor:
        kept = torch.rand(block.shape, generator=stream) < density
        return block * kept.to(block.device) / density

    return rule


def dense(
    group: Group,
    parameters: Parameters,
    *,
    prepare: Callable[[int, Member], Rule],
    join: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
) -> Outcome:
    """Runs an element-wise method layer by layer: `prepare(layer, member)` gives the rule for a member's
    update, `join(blocks, weights)` makes one block of all members'.
    """
    rank = parameters.rank or sum(m.up.shape[2] for m in group.members)
    ups, downs, lost, total = [], [], 0.0, 0.0
    for layer in range(len(group.layers)):
        group.check()
        rules = [prepare(layer, member) for member in group.members]
        weights = [member.weight[layer : layer + 1] for member in group.members]
        blocks = []
        for rows in _blocks(group.members[0].up.shape[1]):
            parts = [
                rule(m.up[layer, rows] @ m.down[layer])[None]
                for rule, m in zip(rules, group.members, strict=True)
            ]
            blocks.append(join(parts, weights)[0])
        merged = torch.cat(blocks)
        up, down, error = factored(merged, rank, seed=_seed(parameters.seed or 0, group.layers[layer]))
        ups.append(up)
        downs.append(down)
        lost += error
        total += float(merged.double().square().sum())
    return finished(group, torch.stack(ups), torch.stack(downs), lost=lost, total=total)


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


def _seed(seed: int, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}".encode()).digest()[:7], "little")


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh


def _basis(matrix: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(matrix).Q
    return Q


def factored(matrix: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, float]:
    """up `[d, q]`, down `[q, k]` nearest to a matrix `[d, k]`, q = min(rank, d, k), and the squared error.

    Subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4); the whole SVD where that is as
    cheap.
    """
    d, k = matrix.shape
    q = min(rank, d, k)
    width = q + _OVERSAMPLING
    if 2 * width >= min(d, k):
        U, S, Vh = alone(_svd, matrix)
    else:
        start = torch.randn(k, width, generator=torch.Generator("cpu").manual_seed(seed)).to(matrix.device)
        Q = alone(_basis, matrix @ start)
        for _ in range(_ITERATIONS):
            Q = alone(_basis, matrix @ alone(_basis, matrix.mT @ Q))
        U, S, Vh = alone(_svd, Q.mT @ matrix)
        U = Q @ U
    U, S, Vh = U[:, :q], S[:q], Vh[:q]
    peak = U.gather(0, U.abs().argmax(0, keepdim=True))[0].sign()
    S = torch.where(S[:1] * NEGLIGIBLE < S, S, 0)
    half = S.sqrt()
    lost = float(matrix.double().square().sum() - S.double().square().sum()) if q < min(d, k) else 0.0
    return U * (peak * half), (peak * half)[:, None] * Vh, max(0.0, lost)
