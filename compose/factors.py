"""Canonical factors and their batched low-rank algebra.

A layer's update is `up @ down`, up `[d, r]`, down `[r, k]`, float32, the file's scale already inside `up`; a convolution is
flattened to k = in * kh * kw. Layers of one shape and the same ranks form a `Group` and are computed in one batch.

Nothing here forms the d x k update. With B = up, A = down, and the Cholesky factor R of B'B (so B = Q R, Q orthonormal),

    (R A)(R A)' = R (A A') R' = U S^2 U'        ->  B A = (B R^-1 U) S (S^-1 U' R A)

so one Cholesky and one symmetric eigenproblem of the size of the summed rank give the thin SVD. Grams are float64: a relative
accuracy of about 1e-8 in the singular values, below what float32 factors can express.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 1e-7
"""Singular values below this share of the layer's largest are rounding, not content."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's update: up `[d, r]`, down `[r, k]`."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter in one group: up `[L, d, r]`, down `[L, r, k]`, and the weight it is asked for with."""

    index: int
    up: Tensor
    down: Tensor
    weight: float


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of one shape, changed by the same adapters with the same ranks; members in the order of the request."""

    layers: tuple[str, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Thin SVD of `up @ down` per layer: left `[L, d, q]`, values `[L, q]` descending, right `[L, q, k]`; float64.

    Vectors that belong to negligible values are zero, so that rank-deficient layers need no special case.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def group(
    stack: Sequence[tuple[Mapping[str, Factors], float]], device: torch.device | str = "cpu"
) -> list[Group]:
    """Batches the layers of a weighted stack by shape and ranks, in order of first appearance."""
    pools: dict[tuple[object, ...], list[str]] = {}
    for layer in dict.fromkeys(name for adapter, _ in stack for name in adapter):
        key = tuple(
            (i, *adapter[layer].up.shape, adapter[layer].down.shape[1])
            for i, (adapter, _) in enumerate(stack)
            if layer in adapter
        )
        pools.setdefault(key, []).append(layer)
    return [
        Group(
            tuple(layers),
            tuple(
                Member(
                    i,
                    torch.stack([adapter[layer].up for layer in layers]).to(device, torch.float32),
                    torch.stack([adapter[layer].down for layer in layers]).to(device, torch.float32),
                    weight,
                )
                for i, (adapter, weight) in enumerate(stack)
                if layers[0] in adapter
            ),
        )
        for layers in pools.values()
    ]


def concatenate(members: Iterable[Member]) -> tuple[Tensor, Tensor]:
    """The weighted sum, exactly: up `[L, d, R]`, down `[L, R, k]` with the weights on `down`, R the summed rank."""
    chosen = list(members)
    up = torch.cat([m.up for m in chosen], dim=2)
    down = torch.cat([m.down * m.weight for m in chosen], dim=1)
    return up, down


def squared_norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_F^2 per layer, `[L]`, float64, from the two Grams."""
    B, A = up.double(), down.double()
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0)


def _gram_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R and its (pseudo-)inverse with R'R = gram, `[L, R, R]`; rank-deficient layers through the eigenbasis."""
    root, info = torch.linalg.cholesky_ex(gram)
    diagonal = torch.diagonal(root, dim1=-2, dim2=-1).abs()
    sound = (info == 0) & (diagonal.amin(-1) > 1e-6 * diagonal.amax(-1))
    R = root.mT.contiguous()
    if bool(sound.all()):
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return R, torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[..., -1:].clamp_min(0) * NEGLIGIBLE**2
    scale = torch.where(keep, values, 0).sqrt()
    inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0)
    return scale.unsqueeze(-1) * vectors.mT, vectors * inverse.unsqueeze(-2)


def spectrum(up: Tensor, down: Tensor) -> Spectrum:
    """Thin SVD of `up @ down` for a batch of layers, signs fixed so that equal inputs give equal bytes."""
    B, A = up.double(), down.double()
    R, inverse = _gram_root(B.mT @ B)
    squares, U = torch.linalg.eigh(R @ (A @ A.mT) @ R.mT)
    values, U = squares.flip(-1).clamp_min(0).sqrt(), U.flip(-1)
    keep = values > values[..., :1] * NEGLIGIBLE
    values = torch.where(keep, values, 0)
    left = B @ (inverse @ (U * keep.unsqueeze(-2)))
    right = torch.where(keep, values.clamp_min(1e-300).reciprocal(), 0).unsqueeze(-1) * (U.mT @ (R @ A))
    peak = left.gather(-2, left.abs().argmax(-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(left.dtype)
    return Spectrum(left * sign, values, right * sign.mT)


def rank_for_energy(values: Tensor, energy: float) -> Tensor:
    """Smallest rank per layer, `[L]`, whose squared values reach the share `energy` (0, 1]; 1 for an empty layer."""
    cumulative = values.square().cumsum(-1)
    reached = cumulative >= cumulative[..., -1:] * min(energy, 1 - 1e-14)
    return reached.int().argmax(-1) + 1


def truncate(
    up: Tensor, down: Tensor, *, rank: int | None, energy: float | None
) -> tuple[list[Factors], Tensor]:
    """The best approximation of each layer (Eckart-Young), S split evenly, and its squared error `[L]`.

    The error is the sum of the squared values left out: known exactly, the update is never formed.
    """
    s = spectrum(up, down)
    ranks = (
        rank_for_energy(s.values, energy)
        if energy is not None
        else torch.full_like(s.values[:, 0], rank or 1)
    )
    counts = [max(1, min(int(r), s.values.shape[1])) for r in ranks.tolist()]
    root = s.values.sqrt()
    left, right = (s.left * root.unsqueeze(-2)).float(), (root.unsqueeze(-1) * s.right).float()
    layers = [Factors(left[i, :, :r].contiguous(), right[i, :r].contiguous()) for i, r in enumerate(counts)]
    lost = torch.stack([s.values[i, r:].square().sum() for i, r in enumerate(counts)])
    return layers, lost
