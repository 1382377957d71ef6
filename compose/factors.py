"""Canonical factors and their batched low-rank algebra.

A layer's update is `up @ down`, up `[d, r]`, down `[r, k]`, float32, the file's scale already inside `up`; a
convolution is flattened to k = in * kh * kw. Everything here works on batches of layers of one shape.

Nothing here forms the d x k update. With B = up, A = down, and the Cholesky factor R of B'B (so B = Q R with
orthonormal Q),

    (R A)(R A)' = R (A A') R' = U S^2 U'        ->  B A = (B R^-1 U) S (S^-1 U' R A)

so one Cholesky and one symmetric eigenproblem of the size of the summed rank give the thin SVD. R and A A' do
not depend on the weights c of a stack, which enter as A -> diag(c) A: they are kept in a `Core`, and a new
weight costs the small eigenproblem only. Grams are float64: a relative accuracy of about 1e-8 in the singular
values, below what float32 factors can express.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compose.lapack import eigh

NEGLIGIBLE = 1e-7
"""Singular values below this share of the layer's largest are rounding, not content."""

_ROWS, _LEVEL = 256, 1e-2


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

    @property
    def shape(self) -> tuple[int, int]:
        """d, k."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors it is kept as, wherever it is kept as a product of other ones."""
        pair = self.up, self.down
        return pair if self.magnitude is None else (*pair, self.magnitude)

    def made_of(self, held: Sequence[Tensor]) -> "Factors":
        """The same, of copies of what is `held`."""
        return Factors(*held)

    def to(self, device: torch.device | str) -> "Factors":
        """The same on a device."""
        return self.made_of([tensor.to(device) for tensor in self.held])

    def formed(self) -> "Factors":
        """The same, kept as up and down."""
        return self

    def whole(self) -> Tensor:
        """up @ down, `[d, k]`."""
        return self.up @ self.down

    def onto(self, weight: Tensor) -> Tensor:
        """weight + up @ down, `[d, k]`, on the weight's device."""
        return torch.addmm(weight, self.up.to(weight.device), self.down.to(weight.device))

    def of_rows(self, rows: Sequence[tuple[int, int]]) -> "Factors":
        """Some rows of the update, from `start` to `end` each."""
        magnitude = self.magnitude
        return Factors(
            picked(self.up, rows), self.down, None if magnitude is None else picked(magnitude, rows)
        )


def picked(matrix: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Some rows of a matrix, from `start` to `end` each, one below the other."""
    return torch.cat([matrix[start:end] for start, end in rows])


class Layers(dict[str, Factors]):
    """An adapter's layers by name, which nobody changes any more: what follows from them may be kept for as
    long as they are there.
    """

    __slots__ = ("__weakref__",)


STAGED_BYTES = 64 << 20
"""Of factors that go to a GPU at once."""


def to_device(layers: Iterable[tuple[str, Factors]], device: torch.device | str) -> Layers:
    """The same layers on a device: to a GPU many at once, where one copy for each would take longer."""
    if torch.device(device).type != "cuda":
        return Layers((name, factors.to(device)) for name, factors in layers)
    found, staged, size = Layers(), Layers(), 0
    for name, factors in layers:
        nbytes = sum(tensor.nbytes for tensor in factors.held)
        if staged and size + nbytes > STAGED_BYTES:
            found |= _sent(staged, device)
            staged, size = Layers(), 0
        staged[name] = factors
        size += nbytes
    found |= _sent(staged, device)
    return found


def _sent(layers: Layers, device: torch.device | str) -> Layers:
    """As parts of one tensor each of which begins at a multiple of 16 bytes."""
    parts = [tensor for factors in layers.values() for tensor in factors.held]
    if not parts:
        return Layers()
    gaps = [-tensor.numel() % 4 for tensor in parts]
    padded = [
        functional.pad(t.reshape(-1), (0, gap)) if gap else t.reshape(-1)
        for t, gap in zip(parts, gaps, strict=True)
    ]
    places = [len(t) for t in padded]
    pinned = torch.device(device).type == "cuda"
    staged = torch.empty(sum(places), dtype=parts[0].dtype, device="cpu", pin_memory=pinned)
    torch.cat(padded, out=staged)
    there = iter(torch.split(staged.to(device, non_blocking=True), places))

    def moved(part: Tensor) -> Tensor:
        found, n = next(there), part.numel()
        return (found[:n] if n % 4 else found).view(part.shape)

    return Layers((name, f.made_of([moved(tensor) for tensor in f.held])) for name, f in layers.items())


@dataclass(frozen=True, slots=True)
class Core:
    """What the SVD of `up @ diag(c) @ down` needs whatever c is: up `[L, d, R]`, down `[L, R, k]`, root `[L,
    R, R]` with root'root = up'up and its (pseudo-)inverse, gram = down down' `[L, R, R]`; all but up and
    down float64.

    `exact`: the Grams are those of float64; `sound`: up is well enough conditioned for float32 vectors.
    """

    up: Tensor
    down: Tensor
    root: Tensor
    inverse: Tensor
    gram: Tensor
    exact: bool
    sound: bool


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Thin SVD per layer: left `[L, d, q]`, values `[L, q]` descending, right `[L, q, k]`.

    Vectors that belong to negligible values are zero, so that rank-deficient layers need no special case.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def squared_norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_F^2 per layer, `[L]`, float64, from the two Grams."""
    B, A = up.double(), down.double()
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0)


def crossed(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> tuple[Tensor, Tensor]:
    """up' other_up and down other_down' per layer, `[L, r, r']`, float64."""
    return up.double().mT @ other_up.double(), down.double() @ other_down.double().mT


def inner(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> Tensor:
    """<up @ down, other_up @ other_down>_F per layer, `[L]`, float64; no update is formed."""
    ups, downs = crossed(up, down, other_up, other_down)
    return (ups * downs).sum((-2, -1))


def _gram(X: Tensor, *, exact: bool) -> Tensor:
    """X'X per layer, `[L, R, R]`, float64. Not exact: float32 products of blocks of rows, to 1e-7."""
    if exact:
        return X.double().mT @ X.double()
    total = torch.zeros(*X.shape[:-2], X.shape[-1], X.shape[-1], dtype=torch.float64, device=X.device)
    for row in range(0, X.shape[-2], _ROWS):
        block = X[..., row : row + _ROWS, :]
        total += block.mT @ block
    return total


def _finite(gram: Tensor) -> bool:
    return bool(gram.isfinite().all())


def root_of(gram: Tensor) -> tuple[Tensor, Tensor, bool]:
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
    values, vectors = eigh(gram)
    keep = values > values[..., -1:].clamp_min(0) * NEGLIGIBLE**2
    scale = torch.where(keep, values, 0).sqrt()
    inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0)
    return scale.unsqueeze(-1) * vectors.mT, vectors * inverse.unsqueeze(-2), False


def core(up: Tensor, down: Tensor, *, exact: bool = True) -> Core:
    """The weight-independent part of an SVD. Not exact: float32 where the layers are so well conditioned that
    nothing is lost by it, and their squares no overflow.
    """
    if not exact and _finite(gram := _gram(up, exact=False)):
        root, inverse, sound = root_of(gram)
        if sound and _finite(gram := _gram(down.mT, exact=False)):
            return Core(up, down, root, inverse, gram, exact=False, sound=True)
    root, inverse, sound = root_of(_gram(up, exact=True))
    return Core(up, down, root, inverse, _gram(down.mT, exact=True), exact=True, sound=sound)


def orthonormal(up: Tensor, middle: Tensor | None, down: Tensor, *, exact: bool) -> Core:
    """The core of `up @ middle @ down` where the columns of up are orthonormal or zero, and with a middle
    `[L, R, R]` the rows of down, too.
    """
    eye = torch.eye(up.shape[-1], dtype=torch.float64, device=up.device).expand(len(up), -1, -1)
    if middle is not None:
        return Core(up, down, middle.double(), eye, eye, exact, sound=True)
    gram = _gram(down.mT, exact=exact)
    if not exact and not _finite(gram):
        exact, gram = True, _gram(down.mT, exact=True)
    return Core(up, down, eye, eye, gram, exact, sound=True)


Eigen = tuple[Tensor, Tensor]
"""Ascending eigenvalues `[L, R]` and eigenvectors `[L, R, R]`."""


def problem(core: Core, weights: Tensor | None = None) -> Tensor:
    """The symmetric `[L, R, R]`, float64, whose eigenvectors `decompose` asks for. Those of several cores can
    be found at once.
    """
    R = _weighted(core, weights)
    return R @ core.gram @ R.mT


def _weighted(core: Core, weights: Tensor | None) -> Tensor:
    return core.root if weights is None else core.root * weights.double().unsqueeze(-2)


def decompose(
    core: Core,
    weights: Tensor | None = None,
    *,
    rank: int | None = None,
    split: bool = False,
    single: bool = False,
    eigen: Eigen | None = None,
) -> Spectrum:
    """Thin SVD of `up @ diag(weights) @ down`, weights `[L, R]`; signs fixed so that equal inputs give equal
    bytes.

    All values are returned; with `rank`, only that many vectors. With `split`, both sides' vectors are scaled
    by the square roots of the values. `single` vectors are float32 where nothing is lost by it. `eigen` is
    the solution of `problem`, where that is there.
    """
    R = _weighted(core, weights)
    squares, U = eigen or eigh(problem(core, weights))
    values, U = squares.flip(-1).clamp_min(0).sqrt(), U.flip(-1)
    keep = values > values[..., :1] * NEGLIGIBLE
    values = torch.where(keep, values, 0)
    q = values.shape[-1] if rank is None else min(rank, values.shape[-1])
    U, keep, kept = U[..., :q], keep[..., :q], values[..., :q]
    peak = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    U = U * torch.where(peak < 0, -1.0, 1.0) * keep.unsqueeze(-2)
    inverted = torch.where(keep, kept.clamp_min(1e-300).reciprocal(), 0)
    if split:
        half = kept.sqrt()
        to_left, to_right = (
            core.inverse @ (U * half.unsqueeze(-2)),
            (inverted * half).unsqueeze(-1) * (U.mT @ R),
        )
    else:
        to_left, to_right = core.inverse @ U, inverted.unsqueeze(-1) * (U.mT @ R)
    fit = single and core.sound and (split or bool((~keep | (kept > values[..., :1] * _LEVEL)).all()))
    dtype = torch.float64 if core.exact and not fit else torch.float32
    return Spectrum(core.up.to(dtype) @ to_left.to(dtype), values, to_right.to(dtype) @ core.down.to(dtype))


def spectrum(up: Tensor, down: Tensor) -> Spectrum:
    """Thin SVD of `up @ down` for a batch of layers, float64."""
    return decompose(core(up, down))


def polar(rows: Tensor) -> Tensor:
    """(X X')^-1/2 X for rows X `[L, R, n]`: the nearest orthonormal rows (Loewdin). Directions that the rows
    hardly have (similar adapters: below a millionth of the largest) are left out.
    """
    X = rows.double()
    values, vectors = eigh(X @ X.mT)
    keep = values > values[..., -1:].clamp_min(0) * 1e-12
    inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0)
    nearest: Tensor = (vectors * inverse.unsqueeze(-2)) @ (vectors.mT @ X)
    return nearest


def rank_for_energy(values: Tensor, energy: float) -> Tensor:
    """Smallest rank per layer, `[L]`, whose squared values reach the share `energy` (0, 1]; 1 for an empty
    layer.
    """
    cumulative = values.square().cumsum(-1)
    reached = cumulative >= cumulative[..., -1:] * min(energy, 1 - 1e-14)
    return reached.int().argmax(-1) + 1


def rank_for_ratio(values: Tensor, ratio: float) -> Tensor:
    """Number of values per layer, `[L]`, above the largest over `ratio`; 1 for an empty layer."""
    return (values > values[..., :1] / ratio).sum(-1).clamp_min(1)


def cut(s: Spectrum, *, energy: float | None, ratio: float | None) -> tuple[list[Factors], float, float]:
    """A split spectrum as the best approximations there are (Eckart-Young), of the ranks that reach `energy`
    or `ratio` if one is told; squared error and norm of all. The error is the sum of the squared values left
    out: known exactly, the update is never formed.
    """
    left, right = s.left.float(), s.right.float()
    ranks = torch.full((len(left),), left.shape[-1], device=left.device)
    if energy is not None:
        ranks = ranks.minimum(rank_for_energy(s.values, energy))
    elif ratio is not None:
        ranks = ranks.minimum(rank_for_ratio(s.values, ratio))
    told = energy is not None or ratio is not None
    counts = ranks.tolist() if told else [left.shape[-1]] * len(left)  # a GPU is not waited for
    layers = [Factors(left[i, :, :r].contiguous(), right[i, :r].contiguous()) for i, r in enumerate(counts)]
    squares = s.values.square()
    beyond = torch.arange(squares.shape[-1], device=left.device) >= ranks.unsqueeze(-1)
    lost, total = torch.stack([(squares * beyond).sum(), squares.sum()]).tolist()
    return layers, lost, total
