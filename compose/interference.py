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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.factors import spectrum, squared_norm
from compose.groups import Adapter, Group, Member, group
from compose.moments import Moment

_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block|\w*transformer_blocks|\w+_blocks|layers)(?:\.(\d+))?")
_KIND = re.compile(r"\.(attn1|attn2|attn|self_attn|ff\w*|mlp|norm\w*|proj\w*|conv\w*)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Meeting:
    """Adapters i and j in one layer: E||w_i DW_i x||^2 and E||w_j DW_j x||^2 on i's inputs, <w_i DW_i, w_j
    DW_j>, the cosines of the smallest principal angles between their input and their output spaces.
    """

    layer: str
    i: int
    j: int
    own: float
    other: float
    inner: float
    input_cosine: float
    output_cosine: float


@dataclass(frozen=True, slots=True)
class Report:
    """All meetings of a stack, and each adapter's squared weighted norms by layer. `calibrated`: whose inputs
    were measured.
    """

    calibrated: tuple[bool, ...]
    squares: tuple[Mapping[str, float], ...]
    meetings: tuple[Meeting, ...]

    def norm(self, i: int, within: Callable[[str], bool] = lambda _: True) -> float:
        """||w_i DW_i||_F over the layers within a part."""
        return math.sqrt(sum(square for layer, square in self.squares[i].items() if within(layer)))

    def crosstalk(self, i: int, j: int, within: Callable[[str], bool] = lambda _: True) -> float:
        """How loudly j answers where i lives, against i's own voice there; infinity where i says nothing."""
        own = other = 0.0
        for meeting in self.meetings:
            if (meeting.i, meeting.j) == (i, j) and within(meeting.layer):
                own, other = own + meeting.own, other + meeting.other
        return math.sqrt(other / own) if own else (math.inf if other else 0.0)

    def cosine(self, i: int, j: int) -> float:
        """Between the updates of i and j over all layers."""
        norms = self.norm(i) * self.norm(j)
        inner = sum(m.inner for m in self.meetings if (m.i, m.j) == (i, j))
        return max(-1.0, min(1.0, inner / norms)) if norms else 0.0

    def coherence(self) -> float:
        """||sum_i w_i DW_i|| / sum_i ||w_i DW_i||: 1 when all point one way, 1/sqrt(n) for n strangers of one
        size.
        """
        squares = sum(self.norm(i) ** 2 for i in range(len(self.squares)))
        total = squares + sum(m.inner for m in self.meetings)
        norms = sum(self.norm(i) for i in range(len(self.squares)))
        return math.sqrt(max(0.0, total)) / norms if norms else 0.0

    def layers(self) -> list[str]:
        """Every layer that an adapter changes."""
        return list(dict.fromkeys(layer for squares in self.squares for layer in squares))


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
    """Measures a weighted stack."""
    squares: tuple[dict[str, float], ...] = tuple({} for _ in stack)
    meetings: list[Meeting] = []
    for batch in group(stack, device):
        for member in batch.members:
            weighted = squared_norm(member.up, member.down) * member.weight.double().square()
            squares[member.index].update(zip(batch.layers, weighted.tolist(), strict=True))
        meetings += _meetings(batch)
    return Report(tuple(bool(a.moments) for a in stack), squares, tuple(meetings))


def _meetings(batch: Group) -> Iterable[Meeting]:
    spectra = {m.index: spectrum(m.up, m.down) for m in batch.members}
    members = {m.index: m for m in batch.members}
    for i in sorted({*members, *batch.moments}):
        G = batch.moments.get(i)
        if G is None:
            right = spectra[i].right
            G = Moment(torch.zeros_like(right[:, 0]), right.mT)
        nothing = torch.zeros(len(batch.layers), dtype=torch.float64)
        own = _energy(G, members[i]) if i in members else nothing
        for j, other in members.items():
            if j == i:
                continue
            told = [own, _energy(G, other), nothing, nothing, nothing]
            if i in members:
                mine, theirs = spectra[i], spectra[j]
                told[2] = _inner(members[i], other)
                told[3] = torch.linalg.matrix_norm(mine.right @ theirs.right.mT, 2)
                told[4] = torch.linalg.matrix_norm(mine.left.mT @ theirs.left, 2)
            rows = torch.stack([t.cpu() for t in told], dim=1).tolist()
            for layer, row in zip(batch.layers, rows, strict=True):
                yield Meeting(layer, i, j, *row)


def _energy(G: Moment, member: Member) -> Tensor:
    return G.energy(member.up, member.down) * member.weight.double().square()


def _inner(a: Member, b: Member) -> Tensor:
    """<w_a DW_a, w_b DW_b> per layer, `[L]`."""
    ups = a.up.double().mT @ b.up.double()
    downs = a.down.double() @ b.down.double().mT
    found: Tensor = (ups * downs).sum((1, 2)) * (a.weight * b.weight).double()
    return found
