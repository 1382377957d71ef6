"""orthogonal, by priority: a later adapter keeps out of the input directions of the earlier ones.

    Q = []; for i in order:  A_i' = A_i - strength (A_i Q) Q';   Q = orth([Q, V_i])

V_i: right singular vectors of B_i A_i that hold the share `protect` of its squared norm. Ordered Gram-Schmidt
on the input side, the generalisation of NP-LoRA (arXiv 2511.11051) to any number of adapters; the meaning of
orthogonality is that of Orthogonal Adaptation (Po et al., CVPR 2024): an input in the row space of A_i
excites adapter i only. At strength 1 and protect 1 the first adapter answers its own inputs exactly as it
does alone. Exact in factor space: only A changes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compose.factors import Group, Member, rank_for_energy, spectrum
from compose.methods.parameters import Parameters


def orthogonal(group: Group, parameters: Parameters) -> tuple[Member, ...]:
    """The members after projection; the first is untouched, bit for bit."""
    strength = 1.0 if parameters.strength is None else parameters.strength
    protect = 0.99 if parameters.protect is None else parameters.protect
    if strength == 0 or len(group.members) == 1:
        return group.members
    projected = [group.members[0]]
    Q: Tensor | None = None  # [L, k, q] float64, orthonormal columns, zero columns where a layer has fewer
    for before, member in zip(group.members, group.members[1:], strict=False):
        Q = _extend(Q, before, protect)
        A = member.down.double()
        down = (A - strength * ((A @ Q) @ Q.mT)).float()
        projected.append(replace(member, down=down))
    return tuple(projected)


def _extend(Q: Tensor | None, member: Member, protect: float) -> Tensor:
    s = spectrum(member.up, member.down)
    used = torch.arange(s.values.shape[-1], device=s.values.device) < rank_for_energy(
        s.values, protect
    ).unsqueeze(-1)
    V = s.right.mT * used.unsqueeze(-2)
    if Q is None:
        return V
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        V = V - Q @ (Q.mT @ V)
    values, vectors = torch.linalg.eigh(V.mT @ V)
    inverse = torch.where(values > 1e-12, values.clamp_min(1e-300).rsqrt(), 0)
    return torch.cat([Q, V @ (vectors * inverse.unsqueeze(-2))], dim=-1)
