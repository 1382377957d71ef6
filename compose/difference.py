"""How far two adapters are apart, layer by layer; without forming an update, but of DoRA layers.

<B A, D C> = sum((B' D) * (A C'))          Frobenius inner product of up·down pairs, in the summed rank

What a DoRA adds to a layer depends on the layer: it is formed, [d, k], from the base's weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.arenas import decomposed, needs_forming
from compose.errors import InvalidRequest
from compose.factors import Factors, inner
from compose.formats.products import inner_product
from compose.groups import Adapter, Member, group


@dataclass(frozen=True, slots=True)
class Change:
    """One layer: the Frobenius norms of both updates and of their difference, and the cosine between them (0
    where one is absent or zero).
    """

    layer: str
    before: float
    after: float
    change: float
    cosine: float


def differences(
    before: Mapping[str, Factors],
    after: Mapping[str, Factors],
    *,
    golden: Callable[[str], Tensor] | None = None,
) -> list[Change]:
    """Every layer of either, in order of first appearance; float64. `golden` gives a layer's weight `[d, k]`
    in the base, which only DoRA layers need. Raises InvalidRequest for one without.
    """
    apart = dict.fromkeys(n for side in (before, after) for n, f in side.items() if needs_forming(f))
    found: dict[str, Change] = {}
    for layer in apart:
        pair = before.get(layer), after.get(layer)
        if not any(factors and factors.magnitude is not None for factors in pair):
            found[layer] = _of_products(layer, *pair)
            continue
        if golden is None:
            raise InvalidRequest(
                f"{layer!r} is a DoRA layer: what it adds depends on the base's weights, which are not here",
                field="before",
            )
        found[layer] = _dense(layer, *pair, golden(layer))
    plain = [Adapter({n: f for n, f in side.items() if n not in apart}) for side in (before, after)]
    for batch in group(plain):
        members = {member.index: member for member in batch.members}
        zero = torch.zeros(len(batch.layers), dtype=torch.float64)
        aa, bb, ab = (
            _inner(members[i], members[j]) if i in members and j in members else zero
            for i, j in ((0, 0), (1, 1), (0, 1))
        )
        for layer, *numbers in zip(batch.layers, aa.tolist(), bb.tolist(), ab.tolist(), strict=True):
            found[layer] = change(layer, *numbers)
    return [found[layer] for layer in dict.fromkeys([*before, *after])]


def change(layer: str, squared_before: float, squared_after: float, product: float) -> Change:
    """A change from squared norms and the inner product."""
    norms = (squared_before * squared_after) ** 0.5
    return Change(
        layer,
        squared_before**0.5,
        squared_after**0.5,
        max(squared_before + squared_after - 2 * product, 0.0) ** 0.5,
        max(-1.0, min(1.0, product / norms)) if norms else 0.0,
    )


def total(changes: list[Change]) -> Change:
    """The same of all layers together."""
    a, b = (sum(getattr(c, side) ** 2 for c in changes) for side in ("before", "after"))
    return change("", a, b, sum(c.cosine * c.before * c.after for c in changes))


def _inner(a: Member, b: Member) -> Tensor:
    """`[L]`"""
    return inner(a.up, a.down, b.up, b.down)


def _of_products(layer: str, before: Factors | None, after: Factors | None) -> Change:
    pairs = (before, before), (after, after), (before, after)
    return change(layer, *(inner_product(one, other) if one and other else 0.0 for one, other in pairs))


def _dense(layer: str, before: Factors | None, after: Factors | None, golden: Tensor) -> Change:
    one, other = (_update(factors, golden) for factors in (before, after))
    aa, bb, ab = (
        float((x * y).sum(dtype=torch.float64)) for x, y in ((one, one), (other, other), (one, other))
    )
    return change(layer, aa, bb, ab)


def _update(factors: Factors | None, golden: Tensor) -> Tensor:
    """What is added to the weight, `[d, k]`."""
    if factors is None:
        return torch.zeros_like(golden)
    if factors.magnitude is None:
        return factors.onto(torch.zeros_like(golden))
    return decomposed(golden, factors) - golden
