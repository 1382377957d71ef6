"""regmean: RegMean (Jin et al., ICLR 2023, arXiv 2212.09849), on measured activations.

    DW = argmin_D sum_i E||(D - w_i DW_i) x_i||^2
       = (sum_i w_i DW_i (G_i + eps I)) (sum_i G_i + eps I)^-1

G_i: second moments of the layer's inputs while adapter i is rendered alone (`compose.moments`). Only A
changes. The relative of `activation` that averages: every adapter gives way to all others; Mix-of-Show's
gradient fusion is of this kind. Exact in factor space.
"""

from dataclasses import replace

import torch

from compose.groups import Group
from compose.methods.method import Method, Outcome, Parameters
from compose.moments import solved_right, total

RIDGE = 1e-3


def regmean(group: Group, parameters: Parameters) -> Outcome:
    """The members in the metric of all activations together; as they are where nothing was measured."""
    del parameters
    moments = dict(group.moments)
    measured = [m for m in group.members if m.index in moments]
    if len(moments) < 2 or not measured:
        return Outcome(group.members)
    everything = total([(1.0, moment) for moment in moments.values()], RIDGE)
    own = []
    for member in measured:
        A = member.down.double()
        own.append(moments[member.index].right_of(A) + RIDGE * A)
    ranks = [A.shape[1] for A in own]
    solved = torch.split(solved_right(torch.cat(own, dim=1), everything).float(), ranks, dim=1)
    downs = {m.index: down for m, down in zip(measured, solved, strict=True)}
    return Outcome(tuple(replace(m, down=downs.get(m.index, m.down)) for m in group.members))


METHOD = Method(
    regmean,
    "the least-squares mean on measured activations (RegMean, arXiv 2212.09849)",
    frozenset({"rank", "energy"}),
    calibrated=True,
)
