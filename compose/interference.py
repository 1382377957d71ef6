"""Who fights whom, and where, before anyone renders.

For adapters i and j of a stack and the inputs x that layer l really sees while i is rendered alone (G_i, see
`compose.moments`):

    crosstalk_ij = sqrt( sum_l E ||w_j DW_j x||^2 / sum_l E ||w_i DW_i x||^2 )        x ~ G_i

how loudly j answers where i lives, against i's own voice: 0 is silence, 1 as loud as i itself. Sums run over
one layer, the layers of a part of the base, or over all. The same is told in weight space, x taken from the
row space of A_i, all directions alike; it stands for the first where i was not calibrated, and says little
(two published adapters were orthogonal to 0.02 there and fought all the same). With P_i the projection on
whatever the others read together,

    apart_i = ||DW_i (1 - P_i)|| / ||DW_i||         the share of i that is kept where all others come first

Everything comes from Grams of the size of the ranks; no update is formed.
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

_TWINS = 1e-9
"""Below this share of its energy outside of all others a direction counts as theirs."""

Place = tuple[str, int]
"""A layer or a part of the base, and an adapter's place in the stack."""

Meeting = tuple[str, int, int]
"""A part, the place of the adapter that lives there, and that of the one that answers."""


@dataclass(frozen=True, slots=True)
class Report:
    """Of every layer, and summed over those of every part, and of all (`ALL`): by place the squared weighted
    norms, what of them is apart from all others, and the energy on the adapter's own inputs; by meeting the
    other's energy there, the largest cosines of principal angles between input and between output spaces, and
    the inner product. `calibrated`: whose inputs were measured. `…_in_weights`: the energies on row spaces.
    """

    calibrated: tuple[bool, ...]
    layers: tuple[frozenset[str], ...]
    squares: Mapping[Place, float]
    outside: Mapping[Place, float]
    own: Mapping[Place, float]
    other: Mapping[Meeting, float]
    own_in_weights: Mapping[Place, float]
    other_in_weights: Mapping[Meeting, float]
    cosines: Mapping[Meeting, tuple[float, float]]
    inner: Mapping[Meeting, float]

    @property
    def parts(self) -> list[str]:
        """Every part that an adapter changes."""
        return sorted({part_of(layer) for layer in self.every_layer})

    @property
    def every_layer(self) -> list[str]:
        """Every layer that an adapter changes."""
        return sorted(frozenset().union(*self.layers))

    def norm(self, i: int, part: str = ALL) -> float:
        """||w_i DW_i||_F over the layers of a part."""
        return math.sqrt(self.squares.get((part, i), 0.0))

    def crosstalk(self, i: int, j: int, part: str = ALL) -> float:
        """How loudly j answers where i lives, against i's own voice there; infinity where i says nothing."""
        return _louder(self.other.get((part, i, j), 0.0), self.own.get((part, i), 0.0))

    def crosstalk_elsewhere(self, i: int, j: int, part: str) -> float:
        """The same over all layers but those of a part."""
        own = self.own.get((ALL, i), 0.0) - self.own.get((part, i), 0.0)
        other = self.other.get((ALL, i, j), 0.0) - self.other.get((part, i, j), 0.0)
        return _louder(max(0.0, other), max(0.0, own))

    def crosstalk_in_weights(self, i: int, j: int, part: str = ALL) -> float:
        """The same for inputs from all over i's row space, whether or not i was calibrated."""
        return _louder(self.other_in_weights.get((part, i, j), 0.0), self.own_in_weights.get((part, i), 0.0))

    def apart(self, i: int, part: str = ALL) -> float:
        """The share of i's update, in norm, on inputs that no other reads; 1 where it does nothing."""
        square = self.squares.get((part, i), 0.0)
        return math.sqrt(min(1.0, self.outside[part, i] / square)) if square else 1.0

    def cosine(self, i: int, j: int, part: str = ALL) -> float:
        """Between the updates of i and j."""
        norms = self.norm(i, part) * self.norm(j, part)
        return max(-1.0, min(1.0, self.inner.get((part, i, j), 0.0) / norms)) if norms else 0.0

    def coherence(self, part: str = ALL) -> float:
        """||sum_i w_i DW_i|| / sum_i ||w_i DW_i||: 1 when all point one way, 1/sqrt(n) for n strangers of one
        size.
        """
        places = range(len(self.calibrated))
        norms = [self.norm(i, part) for i in places]
        crossed = sum(self.inner.get((part, i, j), 0.0) for i in places for j in places if i != j)
        total = sum(norm**2 for norm in norms) + crossed
        return math.sqrt(max(0.0, total)) / sum(norms) if any(norms) else 0.0


def _louder(other: float, own: float) -> float:
    return math.sqrt(other / own) if own else (math.inf if other else 0.0)


def part_of(layer: str) -> str:
    """The part of the base that a layer belongs to, as one would say it: `unet.up_blocks.1 attn2`,
    `unet conv_in`, `text_encoder`.
    """
    component, path = layer.split(".", 1)
    if component.startswith("text_encoder"):
        return component
    if not (block := _BLOCK.match(path)):
        return f"{component} {path.split('.', 1)[0]}"
    kind = _KIND.search(f".{path}")
    return f"{component}.{block[0]} {kind[1]}" if kind else f"{component}.{block[0]}"


def interference(
    stack: Sequence[Adapter],
    device: torch.device | str = "cpu",
    *,
    check: Callable[[], None] = nobody_asks,
) -> Report:
    """Measures a weighted stack. `check` is called before every batch of layers and every meeting in it;
    what it raises stops the work. Raises InvalidRequest for a DoRA.
    """
    squares, outside, own, own_in_weights = (defaultdict[Place, float](float) for _ in range(4))
    other, other_in_weights, products = (defaultdict[Meeting, float](float) for _ in range(3))
    cosines: dict[Meeting, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for batch in group(stack, device):
        check()
        where = [(layer, part_of(layer), ALL) for layer in batch.layers]
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
                _add(squares, where, (i,), product.clamp_min(0))
                continue
            _add(products, where, (i, j), product)
            for places, (inputs, outputs) in zip(where, _angles(bases[i], bases[j], ups, downs), strict=True):
                for place in places:
                    seen = cosines[place, i, j]
                    cosines[place, i, j] = (max(seen[0], inputs), max(seen[1], outputs))
        for i, energy in _outside(met, bases).items():
            _add(outside, where, (i,), energy * members[i].weight.double().square())
        for i in sorted({*members, *batch.moments}):
            found = batch.moments.get(i)
            for j, member in members.items():
                check()
                grams = {True: found.gram(member.down.double())} if found else {}
                if i in members:  # the row space of A_i, all directions alike
                    seen_by = met[j, i][1] @ bases[i].right.mT
                    grams[False] = seen_by @ seen_by.mT
                for measured, gram in grams.items():
                    energy = (met[j, j][0] * gram).sum((-2, -1)).clamp_min(0)
                    energy *= member.weight.double().square()
                    who = (i,) if i == j else (i, j)
                    if measured or not found:
                        _add(own if i == j else other, where, who, energy)
                    if not measured:
                        _add(own_in_weights if i == j else other_in_weights, where, who, energy)
    return Report(
        tuple(bool(a.moments) for a in stack),
        tuple(frozenset(a.layers) for a in stack),
        squares,
        outside,
        own,
        other,
        own_in_weights,
        other_in_weights,
        cosines,
        products,
    )


def _add(
    sums: dict[Any, float], where: Sequence[tuple[str, ...]], who: tuple[int, ...], values: Tensor
) -> None:
    for places, value in zip(where, values.tolist(), strict=True):
        for place in places:
            sums[(place, *who)] += value


def _outside(
    met: Mapping[tuple[int, int], tuple[Tensor, Tensor]], bases: Mapping[int, Spectrum]
) -> dict[int, Tensor]:
    """By member, `[L]`: ||DW_i (1 - P_i)||^2, unweighted. With V_i orthonormal rows and G the Gram of all of
    them, what is left of V_i outside of the others has the Gram ((G^-1)_ii)^-1.
    """
    order = list(bases)
    blocks = [[bases[i].right @ met[i, j][1] @ bases[j].right.mT for j in order] for i in order]
    G = torch.cat([torch.cat(row, -1) for row in blocks], -2)
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(G + _TWINS * eye))
    found, start = {}, 0
    for i in order:
        ups, gram = met[i, i]
        end = start + bases[i].right.shape[-2]
        left = torch.linalg.inv(inverse[..., start:end, start:end])
        in_basis = gram @ bases[i].right.mT
        found[i] = (ups * (in_basis @ left @ in_basis.mT)).sum((-2, -1)).clamp_min(0)
        start = end
    return found


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
