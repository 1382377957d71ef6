"""A weighted stack -> one adapter, by any method, the same numbers whether it is baked or applied.

    prepared = Prepared(stack)                       # batches by shape; keeps what no weight changes
    merged = prepared.merge(weights, method="svd", parameters=Parameters(rank=16))

`merge` is both at once. Memory: a stack larger than KEPT_BYTES is read, merged and let go a batch at a time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from compose.errors import InvalidRequest, NonFinite
from compose.factors import Eigen, Factors, Layers, cut, decompose, problem, squared_norm
from compose.formats.products import Product, products
from compose.groups import Adapter, Group, Member, active, group, nbytes, shape_of
from compose.lapack import eigh
from compose.memo import Memo
from compose.methods import METHODS, Method, Parameters
from compose.methods.method import Outcome
from compose.methods.naive import naive
from compose.schedule import MODES
from compose.weights import Weight

STACK_LIMIT = 16
RANK_LIMIT = 1024
KEPT_BYTES = 2 << 30
"""Factors beyond which a prepared stack keeps nothing between merges."""

RESULTS_BYTES = 5 << 28
"""Of what it keeps besides: what the last methods and parameters come to as far as no weight matters."""

POSED_BYTES = 256 << 20
"""Of eigenproblems that are solved at once."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge: its layers, the share of each member's norm that its projection kept (None where the method
    has no such number), and the relative truncation error.
    """

    layers: dict[str, Factors]
    kept: tuple[float | None, ...]
    truncation_error: float


def check(
    weights: Sequence[Weight],
    method: str,
    parameters: Parameters,
    *,
    modes: Mapping[str, Method] = MappingProxyType({}),
) -> None:
    """Raises InvalidRequest for what `merge` cannot do, before any work; `modes` are ways to render that are
    allowed, too.
    """
    if not 1 <= len(weights) <= STACK_LIMIT:
        raise InvalidRequest(f"a stack holds 1 to {STACK_LIMIT} adapters, not {len(weights)}", field="stack")
    for weight in weights:
        weight.check()
    known = {**METHODS, **modes}
    if method in MODES and not modes:
        raise InvalidRequest(
            f"{method!r} is a way to render a stack, not to merge it; render with it", field="method.name"
        )
    if method not in known:
        raise unknown(method, known)
    for name in sorted(parameters.given() - known[method].parameters):
        raise InvalidRequest(f"the method {method!r} takes no {name}; leave it out", field=f"method.{name}")
    parameters.check(RANK_LIMIT)


def unknown(method: str, known: Iterable[str]) -> InvalidRequest:
    """The error for a method that is none of the known ones."""
    return InvalidRequest(f"unknown method {method!r}; there are {', '.join(known)}", field="method.name")


def merge(
    stack: Sequence[Adapter],
    *,
    method: str = "naive",
    parameters: Parameters | None = None,
    device: torch.device | str = "cpu",
    check: Callable[[], None] | None = None,
) -> Merged:
    """Merges a weighted stack. For ordered methods the order is the priority. `check` is called before every
    batch of layers, and every layer that a dense method forms; what it raises stops the merge. Raises
    InvalidRequest, NonFinite.
    """
    prepared, weights = Prepared(stack, device=device), [a.weight for a in stack]
    return prepared.merge(weights, method=method, parameters=parameters or Parameters(), check=check)


@contextmanager
def _finite() -> Iterator[None]:
    """What a decomposition of NaN or infinity says, in our words."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # its stub forgets it
        raise NonFinite(
            "merged like this the stack comes to numbers beyond float32: one of its adapters went wrong in "
            "training, or weighs too much; atelier inspect says how strong each is"
        ) from error


@dataclass(frozen=True, slots=True)
class _Told:
    """A method, its parameters, and the weights of a batch's members, layer by layer."""

    method: str
    parameters: Parameters
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """What a batch came to, and was told; whether it was work."""

    told: _Told
    results: list[Factors]
    lost: float
    total: float
    norms: tuple[tuple[int, float, float], ...]
    worth: bool


@dataclass(frozen=True, slots=True)
class _Posed:
    """What a batch comes to once its eigenproblems `[L, R, R]` are solved."""

    problem: Tensor
    finish: Callable[[Eigen], _Part]


class Prepared:
    """A stack in batches, with what was computed from it and from no weight, and what the last merge came to
    where its weights stay; within `kept` and `results` bytes. Not thread-safe.
    """

    def __init__(
        self,
        stack: Sequence[Adapter],
        *,
        device: torch.device | str = "cpu",
        kept: int = KEPT_BYTES,
        results: int = RESULTS_BYTES,
    ) -> None:
        self._stack = tuple(stack)
        self._device, self._kept = device, kept
        self._groups: list[Group] = []
        self._held = 0
        self._keeps = False
        self._active: object = None
        self._memo = Memo(results)
        self._last: dict[int, _Part] = {}
        self._last_bytes = 0

    def nbytes(self) -> int:
        """What it keeps between merges besides the adapters it was given."""
        return self._held + self._memo.nbytes + self._last_bytes

    @_finite()
    def merge(
        self,
        weights: Sequence[Weight],
        *,
        method: str,
        parameters: Parameters,
        check: Callable[[], None] | None = None,
    ) -> Merged:
        """The stack under these weights; `check` as in `merge`. A merge that it stopped leaves nothing half
        made behind. Raises InvalidRequest, NonFinite.
        """
        how = self._possible(weights, method, parameters)
        rank = parameters.rank
        if method == "svd" and rank is None and parameters.energy is None and parameters.ratio is None:
            rank = _largest_rank(self._stack, weights)
        parameters = replace(parameters, rank=rank)
        layers = Layers()
        before, after = [0.0] * len(weights), [0.0] * len(weights)
        lost = total = 0.0
        now: dict[int, _Part] = {}
        for name, found, cut_off, whole in self._cut_products(weights, method, parameters, check):
            layers[name] = found
            lost, total = lost + cut_off, total + whole
        for batch, part in self._merged(how, method, parameters, weights, check, without=set(layers)):
            now[batch.place] = part
            for index, old, new in part.norms:
                before[index] += old
                after[index] += new
            lost, total = lost + part.lost, total + part.total
            layers.update(zip(batch.layers, part.results, strict=True))
        self._keep(now)
        shares = (math.sqrt(new / old) if old else 1.0 for old, new in zip(before, after, strict=True))
        kept = tuple(shares) if how.separable else (None,) * len(weights)
        return Merged(layers, kept, math.sqrt(lost / total) if total else 0.0)

    def _keep(self, now: dict[int, _Part]) -> None:
        """What a merge came to, batch by batch, for the next one: in the room that is left, and not what
        costs nothing.
        """
        parts = {place: part for place, part in now.items() if self._groups and part.worth}
        size = sum(f.up.nbytes + f.down.nbytes for part in parts.values() for f in part.results)
        fits = self._memo.nbytes + size <= self._memo.limit
        self._last, self._last_bytes = (parts, size) if fits else ({}, 0)

    def _possible(self, weights: Sequence[Weight], method: str, parameters: Parameters) -> Method:
        check(weights, method, parameters)
        how = METHODS[method]
        acting = [i for i, weight in enumerate(weights) if weight.value]
        place = next((i for i in acting if not self._stack[i].moments), None)
        if how.calibrated and len(acting) > 1 and place is not None:
            raise InvalidRequest(
                f"{method!r} needs measured activations, and adapter {place + 1} of the stack has none; "
                "calibrate it first (atelier calibrate)",
                field="method.name",
            )
        return how

    def _cut_products(
        self,
        weights: Sequence[Weight],
        method: str,
        parameters: Parameters,
        check: Callable[[], None] | None,
    ) -> Iterator[tuple[str, Factors, float, float]]:
        """Of one adapter alone the layers whose SVD follows from how they are stored; with the squared error
        and norm of each.
        """
        acting = [i for i, weight in enumerate(weights) if weight.value]
        if method != "svd" or len(acting) != 1:
            return
        adapter, weight = self._stack[acting[0]], weights[acting[0]]
        for name in products(adapter.layers):
            if check:
                check()
            factors = adapter.layers[name]
            assert isinstance(factors, Product)
            if s := factors.spectrum(
                weight.of(name), rank=parameters.rank, energy=parameters.energy, ratio=parameters.ratio
            ):
                (found,), lost, total = cut(s, energy=None, ratio=None)
                yield name, found, lost, total

    def _merged(
        self,
        how: Method,
        method: str,
        parameters: Parameters,
        weights: Sequence[Weight],
        check: Callable[[], None] | None,
        *,
        without: Set[str],
    ) -> Iterator[tuple[Group, _Part]]:
        """Every batch with what it comes to; several are solved at once where the stack is kept anyway."""
        waiting: list[tuple[Group, _Part | _Posed]] = []
        posed = 0
        for batch in self._batches(weights, without=without):
            if check:
                batch = replace(batch, check=check)
            batch.check()
            told = _Told(method, parameters, _weights(batch, weights))
            known = self._last.pop(batch.place, None)
            part = known if known and known.told == told else _part(how, batch, told)
            waiting.append((batch, part))
            posed += part.problem.nbytes if isinstance(part, _Posed) else 0
            if posed > POSED_BYTES or not self._keeps:
                yield from _solved(waiting)
                waiting, posed = [], 0
        yield from _solved(waiting)

    def _batches(self, weights: Sequence[Weight], *, without: Set[str] = frozenset()) -> Iterator[Group]:
        stack = [
            replace(adapter, weight=weight) for adapter, weight in zip(self._stack, weights, strict=True)
        ]
        who = {layer: places for layer, places in active(stack).items() if layer not in without}
        now = who, tuple(tuple(part for part, _ in weight.parts) for weight in weights)
        self._memo.begin()
        if self._active == now:
            yield from (kept.weighted(weights) for kept in self._groups)
            return
        self._active, self._groups, self._held = None, [], 0
        self._memo.clear()
        self._last, self._last_bytes = {}, 0
        groups, size = [], nbytes(stack, who)
        self._keeps = size <= self._kept
        if not self._keeps:
            yield from group(stack, self._device, who=who)
            return
        for batch in group(stack, self._device, self._memo, who):
            groups.append(batch)
            yield batch
        self._active, self._groups, self._held = now, groups, size


def _solved(batches: Sequence[tuple[Group, _Part | _Posed]]) -> Iterator[tuple[Group, _Part]]:
    """Batches, merged: those of one summed rank are solved together, which a GPU does in the time of one."""
    by_size: dict[int, list[_Posed]] = defaultdict(list)
    for _, part in batches:
        if isinstance(part, _Posed):
            by_size[part.problem.shape[-1]].append(part)
    found: dict[int, _Part] = {}
    for together in by_size.values():
        problems = [posed.problem for posed in together]
        values, vectors = eigh(problems[0] if len(problems) == 1 else torch.cat(problems))
        counts = [len(problem) for problem in problems]
        for posed, *eigen in zip(
            together, torch.split(values, counts), torch.split(vectors, counts), strict=True
        ):
            found[id(posed)] = posed.finish((eigen[0], eigen[1]))
    for batch, part in batches:
        yield batch, found[id(part)] if isinstance(part, _Posed) else part


def _weights(batch: Group, weights: Sequence[Weight]) -> tuple[tuple[float, ...], ...]:
    """Of the batch's members, layer by layer; a GPU is not asked for them."""
    return tuple(tuple(weights[m.index].of(layer) for layer in batch.layers) for m in batch.members)


def _part(how: Method, batch: Group, told: _Told) -> _Part | _Posed:
    """One batch, merged as far as it goes without an eigenproblem."""
    rank, energy, ratio = told.parameters.rank, told.parameters.energy, told.parameters.ratio
    measured = energy is not None or ratio is not None
    outcome = _outcome(how, told.method, batch, told.parameters)

    def part(results: list[Factors], lost: float, total: float, *, worth: bool = True) -> _Part:
        return _Part(told, results, outcome.lost + lost, outcome.total + total, outcome.norms, worth)

    if not measured and (rank is None or sum(m.up.shape[2] for m in outcome.members) <= rank):
        up, down = batch.summed(outcome.members, outcome.joined)
        results = [Factors(up[i], down[i]) for i in range(len(batch.layers))]
        whole = rank is not None and not outcome.total
        total = float(squared_norm(up, down).sum()) if whole else 0.0
        return part(results, 0.0, total, worth=not how.separable)
    if outcome.spectrum:
        return part(*cut(outcome.spectrum(rank), energy=energy, ratio=ratio))
    key = _shape_of(told.method, told.parameters) if how.separable else None
    core, columns = batch.core(outcome.members, key, exact=measured, joined=outcome.joined)

    def finish(eigen: Eigen) -> _Part:
        s = decompose(core, columns, rank=rank, split=True, single=True, eigen=eigen)
        return part(*cut(s, energy=energy, ratio=ratio))

    return _Posed(problem(core, columns), finish)


def _largest_rank(stack: Sequence[Adapter], weights: Sequence[Weight]) -> int:
    """Of the layers in which an adapter acts; of all if none does."""
    ranks = [
        (bool(weight.of(name)), shape_of(adapter.layers, name)[1])
        for adapter, weight in zip(stack, weights, strict=True)
        for name in adapter.layers
    ]
    return max((rank for acts, rank in ranks if acts), default=max((rank for _, rank in ranks), default=1))


def _shape_of(method: str, parameters: Parameters) -> tuple[str, Parameters]:
    """What the members of a separable method depend on."""
    return method, replace(parameters, rank=None, energy=None, ratio=None)


def _outcome(how: Method, name: str, batch: Group, parameters: Parameters) -> Outcome:
    if not how.separable or how.run is naive:
        return how.run(batch, parameters)

    def compute() -> Outcome:
        outcome = how.run(batch, parameters)
        norms = tuple(
            (new.index, _squares(old), _squares(old) if new is old else _squares(new))
            for old, new in zip(batch.members, outcome.members, strict=True)
        )
        members, joined = batch.packed(outcome.members)
        return replace(outcome, members=members, norms=norms, joined=joined)

    outcome = batch.once(_shape_of(name, parameters), compute)
    weights = {m.index: m.weight for m in batch.members}  # those kept have the weights they were made under
    return replace(outcome, members=tuple(replace(m, weight=weights[m.index]) for m in outcome.members))


def _squares(member: Member) -> float:
    return float(squared_norm(member.up, member.down).sum())
