"""activation: priority in the metric of what really flows through the layers.

For a protected adapter t and a later one s, G_t and G_s the second moments of the layer's inputs while each
is rendered alone (`compose.moments`):

    DW_s' = argmin_D ||D - DW_s||^2_{G_s} + mu ||D||^2_{G_t}
          = B_s A_s (G_s + eps I) (G_s + mu G_t + eps I)^-1

The first adapter of the stack stays as it is, bit for bit; each later one acts as it did where it lives, and
keeps still where those before it live. Only A changes: no rank is added, no update formed. mu = 0 is `naive`;
G = I is a plain shrink; in a chain the G of all before add up, also in layers they do not change.

`orthogonal` protects directions of the weights, all alike; activations are far from isotropic. NP-LoRA (arXiv
2511.11051) is the weight-space cousin; MEMIT (arXiv 2210.07229) and AlphaEdit (arXiv 2410.02355) in model
editing, GPM (arXiv 2103.09762) and Adam-NSCL in continual learning protect old knowledge through input
covariances in this spirit. Exact in factor space.
"""

from dataclasses import replace

from compose.groups import Group
from compose.methods.method import Method, Outcome, Parameters
from compose.moments import solved_right, total

MU = 3.0
RIDGE = 1e-3


def activation(group: Group, parameters: Parameters) -> Outcome:
    """The members, the later still where the earlier live; as they are where nothing was measured."""
    mu = MU if parameters.mu is None else parameters.mu
    if mu == 0:
        return Outcome(group.members)
    changed, moments = [], dict(group.moments)
    for member in group.members:
        own = moments.get(member.index)
        before = [moment for place, moment in moments.items() if place < member.index]
        if own is None or not before:
            changed.append(member)
            continue
        A = member.down.double()
        metric = total([(1.0, own), *((mu, moment) for moment in before)], RIDGE)
        changed.append(replace(member, down=solved_right(own.right_of(A) + RIDGE * A, metric).float()))
    return Outcome(tuple(changed))


METHOD = Method(
    activation,
    "each adapter keeps still on the activations of those before it, and acts as it did on its own",
    frozenset({"rank", "energy", "mu"}),
    ordered=True,
    calibrated=True,
)
