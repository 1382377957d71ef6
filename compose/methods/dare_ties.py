"""dare-ties: drop and rescale (DARE, arXiv 2311.03099), then the disjoint mean of TIES (arXiv 2306.01708).

Entry by entry on the true updates; the masks come from `seed`. Full rank: what leaves is its best
approximation of the rank asked for.
"""

from compose.groups import Group, Member
from compose.methods.dare_linear import DENSITY
from compose.methods.elementwise import Rule, dense, dropping, elect
from compose.methods.method import Method, Outcome, Parameters


def dare_ties(group: Group, parameters: Parameters) -> Outcome:
    """The disjoint mean of what was not dropped."""
    density = DENSITY if parameters.density is None else parameters.density

    places = {member.index: place for place, member in enumerate(group.members)}

    def prepare(layer: int, member: Member) -> Rule:
        return dropping(density, parameters.seed, group.layers[layer], places[member.index])

    return dense(group, parameters, prepare=prepare, join=elect)


METHOD = Method(
    dare_ties,
    "entries of each update dropped at random, those that agree in sign averaged (DARE with TIES)",
    frozenset({"rank", "density", "seed"}),
    ordered=True,
    separable=False,
)
