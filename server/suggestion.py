"""What an inspection suggests for a stack: a method, an order, weights by part of the base, and why.

A rule over the numbers of `compose.interference`, before anything is rendered:

    nobody is heard half as loudly as who lives there     the plain sum
    two are one and the same                              the later one is left out
    two take each other back                              the plain sum: any other method would keep both
    one is drowned twice as much as anybody else          `orthogonal`, the drowned first
    they drown each other alike                           `tsv`, which makes room on all sides

Of pocket's pairs `tsv` leaves most, of the methods that silence nobody (tests/bench/pocket_compose). Weights
stay as they were asked for, but in a part where one is out of all proportion to how loud it is elsewhere:
whoever is a little louder in a block or in the text encoder, halved there, was silenced on pocket. No rule is
right about every stack: `server.choosing` tries this one beside others, and pictures decide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compose.interference import Report
from compose.methods import Parameters
from compose.weights import Weight
from server.pinned import Pinned

LOUD, SAME, FAR, COSTLY = 0.5, 0.9, 2.0, 0.5
"""Of loudness; of the cosine of two updates; of one loudness over another; of an update that is kept."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A method with what it is told, places of the stack in order of priority, weights by place, and why."""

    method: str
    order: tuple[int, ...]
    weights: tuple[Weight, ...]
    reason: str

    @property
    def parameters(self) -> Parameters:
        """The method's own defaults."""
        return Parameters()

    def told(self, stack: Sequence[Pinned]) -> dict[str, object]:
        """For a recipe, the stack as it is written on a command line."""
        refs = [f"{stack[i].version.ref}={str(self.weights[i]).replace(',', '/')}" for i in self.order]
        return {"method": self.method, "stack": refs, "reason": self.reason}

    def stack(self, stack: Sequence[Pinned]) -> tuple[Pinned, ...]:
        """Of a stack, in its order, at these weights."""
        return tuple(replace(p, weight=w) for p, w in zip(stack, self.weights, strict=True))


def suggest(report: Report, stack: Sequence[Pinned]) -> Suggestion:
    """For a stack of adapters and what was measured of it."""
    names = [p.version.ref for p in stack]
    weights = [p.weight for p in stack]
    voices, why = [i for i in range(len(stack)) if report.norm(i)], []
    for i, j in pairs(voices):
        if i < j and report.cosine(i, j) <= -SAME:
            return _plain(weights, f"{names[i]} and {names[j]} take each other back")
    for i, j in pairs(voices):
        if i < j and {i, j} <= set(voices) and report.cosine(i, j) >= SAME:
            weights[j] = replace(weights[j], value=0.0)
            voices.remove(j)
            why.append(f"{names[j]} is one and the same as {names[i]}, and adds up with it: leave it out")
    if len(voices) < 2:
        alone = f"nobody else speaks beside {names[voices[0]]}" if voices else "nobody changes anything"
        return _plain(weights, "; ".join((*why, alone)))
    drowned = {
        i: max((finite(report.crosstalk(i, j)), j) for j in voices if i != j) for i in voices
    }  # how loudly, and by whom
    first, second = sorted(voices, key=lambda i: -drowned[i][0])[:2]
    loudest, by = drowned[first]
    if loudest < LOUD:
        heard = f"nobody is heard more than {loudest:.2f} times as loudly as who lives there"
        return _plain(weights, "; ".join((*why, heard)))
    told = f"{names[by]} answers {loudest:.2f} times as loudly as {names[first]} where that lives"
    order = sorted(range(len(stack)), key=lambda i: -drowned[i][0] if i in drowned else math.inf)
    if loudest >= FAR * drowned[second][0]:
        cost, dearest = min((report.apart(i), i) for i in order if i in drowned and i != first)
        if cost < COSTLY:
            why.append(f"{told}, but to keep out of its way would leave {cost:.0%} of {names[dearest]}")
            return _plain(weights, "; ".join(why), "the plain sum keeps more")
        method = "orthogonal"
        why.append(
            f"{told}, and nobody else is drowned like it: it comes first, the others keep out of its inputs, "
            f"which leaves at least {cost:.0%} of each"
        )
    else:
        method = "tsv"
        also = f"{names[second]} is drowned alike ({drowned[second][0]:.2f} times)"
        why.append(f"{told}, and {also}: all make room")
    for j in voices:
        meetings = [(i, part) for i in voices if i != j for part in report.parts]
        loudness, i, part = max((finite(report.crosstalk(i, j, part)), i, part) for i, part in meetings)
        elsewhere = finite(report.crosstalk_elsewhere(i, j, part))
        if elsewhere > 0 and loudness >= max(1.0, FAR * elsewhere):
            weights[j] = scaled(weights[j], said(part), elsewhere / loudness)
            often = f"{loudness:.2f} times as loudly as {names[i]}, and {elsewhere:.2f} times elsewhere"
            why.append(f"{names[j]} less in {said(part)}, where it answers {often}")
    return Suggestion(method, tuple(order), tuple(weights), "; ".join(why))


def _plain(weights: Sequence[Weight], reason: str, so: str = "the plain sum will do") -> Suggestion:
    return Suggestion("naive", tuple(range(len(weights))), tuple(weights), f"{reason}: {so}")


def pairs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Every ordered pair of two."""
    return [(i, j) for i in places for j in places if i != j]


def finite(value: float) -> float:
    """A loudness, below all others where the one that lives there says nothing."""
    return value if math.isfinite(value) else -1.0


def said(part: str) -> str:
    """A part of the base, or the least that holds it, as a weight names it: `unet.up_blocks.1` for
    `unet.up_blocks.1 attn2`.
    """
    place, *kind = part.split()
    return ".".join((place, *kind)) if kind and "." not in place else place


def scaled(weight: Weight, part: str, factor: float) -> Weight:
    """`factor` times as strong in a part, of two digits."""
    parts = dict(weight.parts)
    return Weight.of_parts(weight.value, parts | {part: float(f"{parts.get(part, 1.0) * factor:.2g}")})
