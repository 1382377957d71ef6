"""knots: KnOTS (Stoica et al., ICLR 2025, arXiv 2410.19735): merge where the adapters' updates share a basis.

    [B_1 A_1 … B_n A_n] = U S [V_1' … V_n'];   P_i = S V_i'  [R, k];   DW = U merge(P_1, …, P_n)

rule ties (the default): each P_i trimmed to its share `density`, signs elected, the disjoint mean; rule sum:
sum_i w_i P_i, which equals `naive` exactly. Exact in factor space: the joint SVD is one of the size of the
summed rank,

    [B_1 … B_n] = Q R  ->  (R blockdiag(A_i A_i') R') = U~ S^2 U~',   U = Q U~,   P_i = (U~' R)_i A_i

Rows of P_i are unique only up to a rotation within equal singular values, as everywhere in KnOTS.
"""

import torch
from torch import Tensor

from compose.factors import NEGLIGIBLE, Spectrum, decompose, orthonormal, root_of
from compose.groups import Group
from compose.lapack import eigh
from compose.methods.elementwise import add, elect, threshold, trim
from compose.methods.method import Method, Outcome, Parameters, finished
from compose.methods.ties import DENSITY


def knots(group: Group, parameters: Parameters) -> Outcome:
    """The merge in the shared basis, of the summed rank."""
    U, parts, ranks = group.once("knots", lambda: _shared(group))
    weights = [member.weight for member in group.members]
    if parameters.rule == "sum":
        merged = add(parts, weights)
    else:
        density = DENSITY if parameters.density is None else parameters.density
        trimmed = group.once(
            ("knots", density), lambda: [trim(P, threshold(P, density, ranks * P.shape[2])) for P in parts]
        )
        merged = elect(trimmed, weights)
    exact = parameters.energy is not None

    def spectrum(rank: int | None) -> Spectrum:
        return decompose(orthonormal(U, None, merged, exact=exact), rank=rank, split=True, single=True)

    return finished(group, U, merged, spectrum=spectrum)


def _shared(group: Group) -> tuple[Tensor, list[Tensor], Tensor]:
    """U `[L, d, R]` and the P_i `[L, R, k]`, computed in float64, and the number of directions `[L]`."""
    downs = [member.down.double() for member in group.members]
    B = group.up.double()
    root, inverse, _ = root_of(B.mT @ B)
    pieces = torch.split(root, [A.shape[1] for A in downs], dim=2)
    square = sum((R @ (A @ A.mT) @ R.mT for R, A in zip(pieces, downs, strict=True)), torch.zeros_like(root))
    values, W = eigh(square)
    keep = values > values[..., -1:].clamp_min(0) * NEGLIGIBLE**2
    W = W * keep.unsqueeze(-2)
    parts = [((W.mT @ R) @ A).float() for R, A in zip(pieces, downs, strict=True)]
    return (B @ (inverse @ W)).float(), parts, keep.sum(-1)


METHOD = Method(
    knots,
    "TIES in the basis the updates share (KnOTS, arXiv 2410.19735)",
    frozenset({"rank", "energy", "density", "rule"}),
    separable=False,
)
