"""A full checkpoint against its base -> a LoRA: what was trained, in as many directions as it needs.

    W_tuned - W_base ~ up down        by layer; the smallest rank that holds a share of its energy

Both are diffusers directories; every layer is read, factored and let go before the next, so memory is that of
the largest layer. What no LoRA can hold (biases, norms, embeddings) is told, with how much of the change it
was.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compose.checkpoint import Checkpoint
from compose.errors import IncompatibleBase, InvalidRequest, NonFinite
from compose.factors import Factors
from compose.families import families, table
from compose.methods.elementwise import factored

RANK, ENERGY, FLOOR = 64, 0.99, 1e-6
RANK_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class Extracted:
    """The layers; the relative error of what they hold; and what no LoRA can hold: tensors that changed, and
    their share of the squared change of the whole checkpoint.
    """

    layers: dict[str, Factors]
    error: float
    left_behind: tuple[str, ...]
    left_share: float


def extract(
    tuned: Path,
    base: Path,
    family: str,
    *,
    rank: int = RANK,
    energy: float = ENERGY,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extracted:
    """The LoRA by which `tuned` differs from `base`, at most `rank` and at least the share `energy` of every
    layer.

    Layers that changed by less than a millionth of their norm, or by being stored in another precision alone,
    are left out. Raises IncompatibleBase, InvalidRequest.
    """
    if not 1 <= rank <= RANK_LIMIT:
        raise InvalidRequest(f"rank {rank} is not within 1 and {RANK_LIMIT}", field="rank")
    if not 0 < energy <= 1:
        raise InvalidRequest(f"energy {energy} is not within (0, 1]", field="energy")
    if family not in families():
        raise InvalidRequest(f"unknown family {family!r}; known: {', '.join(families())}", field="family")
    layers: dict[str, Factors] = {}
    lost = total = left = 0.0
    behind = []
    with ExitStack() as opened:
        ours, theirs = Checkpoint(tuned, opened), Checkpoint(base, opened)
        known = {key: name for name in table(family) if (key := ours.key(name))}
        if not known:
            raise IncompatibleBase(f"{tuned} has no layer of {family}", field="tuned")
        names = ours.names()
        for done, key in enumerate(names):
            progress(done, len(names))
            after, before = ours.read(key), theirs.read(key)
            if after is not None and key not in known and not after.is_floating_point():
                continue  # old files hold the numbers of the positions, which no one trains
            if after is None or before is None or before.shape != after.shape:
                raise IncompatibleBase(
                    f"{base} has no {key!r} of that shape: it is not its base", field="base"
                )
            change = after.float() - before.float()
            square = float(change.double().square().sum())
            if not math.isfinite(square):
                raise NonFinite(f"{key!r} holds NaN or infinity in one of the checkpoints")
            if square <= FLOOR**2 * float(before.double().square().sum()) or _rounded(after, before):
                continue
            if name := known.get(key):
                layers[name], error = _factored(change.flatten(1), rank, energy)
                lost, total = lost + error, total + square
            else:
                behind.append(key)
                left += square
        progress(len(names), len(names))
    if not layers:
        raise InvalidRequest(
            f"{tuned} does not differ from {base}: there is nothing to extract", field="tuned"
        )
    return Extracted(layers, (lost / total) ** 0.5, tuple(behind), left / (left + total) if left else 0.0)


def _rounded(after: Tensor, before: Tensor) -> bool:
    """Whether two tensors are one, stored in two precisions, or by way of another: fp16 and bf16 copies of
    a base differ from it by 0.02% and 0.2% in every layer, in all directions.
    """
    one, other = after.float(), before.float()
    if after.dtype != before.dtype:
        coarse = torch.finfo(max((after.dtype, before.dtype), key=lambda dtype: torch.finfo(dtype).eps))
        if bool(((one - other).abs() <= coarse.eps * (other.abs() + coarse.tiny)).all()):
            return True
    return any(
        torch.equal(a, b.to(dtype).float())
        for dtype in (torch.float16, torch.bfloat16)
        for a, b in ((one, other), (other, one))
    )


def _factored(change: Tensor, rank: int, energy: float) -> tuple[Factors, float]:
    """The smallest rank up to `rank` that holds the share `energy`, and the squared error."""
    up, down, _ = factored(change, rank, seed=0)
    values = up.double().square().sum(0)  # the singular values: each side carries their roots
    total = float(change.double().square().sum())
    held = values.square().cumsum(0)
    enough = int((held < energy * total * (1 - 1e-12)).sum()) + 1
    kept = min(enough, up.shape[1])
    error = max(0.0, total - float(held[kept - 1]))
    return Factors(up[:, :kept].contiguous(), down[:kept].contiguous()), error
