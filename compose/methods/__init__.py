"""The merge methods, one file each, one signature: `method(group, parameters) -> Projected`.

A method says what each member becomes before the weighted sum. `merge` then sums (exactly, by concatenation)
and, where a rank or an energy is asked for, truncates. Adding a method is adding one file and its line in
`METHODS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from compose.errors import InvalidRequest
from compose.factors import Factors, Group, Member, concatenate, group, squared_norm, truncate
from compose.methods.naive import naive
from compose.methods.orthogonal import orthogonal
from compose.methods.parameters import Parameters

STACK_LIMIT = 16
RANK_LIMIT = 1024
WEIGHT_LIMIT = 8.0


@dataclass(frozen=True, slots=True)
class Method:
    """What a method does to the members, the parameters it takes, and whether the order of the stack matters
    to it.
    """

    run: Callable[[Group, Parameters], tuple[Member, ...]]
    summary: str
    parameters: frozenset[str] = frozenset()
    ordered: bool = False


METHODS = {
    "naive": Method(naive, "the weighted sum of the updates, exactly, by concatenation"),
    "svd": Method(
        naive,
        "the best low-rank approximation of the weighted sum (Eckart-Young)",
        frozenset({"rank", "energy"}),
    ),
    "orthogonal": Method(
        orthogonal,
        "each adapter keeps out of the input directions of those before it (after NP-LoRA, arXiv 2511.11051)",
        frozenset({"rank", "energy", "strength", "protect"}),
        ordered=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge: its layers, the share of each member's norm kept, and the relative truncation error."""

    layers: dict[str, Factors]
    kept: tuple[float, ...]
    truncation_error: float


def check(stack: Sequence[tuple[Mapping[str, Factors], float]], method: str, parameters: Parameters) -> None:
    """Raises InvalidRequest for what `merge` cannot do, before any work."""
    if not 1 <= len(stack) <= STACK_LIMIT:
        raise InvalidRequest(f"a stack holds 1 to {STACK_LIMIT} adapters, not {len(stack)}", field="stack")
    for _, weight in stack:
        if not math.isfinite(weight) or abs(weight) > WEIGHT_LIMIT:
            raise InvalidRequest(
                f"weight {weight} must be a number within -{WEIGHT_LIMIT:g} and {WEIGHT_LIMIT:g}",
                field="stack.weight",
            )
    if method not in METHODS:
        raise InvalidRequest(
            f"unknown method {method!r}; there are {', '.join(METHODS)}", field="method.name"
        )
    for name in parameters.given() - METHODS[method].parameters:
        raise InvalidRequest(f"the method {method!r} takes no {name}; leave it out", field=f"method.{name}")
    parameters.check(RANK_LIMIT)


def merge(
    stack: Sequence[tuple[Mapping[str, Factors], float]],
    *,
    method: str = "naive",
    parameters: Parameters | None = None,
    device: torch.device | str = "cpu",
) -> Merged:
    """Merges a weighted stack. For `orthogonal` the order is the priority. Raises InvalidRequest."""
    parameters = parameters or Parameters()
    check(stack, method, parameters)
    rank, energy = parameters.rank, parameters.energy
    if method == "svd" and rank is None and energy is None:
        rank = max((f.rank for adapter, _ in stack for f in adapter.values()), default=1)
    layers: dict[str, Factors] = {}
    before, after = [0.0] * len(stack), [0.0] * len(stack)
    lost = total = 0.0
    for batch in group(stack, device):
        members = METHODS[method].run(batch, parameters)
        if METHODS[method].ordered:  # the others take nothing from anybody
            for old, new in zip(batch.members, members, strict=True):
                norm = float(squared_norm(old.up, old.down).sum())
                before[old.index] += norm
                after[old.index] += norm if new is old else float(squared_norm(new.up, new.down).sum())
        up, down = concatenate(members)
        if rank is None and energy is None:
            results = [Factors(up[i], down[i]) for i in range(len(batch.layers))]
        else:
            results, group_lost, group_total = truncate(up, down, rank=rank, energy=energy)
            lost += group_lost
            total += group_total
        layers.update(zip(batch.layers, results, strict=True))
    kept = tuple(math.sqrt(a / b) if b else 1.0 for a, b in zip(after, before, strict=True))
    return Merged(layers, kept, math.sqrt(lost / total) if total else 0.0)
