"""A stack, batched: layers of one shape, changed by the same adapters with the same ranks, in parts that have
the same weights, are one `Group`.

Its members are parts of two tensors, all ups side by side and all downs one below the other. What was
computed from them and not from their weights is kept (`once`): when only a weight changes, that part is there
already.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from compose.errors import InvalidRequest
from compose.factors import Core, Factors, core
from compose.memo import Memo
from compose.moments import Moment, stacked
from compose.weights import AS_TRAINED, Weight

CHUNK_BYTES = 192 << 20
"""Factors and moments of one batch, float32. With its workspace a batch takes a few times as much."""

FINISHED = -1
"""The place of a member that is the sum of all: its weight is 1."""

T = TypeVar("T")
_Kind = tuple[tuple[tuple[int, int, int, int], ...], tuple[int, ...], tuple[tuple[str, ...], ...]]


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


Joined = tuple[Tensor, Tensor]
"""All ups side by side, `[L, d, R]`, and all downs one below the other, `[L, R, k]`."""


def nobody_asks() -> None:
    """A check that never raises."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of one shape with the members that change them, in the order of the stack, all of them together
    as up `[L, d, R]` and down `[L, R, k]`, and the group's place among the groups; `moments` by place in the
    stack, of every calibrated adapter whether or not it changes these layers, each stacked anew when it is
    asked for. `check` raises when nobody wants the merge any more: whoever works long on a group calls it in
    between.
    """

    layers: tuple[str, ...]
    members: tuple[Member, ...]
    up: Tensor
    down: Tensor
    place: int
    memo: Memo
    moments: Mapping[int, Moment] = field(default_factory=dict)
    check: Callable[[], None] = nobody_asks

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """`compute()`, kept where there is room. It must not depend on the weights."""
        return self.memo.once(key, self.place, compute, besides=(self.up, self.down))

    def weighted(self, weights: Sequence[Weight]) -> "Group":
        """The same group under other weights."""
        members = tuple(
            replace(m, weight=_weights(self.layers, weights[m.index], m.up.device)) for m in self.members
        )
        return replace(self, members=members)

    def packed(self, members: Sequence[Member]) -> tuple[tuple[Member, ...], Joined]:
        """Members as parts of one tensor a side, and these: the group's own where they are."""
        ups, downs = [m.up for m in members], [m.down for m in members]
        same_ups, same_downs = (
            _same(ups, [m.up for m in self.members]),
            _same(downs, [m.down for m in self.members]),
        )
        up = self.up if same_ups else _joined(ups, 2)
        down = self.down if same_downs else _joined(downs, 1)
        ranks = [m.up.shape[2] for m in members]
        parts = zip(
            members,
            ups if same_ups else torch.split(up, ranks, 2),
            downs if same_downs else torch.split(down, ranks, 1),
            strict=True,
        )
        return tuple(replace(m, up=own_up, down=own_down) for m, own_up, own_down in parts), (up, down)

    def summed(self, members: Sequence[Member], joined: Joined | None) -> tuple[Tensor, Tensor]:
        """The weighted sum of members, exactly: up `[L, d, R]`, down `[L, R, k]` with the weights on `down`,
        R the summed rank. `joined` as `packed` gives it.
        """
        up, down = joined or self.packed(members)[1]
        return up, down if members[0].index == FINISHED else down * _columns(members).unsqueeze(-1)

    def core(
        self, members: Sequence[Member], key: object, *, exact: bool, joined: Joined | None = None
    ) -> tuple[Core, Tensor]:
        """The core of `members`, kept under `key` unless that is None; their weights by column, `[L, R]`.
        `joined` as `packed` gives it.
        """

        def compute() -> Core:
            return core(*(joined or self.packed(members)[1]), exact=exact)

        if key is None:
            return compute(), _columns(members)
        return self.once(("core", key, exact), compute), _columns(members)


def _columns(members: Sequence[Member]) -> Tensor:
    return torch.cat([m.weight.unsqueeze(-1).expand(-1, m.up.shape[2]) for m in members], dim=1)


def _same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(a is b for a, b in zip(tensors, others, strict=True))


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _weights(layers: Sequence[str], weight: Weight, device: torch.device) -> Tensor:
    return torch.tensor([weight.of(layer) for layer in layers], dtype=torch.float32, device=device)


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


def nbytes(stack: Sequence[Adapter], who: Mapping[str, Active]) -> int:
    """What all groups of a stack hold, in float32; `who` is what `active` found. Reads no layer of a file."""
    shapes = (shape_of(stack[i].layers, layer) for layer, (indices, _) in who.items() for i in indices)
    return sum(4 * r * (d + k) for d, r, k in shapes)


def group(
    stack: Sequence[Adapter],
    device: torch.device | str = "cpu",
    memo: Memo | None = None,
    who: Mapping[str, Active] | None = None,
) -> Iterator[Group]:
    """The stack's layers in batches of at most about CHUNK_BYTES, read as they are asked for; `memo` keeps
    what is computed from them, `who` is what `active` found. Raises InvalidRequest for a DoRA layer: it is no
    product of factors.
    """
    device, memo, place = torch.device(device), memo or Memo(0), 0
    pools: dict[_Kind, list[str]] = {}
    for layer, (indices, calibrated) in (active(stack) if who is None else who).items():
        shapes = tuple((i, *shape_of(stack[i].layers, layer)) for i in indices)
        parts = tuple(stack[i].weight.parts_of(layer) for i in indices)
        pools.setdefault((shapes, calibrated, parts), []).append(layer)
    for (shapes, calibrated, _), layers in pools.items():
        measured = [stack[i].moments[layers[0]] for i in calibrated]
        a_layer = sum(4 * r * (d + k) for _, d, r, k in shapes)
        a_layer += sum(4 * (m.diagonal.numel() + m.factor.numel()) for m in measured)
        size = max(1, CHUNK_BYTES // a_layer)
        for start in range(0, len(layers), size):
            batch = layers[start : start + size]
            members, up, down = _batch(stack, batch, shapes, device)
            moments = _Stacked({i: stack[i].moments for i in calibrated}, batch, device)
            yield Group(tuple(batch), members, up, down, place, memo, moments)
            place += 1


class _Stacked(Mapping[int, Moment]):
    """The moments of a batch's layers by place in the stack, stacked whenever one is asked for: they take as
    much memory as factors do, and are needed once.
    """

    def __init__(
        self, own: Mapping[int, Mapping[str, Moment]], layers: Sequence[str], device: torch.device
    ) -> None:
        self._own, self._layers, self._device = own, layers, device

    def __getitem__(self, place: int) -> Moment:
        own = self._own[place]
        return stacked([own[layer] for layer in self._layers], self._device)

    def __iter__(self) -> Iterator[int]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def shape_of(layers: Mapping[str, Factors], name: str) -> tuple[int, int, int]:
    """d, r, k of an adapter's layer; without reading the layer where a file's mapping can tell."""
    told = getattr(layers, "shape", None)
    if told is not None:
        found: tuple[int, int, int] = told(name)
        return found
    factors = layers[name]
    d, k = factors.shape
    return d, factors.rank, k


def _plain(stack: Sequence[Adapter], layer: str, places: Sequence[int]) -> list[Factors]:
    """A layer of each adapter. Raises InvalidRequest for a DoRA layer."""
    found = [stack[i].layers[layer].formed() for i in places]
    if any(factors.magnitude is not None for factors in found):
        raise InvalidRequest(
            f"{layer!r} is a DoRA layer, which is not merged in factor space: its effect depends on "
            "the base's weights; render it in a stack with the method naive",
            field="stack",
        )
    return found


def _lies_on_a_gpu(layers: Mapping[str, Factors], layer: str) -> bool:
    return isinstance(layers, dict) and layers[layer].held[0].is_cuda


def _batch(
    stack: Sequence[Adapter],
    layers: Sequence[str],
    shapes: Sequence[tuple[int, int, int, int]],
    device: torch.device,
) -> tuple[tuple[Member, ...], Tensor, Tensor]:
    _, d, _, k = shapes[0]
    ranks = [r for _, _, r, _ in shapes]
    read = (_plain(stack, layer, [i for i, *_ in shapes]) for layer in layers)
    if all(_lies_on_a_gpu(stack[i].layers, layers[0]) for i, *_ in shapes):  # launches cost more than a copy
        columns = list(zip(*read, strict=True))
        ups = torch.cat([torch.stack([f.up for f in column]) for column in columns], 2)
        downs = torch.cat([torch.stack([f.down for f in column]) for column in columns], 1)
    else:
        ups = downs = torch.empty(0)
        for place, found in enumerate(read):
            where = found[0].up.device  # a server keeps factors on its device, a file has them in memory
            if not place:
                ups = torch.empty(len(layers), d, sum(ranks), device=where)
                downs = torch.empty(len(layers), sum(ranks), k, device=where)
            torch.cat([factors.up.to(where) for factors in found], 1, out=ups.select(0, place))
            torch.cat([factors.down.to(where) for factors in found], 0, out=downs.select(0, place))
    ups, downs = ups.to(device), downs.to(device)
    members = [
        Member(i, up, down, _weights(layers, stack[i].weight, device))
        for (i, *_), up, down in zip(
            shapes, torch.split(ups, ranks, 2), torch.split(downs, ranks, 1), strict=True
        )
    ]
    return tuple(members), ups, downs
