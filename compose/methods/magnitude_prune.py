"""magnitude-prune: of every update B_i A_i the share `density` of its largest entries, then the weighted sum.

On the true update, entry by entry (peft's `magnitude_prune` prunes the factors, another thing). Full rank:
what leaves is its best approximation of the rank asked for.
"""

from compose.groups import Group, Member
from compose.methods.elementwise import Rule, add, dense, largest
from compose.methods.method import Method, Outcome, Parameters

DENSITY = 0.5


def magnitude_prune(group: Group, parameters: Parameters) -> Outcome:
    """The weighted sum of the pruned updates."""
    density = DENSITY if parameters.density is None else parameters.density

    def prepare(layer: int, member: Member) -> Rule:
        return largest(group, layer, member, density)

    return dense(group, parameters, prepare=prepare, join=add)


METHOD = Method(
    magnitude_prune,
    "the largest entries of each update, summed",
    frozenset({"rank", "density", "seed"}),
    separable=False,
)
