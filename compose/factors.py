"""Canonical factors and their batched low-rank algebra.

A layer's update is `up @ down`, up `[d, r]`, down `[r, k]`, float32, the file's scale already inside `up`; a
convolution is flattened to k = in * kh * kw. Layers of one shape and the same ranks form a `Group` and are
computed in one batch.

Nothing here forms the d x k update. With B = up, A = down, and the Cholesky factor R of B'B (so B = Q R with
orthonormal Q),

    (R A)(R A)' = R (A A') R' = U S^2 U'        ->  B A = (B R^-1 U) S (S^-1 U' R A)

so one Cholesky and one symmetric eigenproblem of the size of the summed rank give the thin SVD. Grams are
float64: a relative accuracy of about 1e-8 in the singular values, below what float32 factors can express.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.errors import InvalidRequest

NEGLIGIBLE = 1e-7
"""Singular values below this share of the layer's largest are rounding, not content."""

_ROWS = 256


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's update: up `[d, r]`, down `[r, k]`.

    With a `magnitude`, `[d, 1]` over rows, `[1, k]` over columns or `[1, n]` over the n input channels of a
    convolution, it is a DoRA layer (arXiv 2402.09353): magnitude * (W + up · down) / ||W + up · down|| - W,
    which only a base's weights make a matrix of.
    """

    up: Tensor
    down: Tensor
    magnitude: Tensor | None = None

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
    """Layers of one shape, changed by the same adapters with the same ranks; members in the order of the
    request.
    """

    layers: tuple[str, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Thin SVD of `up @ down` per layer: left `[L, d, q]`, values `[L, q]` descending, right `[L, q, k]`.

    Vectors that belong to negligible values are zero, so that rank-deficient layers need no special case.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def group(
    stack: Sequence[tuple[Mapping[str, Factors], float]], device: torch.device | str = "cpu"
) -> list[Group]:
    """Batches the layers of a weighted stack by shape and ranks, in order of first appearance. Raises
    InvalidRequest for a DoRA layer: it is no product of factors.
    """
    for name, factors in (item for adapter, _ in stack for item in adapter.items()):
        if factors.magnitude is not None:
            raise InvalidRequest(
                f"{name!r} is a DoRA layer, which is not merged in factor space: its effect depends on the "
                "base's weights; render it in a stack with the method naive",
                field="stack",
            )
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
    """The weighted sum, exactly: up `[L, d, R]`, down `[L, R, k]` with the weights on `down`, R the summed
    rank.
    """
    chosen = list(members)
    up = torch.cat([m.up for m in chosen], dim=2)
    down = torch.cat([m.down * m.weight for m in chosen], dim=1)
    return up, down


def squared_norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_F^2 per layer, `[L]`, float64, from the two Grams."""
    B, A = up.double(), down.double()
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0)


def _gram(X: Tensor, *, exact: bool) -> Tensor:
    """X'X per layer, `[L, R, R]`, float64. Not exact: float32 products of blocks of rows, to 1e-7."""
    if exact:
        return X.double().mT @ X.double()
    blocks = (X[:, row : row + _ROWS] for row in range(0, X.shape[1], _ROWS))
    return torch.stack([(block.mT @ block).double() for block in blocks]).sum(0)


def _gram_root(gram: Tensor) -> tuple[Tensor, Tensor, bool]:
    """R and its (pseudo-)inverse with R'R = gram, `[L, R, R]`, and whether every layer is well conditioned.

    Rank-deficient layers (twins) go through the eigenbasis.
    """
    root, info = torch.linalg.cholesky_ex(gram)
    diagonal = torch.diagonal(root, dim1=-2, dim2=-1).abs()
    spread = diagonal.amin(-1) / diagonal.amax(-1).clamp_min(1e-300)
    R = root.mT.contiguous()
    if bool(((info == 0) & (spread > 1e-6)).all()):
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
        return R, inverse, bool((spread > 1e-2).all())
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[..., -1:].clamp_min(0) * NEGLIGIBLE**2
    scale = torch.where(keep, values, 0).sqrt()
    inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0)
    return scale.unsqueeze(-1) * vectors.mT, vectors * inverse.unsqueeze(-2), False


def spectrum(up: Tensor, down: Tensor, rank: int | None = None, *, split: bool = False) -> Spectrum:
    """Thin SVD of `up @ down` for a batch of layers, signs fixed so that equal inputs give equal bytes.

    All values are returned; with `rank`, only that many vectors. With `split`, both sides' vectors are scaled
    by the square roots of the values. Vectors are float64, or float32 where a rank was asked for and the
    layers are so well conditioned that nothing is lost by it.
    """
    exact = rank is None
    R, inverse, sound = _gram_root(_gram(up, exact=exact))
    if not exact and not sound:
        exact = True
        R, inverse, _ = _gram_root(_gram(up, exact=True))
    squares, U = torch.linalg.eigh(R @ _gram(down.mT, exact=exact) @ R.mT)
    values, U = squares.flip(-1).clamp_min(0).sqrt(), U.flip(-1)
    keep = values > values[..., :1] * NEGLIGIBLE
    values = torch.where(keep, values, 0)
    q = values.shape[-1] if rank is None else min(rank, values.shape[-1])
    U, keep, kept = U[..., :q], keep[..., :q], values[..., :q]
    peak = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    U = U * torch.where(peak < 0, -1.0, 1.0) * keep.unsqueeze(-2)
    inverted = torch.where(keep, kept.clamp_min(1e-300).reciprocal(), 0)
    if split:
        root = kept.sqrt()
        to_left, to_right = inverse @ (U * root.unsqueeze(-2)), (inverted * root).unsqueeze(-1) * (U.mT @ R)
    else:
        to_left, to_right = inverse @ U, inverted.unsqueeze(-1) * (U.mT @ R)
    dtype = torch.float64 if exact else torch.float32
    return Spectrum(up.to(dtype) @ to_left.to(dtype), values, to_right.to(dtype) @ down.to(dtype))


def rank_for_energy(values: Tensor, energy: float) -> Tensor:
    """Smallest rank per layer, `[L]`, whose squared values reach the share `energy` (0, 1]; 1 for an empty
    layer.
    """
    cumulative = values.square().cumsum(-1)
    reached = cumulative >= cumulative[..., -1:] * min(energy, 1 - 1e-14)
    return reached.int().argmax(-1) + 1


def truncate(
    up: Tensor, down: Tensor, *, rank: int | None, energy: float | None
) -> tuple[list[Factors], float, float]:
    """The best approximation of each layer (Eckart-Young), S split evenly; squared error and norm of all.

    The error is the sum of the squared values left out: known exactly, the update is never formed.
    """
    s = spectrum(up, down, rank if energy is None else None, split=True)
    left, right = s.left.float(), s.right.float()
    counts = [left.shape[-1]] * len(up) if energy is None else rank_for_energy(s.values, energy).tolist()
    layers = [Factors(left[i, :, :r].contiguous(), right[i, :r].contiguous()) for i, r in enumerate(counts)]
    lost = sum(float(s.values[i, r:].square().sum()) for i, r in enumerate(counts))
    return layers, lost, float(s.values.square().sum())
