"""naive: the weighted sum of the updates, DW = sum_i w_i B_i A_i."""

from compose.factors import Group, Member
from compose.methods.parameters import Parameters


def naive(group: Group, parameters: Parameters) -> tuple[Member, ...]:
    """Nothing is taken from anybody; concatenation makes the sum exact (unlike peft's `linear`, which adds
    cross terms).
    """
    del parameters
    return group.members
