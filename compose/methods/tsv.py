"""tsv: Task Singular Vectors (Gargiulo et al., CVPR 2025, arXiv 2412.00081), TSV-M.

    U = [U_1 … U_n], V = [V_1 … V_n]:   DW = polar(U) diag(w_i S_i) polar(V)',   polar(X) = X (X'X)^-1/2

Both sides whitened, so that no two adapters share an input or an output direction; the Grams are of the size
of the summed rank, the update is never formed. All singular vectors are kept: the paper's cut to 1/n of
min(d, k) lies far above the rank of a LoRA.
"""

from dataclasses import replace

import torch

from compose.factors import polar, spectrum
from compose.groups import Group
from compose.methods.method import Method, Outcome, Parameters


def tsv(group: Group, parameters: Parameters) -> Outcome:
    """Every member in the whitened bases, its singular values as they were."""
    del parameters
    if len(group.members) == 1:
        return Outcome(group.members)
    spectra = [spectrum(m.up, m.down) for m in group.members]
    ranks = [s.values.shape[-1] for s in spectra]
    lefts = torch.split(polar(torch.cat([s.left.mT for s in spectra], dim=1)), ranks, dim=1)
    rights = torch.split(polar(torch.cat([s.right for s in spectra], dim=1)), ranks, dim=1)
    return Outcome(
        tuple(
            replace(m, up=(left.mT * s.values.unsqueeze(-2)).float(), down=right.float())
            for m, s, left, right in zip(group.members, spectra, lefts, rights, strict=True)
        )
    )


METHOD = Method(
    tsv,
    "the adapters' singular vectors whitened on both sides (Task Singular Vectors, arXiv 2412.00081)",
    frozenset({"rank", "energy"}),
)
