"""ties: TIES-Merging (Yadav et al., NeurIPS 2023, arXiv 2306.01708), on the true updates.

    T_i = the share `density` of the largest entries of B_i A_i;   gamma = sign(sum_i T_i)
    DW = sum of the w_i T_i whose sign is gamma, divided by their number

Entry by entry on d x k, as the paper has it (peft's `ties` trims the factors instead). The result has full
rank: the rule is exact, what leaves is its best approximation of the rank asked for. Equal adapters give
themselves, not twice themselves.
"""

from compose.groups import Group, Member
from compose.methods.elementwise import Rule, dense, elect, largest
from compose.methods.method import Method, Outcome, Parameters

DENSITY = 0.2


def ties(group: Group, parameters: Parameters) -> Outcome:
    """The disjoint mean of the trimmed updates."""
    density = DENSITY if parameters.density is None else parameters.density

    def prepare(layer: int, member: Member) -> Rule:
        return largest(group, layer, member, density)

    return dense(group, parameters, prepare=prepare, join=elect)


METHOD = Method(
    ties,
    "the largest entries of each update, those that agree in sign averaged (TIES, arXiv 2306.01708)",
    frozenset({"rank", "density", "seed"}),
    separable=False,
)
