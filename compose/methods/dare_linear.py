"""dare-linear: drop and rescale (DARE, Yu et al., ICML 2024, arXiv 2311.03099), then the weighted sum.

    DW = sum_i w_i (mask_i . B_i A_i) / density,   mask_i ~ Bernoulli(density), from `seed`

Unbiased: its expectation is the plain sum. Full rank: what leaves is its best approximation of the rank asked
for, which averages much of the dropping out again; the error says how much was left behind.
"""

from compose.groups import Group, Member
from compose.methods.elementwise import Rule, add, dense, dropping
from compose.methods.method import Method, Outcome, Parameters

DENSITY = 0.5


def dare_linear(group: Group, parameters: Parameters) -> Outcome:
    """The weighted sum of what was not dropped."""
    density = DENSITY if parameters.density is None else parameters.density

    places = {member.index: place for place, member in enumerate(group.members)}

    def prepare(layer: int, member: Member) -> Rule:
        return dropping(density, parameters.seed, group.layers[layer], places[member.index])

    return dense(group, parameters, prepare=prepare, join=add)


METHOD = Method(
    dare_linear,
    "entries of each update dropped at random and the rest rescaled, then summed (DARE, arXiv 2311.03099)",
    frozenset({"rank", "density", "seed"}),
    ordered=True,  # the second of two equal adapters drops other entries than the first
    separable=False,
)
