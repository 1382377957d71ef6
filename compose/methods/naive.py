"""naive: the weighted sum of the updates, DW = sum_i w_i B_i A_i, exactly, as [B_1 … B_n] [w_1 A_1; …; w_n
A_n].

peft's `cat`; what `set_adapters` computes at run time. Not peft's `linear`, which adds cross terms w_ij B_i
A_j.
"""

from compose.groups import Group
from compose.methods.method import Method, Outcome, Parameters


def naive(group: Group, parameters: Parameters) -> Outcome:
    """Nothing is taken from anybody."""
    del parameters
    return Outcome(group.members)


METHOD = Method(naive, "the weighted sum of the updates, exactly, by concatenation")
