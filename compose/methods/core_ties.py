"""core-ties: TIES in the core space of the stack (Core Space merging, Panariello et al., NeurIPS 2025, arXiv
2509.17786).

    B_i A_i = U_i S_i V_i',  B~_i = U_i S_i^1/2,  A~_i = S_i^1/2 V_i'
    U_ref: left singular vectors of [B~_1 … B~_n],  V_ref: right ones of [A~_1; …; A~_n]
    M_i = U_ref' B~_i A~_i V_ref  [R, R];   DW = U_ref ties(M_1, …, M_n) V_ref'

Lossless: no part of any adapter lies outside of the core. The even split makes the result depend on the
updates alone, not on how a file divides them between its factors. Exact in factor space.
"""

import torch
from torch import Tensor

from compose.factors import NEGLIGIBLE, Spectrum, decompose, orthonormal, spectrum
from compose.groups import Group
from compose.lapack import eigh
from compose.methods.elementwise import elect, threshold, trim
from compose.methods.method import Method, Outcome, Parameters, finished
from compose.methods.ties import DENSITY


def core_ties(group: Group, parameters: Parameters) -> Outcome:
    """The disjoint mean of the trimmed cores, of the summed rank."""
    U, V, cores, sizes = group.once("core-ties", lambda: _cores(group))
    density = DENSITY if parameters.density is None else parameters.density
    trimmed = group.once(
        ("core-ties", density), lambda: [trim(M, threshold(M, density, sizes)) for M in cores]
    )
    merged = elect(trimmed, [m.weight.double() for m in group.members])

    def smaller(rank: int | None) -> Spectrum:
        return decompose(orthonormal(U, merged, V, exact=False), rank=rank, split=True)

    return finished(group, U @ merged.float(), V, spectrum=smaller)


def _cores(group: Group) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """U_ref `[L, d, R]`, V_ref' `[L, R, k]` and the M_i `[L, R, R]`, computed in float64, and how many of
    their entries belong to directions there are, `[L]`.
    """
    spectra = [spectrum(m.up, m.down) for m in group.members]
    ranks = [s.values.shape[-1] for s in spectra]
    U, lefts, rows = _basis(torch.cat([s.left * s.values.sqrt().unsqueeze(-2) for s in spectra], dim=2))
    V, rights, columns = _basis(
        torch.cat([s.right.mT * s.values.sqrt().unsqueeze(-2) for s in spectra], dim=2)
    )
    pairs = zip(torch.split(lefts, ranks, dim=2), torch.split(rights, ranks, dim=2), strict=True)
    cores = [left @ right.mT for left, right in pairs]
    least = 1e-13 * torch.stack([M.abs().amax((1, 2)) for M in cores]).amax(0)[:, None, None]
    cores = [torch.where(M.abs() > least, M, 0) for M in cores]  # rounding would have a vote
    return U.float(), V.mT.float().contiguous(), cores, rows * columns


def _basis(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors Q of X `[L, n, R]`, Q'X `[L, R, R]`, and the rank `[L]`."""
    values, W = eigh(X.mT @ X)
    keep = values > values[..., -1:].clamp_min(0) * NEGLIGIBLE**2
    inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0)
    roots = torch.where(keep, values, 0).sqrt()
    return X @ (W * inverse.unsqueeze(-2)), roots.unsqueeze(-1) * W.mT, keep.sum(-1)


METHOD = Method(
    core_ties,
    "TIES in the core space that all updates of the stack lie in (arXiv 2509.17786)",
    frozenset({"rank", "energy", "density"}),
    separable=False,
)
