"""A stack, batched: layers of one shape, changed by the same adapters with the same ranks, are one `Group`.

A group keeps what was computed from its members and not from their weights (`once`): when only a weight
changes, that part is there already.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from compose.errors import InvalidRequest
from compose.factors import Core, Factors, core
from compose.moments import Moment, stacked
from compose.weights import AS_TRAINED, Weight

CHUNK_BYTES = 192 << 20
"""Factors of one batch, float32. With its workspace a batch takes a few times as much."""

RESULTS_KEPT = 4
"""Results a group keeps, each about as large as its factors: the last methods and parameters tried."""

T = TypeVar("T")
_Kind = tuple[tuple[tuple[int, int, int, int], ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter of a stack: its layers, how strongly it acts, and its moments where it was calibrated (by
    layer; also of layers that it does not change).
    """

    layers: Mapping[str, Factors]
    weight: Weight = AS_TRAINED
    moments: Mapping[str, Moment] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter in one group: its place in the stack, up `[L, d, r]`, down `[L, r, k]`, weight `[L]`."""

    index: int
    up: Tensor
    down: Tensor
    weight: Tensor


def _nobody_asks() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of one shape with the members that change them, in the order of the stack; `moments` by place in
    the stack, of every calibrated adapter whether or not it changes these layers. `check` raises when nobody
    wants the merge any more: whoever works long on a group calls it in between.
    """

    layers: tuple[str, ...]
    members: tuple[Member, ...]
    moments: Mapping[int, Moment] = field(default_factory=dict)
    kept: dict[object, Any] = field(default_factory=dict, repr=False)
    check: Callable[[], None] = _nobody_asks

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """`compute()`, kept for as long as the group lives. It must not depend on the weights."""
        if key not in self.kept:
            while len(self.kept) >= RESULTS_KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = compute()
        found: T = self.kept.pop(key)
        self.kept[key] = found  # the last asked for is the last to go
        return found

    def weighted(self, weights: Sequence[Weight]) -> "Group":
        """The same group under other weights."""
        members = tuple(
            replace(m, weight=_weights(self.layers, weights[m.index], m.up.device)) for m in self.members
        )
        return replace(self, members=members)

    def nbytes(self) -> int:
        """What the group holds by itself."""
        members = sum(m.up.nbytes + m.down.nbytes for m in self.members)
        return members + sum(m.diagonal.nbytes + m.factor.nbytes for m in self.moments.values())

    def core(self, members: Sequence[Member], key: object, *, exact: bool) -> tuple[Core, Tensor]:
        """The core of `members`, kept under `key` unless that is None; their weights by column, `[L, R]`."""

        def compute() -> Core:
            up = torch.cat([m.up for m in members], dim=2)
            return core(up, torch.cat([m.down for m in members], dim=1), exact=exact)

        found = compute() if key is None else self.once(("core", key, exact), compute)
        ranks = [m.weight.unsqueeze(-1).expand(-1, m.up.shape[2]) for m in members]
        return found, torch.cat(ranks, dim=1)


def _weights(layers: Sequence[str], weight: Weight, device: torch.device) -> Tensor:
    return torch.tensor([weight.of(layer) for layer in layers], dtype=torch.float32, device=device)


def concatenate(members: Sequence[Member]) -> tuple[Tensor, Tensor]:
    """The weighted sum, exactly: up `[L, d, R]`, down `[L, R, k]` with the weights on `down`, R the summed
    rank.
    """
    up = torch.cat([m.up for m in members], dim=2)
    down = torch.cat([m.down * m.weight[:, None, None] for m in members], dim=1)
    return up, down


Active = tuple[tuple[int, ...], tuple[int, ...]]
"""Places of the adapters that change a layer, and of those whose moments count in it."""


def active(stack: Sequence[Adapter]) -> dict[str, Active]:
    """Who matters in each layer, in order of first appearance. An adapter with the weight 0 there is as if it
    were not in the stack, unless nobody else is.
    """
    found: dict[str, Active] = {}
    for layer in dict.fromkeys(name for adapter in stack for name in adapter.layers):
        present = [i for i, adapter in enumerate(stack) if adapter.weight.of(layer)]
        having = [i for i, adapter in enumerate(stack) if layer in adapter.layers]
        changing = tuple(i for i in having if i in present) or (having[0],)
        found[layer] = (changing, tuple(i for i in present if layer in stack[i].moments))
    return found


def group(stack: Sequence[Adapter], device: torch.device | str = "cpu") -> Iterator[Group]:
    """The stack's layers in batches of at most about CHUNK_BYTES, read as they are asked for. Raises
    InvalidRequest for a DoRA layer: it is no product of factors.
    """
    device = torch.device(device)
    pools: dict[_Kind, list[str]] = {}
    for layer, (indices, calibrated) in active(stack).items():
        shapes = tuple((i, *_shape(stack[i].layers, layer)) for i in indices)
        pools.setdefault((shapes, calibrated), []).append(layer)
    for (shapes, calibrated), layers in pools.items():
        a_layer = sum(4 * r * (d + k) for _, d, r, k in shapes)
        size = max(1, CHUNK_BYTES // a_layer)
        for start in range(0, len(layers), size):
            indices = tuple(i for i, *_ in shapes)
            yield _batch(stack, layers[start : start + size], indices, calibrated, device)


def _shape(layers: Mapping[str, Factors], name: str) -> tuple[int, int, int]:
    """d, r, k; without reading the layer where a file's mapping can tell."""
    told = getattr(layers, "shape", None)
    if told is not None:
        found: tuple[int, int, int] = told(name)
        return found
    up, down = layers[name].up, layers[name].down
    return up.shape[0], up.shape[1], down.shape[1]


def _batch(
    stack: Sequence[Adapter],
    layers: Sequence[str],
    indices: Sequence[int],
    calibrated: Sequence[int],
    device: torch.device,
) -> Group:
    members = []
    for i in indices:
        factors = [stack[i].layers[layer] for layer in layers]
        for layer, found in zip(layers, factors, strict=True):
            if found.magnitude is not None:
                raise InvalidRequest(
                    f"{layer!r} is a DoRA layer, which is not merged in factor space: its effect depends on "
                    "the base's weights; render it in a stack with the method naive",
                    field="stack",
                )
        up = torch.stack([f.up for f in factors]).to(device, torch.float32)
        down = torch.stack([f.down for f in factors]).to(device, torch.float32)
        members.append(Member(i, up, down, _weights(layers, stack[i].weight, device)))
    moments = {i: stacked([stack[i].moments[layer] for layer in layers], device) for i in calibrated}
    return Group(tuple(layers), tuple(members), moments)
