"""Second moments of what really flows into a layer: G = E[x x'], `[k, k]`, as a diagonal and a low-rank part.

    G ~ diag(diagonal) + factor factor'      diagonal [k], factor [k, q], scaled so that diag(G) has mean 1

An adapter's moments are measured while rendering it alone (`compose.calibrate`). In this form G and the
inverse of a sum of such G cost products of size k x q, at k = 5120 as at 64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moment:
    """One layer's (`[k]`, `[k, q]`) or a batch's (`[L, k]`, `[L, k, q]`) second moment."""

    diagonal: Tensor
    factor: Tensor

    def right_of(self, A: Tensor) -> Tensor:
        """A G, `[…, r, k]`."""
        F = self.factor.to(A.dtype)
        return A * self.diagonal.to(A.dtype).unsqueeze(-2) + (A @ F) @ F.mT

    def gram(self, A: Tensor) -> Tensor:
        """A G A', `[…, r, r]`: E ||B A x||^2 = tr(B'B A G A')."""
        AF = A @ self.factor.to(A.dtype)
        return (A * self.diagonal.to(A.dtype).unsqueeze(-2)) @ A.mT + AF @ AF.mT


Moments = Mapping[str, Moment]
"""By layer, or by what layers read."""


def stacked(moments: Sequence[Moment], device: torch.device) -> Moment:
    """Layers of one width as a batch, float32 as they are kept; narrower factors are filled up with zeros."""
    q = max(m.factor.shape[-1] for m in moments)
    factor = torch.zeros(len(moments), moments[0].factor.shape[0], q)
    for i, m in enumerate(moments):
        factor[i, :, : m.factor.shape[-1]] = m.factor
    return Moment(torch.stack([m.diagonal.float() for m in moments]).to(device), factor.to(device))


def total(weighted: Sequence[tuple[float, Moment]], ridge: float) -> Moment:
    """sum_i w_i G_i + ridge I, float64."""
    zero = torch.zeros_like(weighted[0][1].diagonal, dtype=torch.float64)
    diagonal = sum((w * m.diagonal.double() for w, m in weighted), zero) + ridge
    return Moment(diagonal, torch.cat([m.factor.double() * w**0.5 for w, m in weighted], dim=-1))


def solved_right(A: Tensor, moment: Moment) -> Tensor:
    """A G^-1, `[…, r, k]`, by Woodbury's identity; `moment.diagonal` must be positive."""
    F, D = moment.factor, moment.diagonal.unsqueeze(-2)
    A_D, F_D = A / D, F / moment.diagonal.unsqueeze(-1)
    small = F.mT @ F_D
    small = small + torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
    solved: Tensor = A_D - torch.linalg.solve(small, F_D.mT @ A.mT).mT @ F_D.mT
    return solved
