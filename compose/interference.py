"""Who fights whom, and where, before anyone renders.

For adapters i and j of a stack and the inputs x that layer l really sees while i is rendered alone (G_i, see
`compose.moments`):

    crosstalk_ij = sqrt( sum_l E ||w_j DW_j x||^2 / sum_l E ||w_i DW_i x||^2 )        x ~ G_i

how loudly j answers where i lives, against i's own voice: 0 is silence, 1 as loud as i itself. Sums run over
the layers of a part of the base, or over all. Where i was not calibrated, x is taken from the row space of
A_i, all directions alike, which says little (two published adapters were orthogonal to 0.02 there and fought
all the same). Everything comes from Grams of the size of the ranks; no update is formed.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compose.factors import Spectrum, spectrum, squared_norm
from compose.groups import Adapter, Group, Member, group
from compose.moments import Moment

ALL = ""
"""The part that is the whole base."""

_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block|\w*transformer_blocks|\w+_blocks|layers)(?:\.(\d+))?")
_KIND = re.compile(r"\.(attn1|attn2|attn|self_attn|ff\w*|mlp|norm\w*|proj\w*|conv\w*)(?:\.|$)")

Place = tuple[str, int]
"""A part of the base, and an adapter's place in the stack."""

Meeting = tuple[str, int, int]
"""A part, the place of the adapter that lives there, and that of the one that answers."""


@dataclass(frozen=True, slots=True)
class Report:
    """Sums over the layers of every part, and of all (`ALL`): by place the squared weighted norms and the
    energy on the adapter's own inputs; by meeting the other's energy there, and the largest cosines of
    principal angles between input and between output spaces; by pair the inner product. `calibrated`:
    whose inputs were measured.
    """

    calibrated: tuple[bool, ...]
    layers: tuple[frozenset[str], ...]
    squares: Mapping[Place, float]
    own: Mapping[Place, float]
    other: Mapping[Meeting, float]
    cosines: Mapping[Meeting, tuple[float, float]]
    inner: Mapping[tuple[int, int], float]

    @property
    def parts(self) -> list[str]:
        """Every part that an adapter changes."""
        return sorted({part for part, _ in self.squares} - {ALL})

    def norm(self, i: int, part: str = ALL) -> float:
        """||w_i DW_i||_F over the layers of a part."""
        return math.sqrt(self.squares.get((part, i), 0.0))

    def crosstalk(self, i: int, j: int, part: str = ALL) -> float:
        """How loudly j answers where i lives, against i's own voice there; infinity where i says nothing."""
        own, other = self.own.get((part, i), 0.0), self.other.get((part, i, j), 0.0)
        return math.sqrt(other / own) if own else (math.inf if other else 0.0)

    def cosine(self, i: int, j: int) -> float:
        """Between the updates of i and j over all layers."""
        norms = self.norm(i) * self.norm(j)
        return max(-1.0, min(1.0, self.inner.get((i, j), 0.0) / norms)) if norms else 0.0

    def coherence(self) -> float:
        """||sum_i w_i DW_i|| / sum_i ||w_i DW_i||: 1 when all point one way, 1/sqrt(n) for n strangers of one
        size.
        """
        norms = [self.norm(i) for i in range(len(self.calibrated))]
        total = sum(norm**2 for norm in norms) + sum(self.inner.values())
        return math.sqrt(max(0.0, total)) / sum(norms) if any(norms) else 0.0


def part_of(layer: str) -> str:
    """The part of the base that a layer belongs to, as one would say it: `unet.up_blocks.1 attn2`,
    `text_encoder`.
    """
    component, path = layer.split(".", 1)
    if component.startswith("text_encoder"):
        return component
    block, kind = _BLOCK.match(path), _KIND.search(f".{path}")
    name = component + (f".{block[0]}" if block else "")
    return f"{name} {kind[1]}" if kind else name


def interference(stack: Sequence[Adapter], device: torch.device | str = "cpu") -> Report:
    """Measures a weighted stack. Raises InvalidRequest for a DoRA."""
    squares: dict[Place, float] = defaultdict(float)
    own: dict[Place, float] = defaultdict(float)
    other: dict[Meeting, float] = defaultdict(float)
    cosines: dict[Meeting, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    inner: dict[tuple[int, int], float] = defaultdict(float)
    for batch in group(stack, device):
        parts = [part_of(layer) for layer in batch.layers]
        members = {m.index: m for m in batch.members}
        spectra = {m.index: spectrum(m.up, m.down) for m in batch.members}
        for i, member in members.items():
            _add(squares, parts, (i,), squared_norm(member.up, member.down) * member.weight.double().square())
        for i in sorted({*members, *batch.moments}):
            lives = _inputs(batch, i, spectra)
            if i in members:
                _add(own, parts, (i,), _energy(lives, members[i]))
            for j in members.keys() - {i}:
                _add(other, parts, (i, j), _energy(lives, members[j]))
                if i in members:
                    inner[i, j] += float(_inner(members[i], members[j]).sum())
                    angles = zip(parts, _angles(spectra[i], spectra[j]), strict=True)
                    for part, (inputs, outputs) in angles:
                        for where in (part, ALL):
                            seen = cosines[where, i, j]
                            cosines[where, i, j] = (max(seen[0], inputs), max(seen[1], outputs))
    return Report(
        tuple(bool(a.moments) for a in stack),
        tuple(frozenset(a.layers) for a in stack),
        squares,
        own,
        other,
        cosines,
        inner,
    )


def _add(sums: dict[Any, float], parts: Sequence[str], who: tuple[int, ...], values: Tensor) -> None:
    for part, value in zip(parts, values.tolist(), strict=True):
        sums[(part, *who)] += value
        sums[(ALL, *who)] += value


def _inputs(batch: Group, i: int, spectra: Mapping[int, Spectrum]) -> Moment:
    """G_i; without a calibration the row space of A_i, all directions alike."""
    if found := batch.moments.get(i):
        return found
    right = spectra[i].right
    return Moment(torch.zeros_like(right[:, 0]), right.mT)


def _energy(G: Moment, member: Member) -> Tensor:
    return G.energy(member.up, member.down) * member.weight.double().square()


def _angles(a: Spectrum, b: Spectrum) -> list[tuple[float, float]]:
    """By layer, the cosines of the smallest principal angles between input and between output spaces."""
    inputs = torch.linalg.matrix_norm(a.right @ b.right.mT, 2)
    outputs = torch.linalg.matrix_norm(a.left.mT @ b.left, 2)
    return list(zip(inputs.tolist(), outputs.tolist(), strict=True))


def _inner(a: Member, b: Member) -> Tensor:
    """<w_a DW_a, w_b DW_b> per layer, `[L]`."""
    ups = a.up.double().mT @ b.up.double()
    downs = a.down.double() @ b.down.double().mT
    found: Tensor = (ups * downs).sum((1, 2)) * (a.weight * b.weight).double()
    return found
