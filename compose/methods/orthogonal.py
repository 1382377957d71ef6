"""orthogonal: adapters keep out of each other's input (or output) directions.

mode priority (the default), an ordered Gram-Schmidt, the generalisation of NP-LoRA (arXiv 2511.11051) to any
number of adapters; the first of the stack is protected most and stays as it is, bit for bit:

    Q = []; for i in order:  A_i' = A_i - strength (A_i Q) Q';   Q = orth([Q, V_i])

V_i: right singular vectors of B_i A_i that hold the share `protect` of its squared norm. strength = mu / (1 +
mu) in NP-LoRA's soft form. At strength 1 and protect 1 an input in the row space of A_1 excites adapter 1
only.

mode symmetric (Loewdin, 1950): V = [V_1 … V_n], V' = V (V'V)^-1/2, B_i A_i -> U_i S_i V'_i'. Nobody comes
first, every adapter keeps its singular values, each is turned a little.

side output does the same with B and the left singular vectors. Exact in factor space: only one side changes.
The meaning of orthogonality on the input side is that of Orthogonal Adaptation (Po et al., CVPR 2024).
Parameters are orthogonal then, functions need not be (OSRM, ACL 2025): see `activation`.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from compose.factors import polar, rank_for_energy, spectrum
from compose.groups import Group, Member
from compose.lapack import eigh
from compose.methods.method import Method, Outcome, Parameters


def orthogonal(group: Group, parameters: Parameters) -> Outcome:
    """The members after projection, or after whitening."""
    members = group.members
    if len(members) == 1:
        return Outcome(members)
    flip = parameters.side == "output"
    if flip:
        members = tuple(replace(m, up=m.down.mT, down=m.up.mT) for m in members)
    changed = _symmetric(members) if parameters.mode == "symmetric" else _priority(members, parameters)
    if flip:
        changed = tuple(replace(m, up=m.down.mT, down=m.up.mT) for m in changed)
    return Outcome(changed)


def _priority(members: tuple[Member, ...], parameters: Parameters) -> tuple[Member, ...]:
    strength = 1.0 if parameters.strength is None else parameters.strength
    protect = 0.99 if parameters.protect is None else parameters.protect
    if strength == 0:
        return members
    projected = [members[0]]
    Q: Tensor | None = None  # [L, k, q] float64, orthonormal columns, zero columns where a layer has fewer
    for before, member in pairwise(members):
        Q = _extend(Q, before, protect)
        A = member.down.double()
        projected.append(replace(member, down=(A - strength * ((A @ Q) @ Q.mT)).float()))
    return tuple(projected)


def _extend(Q: Tensor | None, member: Member, protect: float) -> Tensor:
    s = spectrum(member.up, member.down)
    places = torch.arange(s.values.shape[-1], device=s.values.device)
    used = places < rank_for_energy(s.values, protect).unsqueeze(-1)
    V = s.right.mT * used.unsqueeze(-2)
    if Q is None:
        return V
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        V = V - Q @ (Q.mT @ V)
    values, vectors = eigh(V.mT @ V)
    inverse = torch.where(values > 1e-12, values.clamp_min(1e-300).rsqrt(), 0)
    return torch.cat([Q, V @ (vectors * inverse.unsqueeze(-2))], dim=-1)


def _symmetric(members: tuple[Member, ...]) -> tuple[Member, ...]:
    spectra = [spectrum(m.up, m.down) for m in members]
    turned = polar(torch.cat([s.right for s in spectra], dim=1))
    pieces = torch.split(turned, [s.right.shape[1] for s in spectra], dim=1)
    return tuple(
        replace(m, up=(s.left * s.values.unsqueeze(-2)).float(), down=rows.float())
        for m, s, rows in zip(members, spectra, pieces, strict=True)
    )


METHOD = Method(
    orthogonal,
    "adapters keep out of each other's input directions, the first of the stack protected most "
    "(after NP-LoRA, arXiv 2511.11051), or all alike",
    frozenset({"rank", "energy", "strength", "protect", "mode", "side"}),
    ordered=True,
)
