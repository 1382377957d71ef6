"""iso: Iso-C (Marczak et al., ICML 2025, arXiv 2502.04959), in the core.

    sum_i w_i B_i A_i = U diag(s) V'   ->   mean(s) U V'

The mean is over the values of the sum's own rank, U and V from the core. The official code averages over
min(d, k) values, most of them zero for LoRAs, and fills the null space with arbitrary vectors: most of its
result's energy lies outside of the adapters. `keep_norm` takes the root of the mean square, which keeps the
Frobenius norm.
"""

import torch

from compose.factors import decompose
from compose.groups import Group
from compose.methods.method import Method, Outcome, Parameters, finished


def iso(group: Group, parameters: Parameters) -> Outcome:
    """The sum, with all its singular values made equal."""
    core, weights = group.core(group.members, "members", exact=True)
    s = decompose(core, weights)
    count = (s.values > 0).sum(-1).clamp_min(1)
    mean_square = s.values.square().sum(-1) / count
    level = mean_square.sqrt() if parameters.keep_norm else s.values.sum(-1) / count
    half = torch.where(s.values > 0, level.unsqueeze(-1), 0).sqrt()
    return finished(group, s.left * half.unsqueeze(-2), s.right * half.unsqueeze(-1))


METHOD = Method(
    iso,
    "the sum with all its singular values made equal (Iso-C, arXiv 2502.04959, within the adapters' span)",
    frozenset({"rank", "energy", "keep_norm"}),
    separable=False,
)
