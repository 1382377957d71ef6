"""What a merge method is, and what it can be told.

A method is a function `run(group, parameters) -> Outcome`: what the members of a group become before they are
summed under their weights. Most change each member by itself, whatever the weights (`separable`): their work
is kept and a new weight costs nothing of it. The others return one member that holds the finished sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from compose.errors import InvalidRequest
from compose.factors import Spectrum
from compose.groups import FINISHED, Group, Joined, Member

SEED_LIMIT, EVERY_LIMIT = 1 << 63, 150
_RANGES = {
    # name: (low, is low allowed, high)
    "energy": (0.0, False, 1.0),
    "protect": (0.0, False, 1.0),
    "strength": (0.0, True, 1.0),
    "density": (1e-6, True, 1.0),  # what is dropped at random is divided by it
    "mu": (0.0, True, 1e4),
    "ratio": (1.0, True, 1e6),
}
_CHOICES = {"mode": ("priority", "symmetric"), "side": ("input", "output"), "rule": ("sum", "ties")}


@dataclass(frozen=True, slots=True)
class Parameters:
    """None means: not said. rank: of the result; energy: share of the squared norm to keep; ratio: keep the
    singular values above the largest over this. The others are
    explained where they are used.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    strength: float | None = None
    protect: float | None = None
    mode: str | None = None
    side: str | None = None
    density: float | None = None
    seed: int | None = None
    mu: float | None = None
    rule: str | None = None
    keep_norm: bool | None = None
    every: int | None = None

    def given(self) -> set[str]:
        """Names of the parameters that were said."""
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}

    def check(self, rank_limit: int) -> None:
        """Raises InvalidRequest for a value out of range."""
        if sum(getattr(self, name) is not None for name in ("rank", "energy", "ratio")) > 1:
            raise InvalidRequest("rank, energy and ratio exclude each other; give one", field="method.energy")
        if self.rank is not None and not 1 <= self.rank <= rank_limit:
            raise InvalidRequest(f"rank {self.rank} is not within 1 and {rank_limit}", field="method.rank")
        if self.seed is not None and not 0 <= self.seed < SEED_LIMIT:
            raise InvalidRequest(f"seed {self.seed} is not within 0 and 2^63", field="method.seed")
        if self.every is not None and not 1 <= self.every <= EVERY_LIMIT:
            raise InvalidRequest(
                f"every {self.every} is not within 1 and {EVERY_LIMIT}", field="method.every"
            )
        for name, (low, closed, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or not low <= value <= high or (value == low and not closed):
                raise InvalidRequest(
                    f"{name} {value} is not within {'[' if closed else '('}{low:g}, {high:g}]",
                    field=f"method.{name}",
                )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise InvalidRequest(
                    f"{name} {str(value)[:40]!r} is none of {', '.join(choices)}", field=f"method.{name}"
                )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The members to be summed. Where a method had to approximate: the squared error and the squared norm,
    summed over the layers. `norms`: of each member its place in the stack and its squared norm before and
    after. `spectrum`: where a method knows it, the sum's SVD, split, of that many vectors: for a result of
    smaller rank. `joined`: the members in one, where that is there.
    """

    members: tuple[Member, ...]
    lost: float = 0.0
    total: float = 0.0
    norms: tuple[tuple[int, float, float], ...] = ()
    spectrum: Callable[[int | None], Spectrum] | None = None
    joined: Joined | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A method, one sentence on it with its source, the parameters it takes, whether the order of the stack
    means something to it, and whether its members depend on no weight.
    """

    run: Callable[[Group, Parameters], Outcome]
    summary: str
    parameters: frozenset[str] = frozenset()
    ordered: bool = False
    separable: bool = True
    calibrated: bool = False


def finished(
    group: Group,
    up: Tensor,
    down: Tensor,
    *,
    lost: float = 0.0,
    total: float = 0.0,
    spectrum: Callable[[int | None], Spectrum] | None = None,
) -> Outcome:
    """The outcome of a method that has done the sum itself: up `[L, d, q]`, down `[L, q, k]`."""
    ones = torch.ones(len(group.layers), device=up.device)
    member = Member(FINISHED, up.float(), down.float().contiguous(), ones)
    return Outcome((member,), lost, total, spectrum=spectrum)
