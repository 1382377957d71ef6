"""iso: Iso-C (Marczak et al., ICML 2025, arXiv 2502.04959), in the core.

    sum_i w_i B_i A_i = U diag(s) V'   ->   mean(s) U V'

The mean is over the values of the sum's own rank, U and V from the core. The official code averages over
min(d, k) values, most of them zero for LoRAs, and fills the null space with arbitrary vectors: most of its
result's energy lies outside of the adapters. `keep_norm` takes the root of the mean square, which keeps the
Frobenius norm. All values being equal, no rank is better than another of its size: one that is asked for
keeps those directions in which the sum was largest.
"""

import torch

from compose.factors import Spectrum, decompose
from compose.groups import Group
from compose.methods.method import Method, Outcome, Parameters, finished


def iso(group: Group, parameters: Parameters) -> Outcome:
    """The sum, with all its singular values made equal."""
    core, weights = group.core(group.members, "members", exact=True)
    s = decompose(core, weights, rank=parameters.rank, single=True)
    count = (s.values > 0).sum(-1).clamp_min(1)
    mean_square = s.values.square().sum(-1) / count
    level = mean_square.sqrt() if parameters.keep_norm else s.values.sum(-1) / count
    levels = torch.where(s.values > 0, level.unsqueeze(-1), 0)
    half = levels[..., : s.left.shape[-1]].sqrt().to(s.left.dtype)
    left, right = s.left * half.unsqueeze(-2), s.right * half.unsqueeze(-1)
    lost = float(levels[..., s.left.shape[-1] :].square().sum())
    return finished(
        group,
        left,
        right,
        lost=lost,
        total=float(levels.square().sum()) if parameters.rank else 0.0,
        spectrum=lambda rank: Spectrum(left, levels, right),
    )


METHOD = Method(
    iso,
    "the sum with all its singular values made equal (Iso-C, arXiv 2502.04959, within the adapters' span)",
    frozenset({"rank", "energy", "keep_norm"}),
    separable=False,
)
