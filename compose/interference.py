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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from compose.factors import Core, Spectrum, core, crossed, decompose
from compose.groups import Adapter, group, nobody_asks

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


def interference(
    stack: Sequence[Adapter],
    device: torch.device | str = "cpu",
    *,
    check: Callable[[], None] = nobody_asks,
) -> Report:
    """Measures a weighted stack. `check` is called before every batch of layers and every meeting in it;
    what it raises stops the work. Raises InvalidRequest for a DoRA.
    """
    squares: dict[Place, float] = defaultdict(float)
    own: dict[Place, float] = defaultdict(float)
    other: dict[Meeting, float] = defaultdict(float)
    cosines: dict[Meeting, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    products: dict[tuple[int, int], float] = defaultdict(float)
    for batch in group(stack, device):
        check()
        parts = [part_of(layer) for layer in batch.layers]
        members = {m.index: m for m in batch.members}
        cores = {m.index: core(m.up, m.down) for m in batch.members}
        bases = {i: _bases(own_core) for i, own_core in cores.items()}
        met = {(i, i): (c.root.mT @ c.root, c.gram) for i, c in cores.items()}
        for i, j in combinations(members, 2):
            check()
            ups, downs = crossed(members[i].up, members[i].down, members[j].up, members[j].down)
            met[i, j], met[j, i] = (ups, downs), (ups.mT, downs.mT)
        for (i, j), (ups, downs) in met.items():
            weights = (members[i].weight * members[j].weight).double()
            product = (ups * downs).sum((-2, -1)) * weights
            if i == j:
                _add(squares, parts, (i,), product.clamp_min(0))
                continue
            products[i, j] += float(product.sum())
            for part, (inputs, outputs) in zip(parts, _angles(bases[i], bases[j], ups, downs), strict=True):
                for where in (part, ALL):
                    seen = cosines[where, i, j]
                    cosines[where, i, j] = (max(seen[0], inputs), max(seen[1], outputs))
        for i in sorted({*members, *batch.moments}):
            found = batch.moments.get(i)
            for j, member in members.items():
                check()
                if found:
                    gram = found.gram(member.down.double())
                else:  # the row space of A_i, all directions alike
                    seen_by = met[j, i][1] @ bases[i].right.mT
                    gram = seen_by @ seen_by.mT
                energy = (met[j, j][0] * gram).sum((-2, -1)).clamp_min(0) * member.weight.double().square()
                if i == j:
                    _add(own, parts, (i,), energy)
                else:
                    _add(other, parts, (i, j), energy)
    return Report(
        tuple(bool(a.moments) for a in stack),
        tuple(frozenset(a.layers) for a in stack),
        squares,
        own,
        other,
        cosines,
        products,
    )


def _add(sums: dict[Any, float], parts: Sequence[str], who: tuple[int, ...], values: Tensor) -> None:
    for part, value in zip(parts, values.tolist(), strict=True):
        sums[(part, *who)] += value
        sums[(ALL, *who)] += value


def _bases(core: Core) -> Spectrum:
    """Of the columns of up and of the rows of down, orthonormal bases in terms of them: up @ left `[d, q]`,
    right @ down `[q, k]`.
    """
    eye = torch.eye(core.gram.shape[-1], dtype=core.gram.dtype, device=core.gram.device)
    return decompose(replace(core, up=eye.expand_as(core.gram), down=eye.expand_as(core.gram)))


def _angles(a: Spectrum, b: Spectrum, ups: Tensor, downs: Tensor) -> list[tuple[float, float]]:
    """By layer, the cosines of the smallest principal angles between input and between output spaces, from
    bases and what `crossed` gives.
    """
    inputs, outputs = _largest(a.right @ downs @ b.right.mT), _largest(a.left.mT @ ups @ b.left)
    return list(zip(inputs.tolist(), outputs.tolist(), strict=True))


def _largest(cosines: Tensor) -> Tensor:
    """The largest singular value per layer, `[L]`, by the eigenvalues of the smaller Gram: small ones would
    lose half their digits, the largest loses none, and an SVD takes several times as long.
    """
    tall = cosines.shape[-2] > cosines.shape[-1]
    gram = cosines.mT @ cosines if tall else cosines @ cosines.mT
    found: Tensor = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()
    return found
