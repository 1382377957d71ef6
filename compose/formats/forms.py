"""The forms an update is stored in, each as its shapes tell and as exact factors: no SVD, nothing lost.

    lora    up · down                                        rank r
    tucker  up · (mid x1 down), LoCon's `lora_mid`           rank r
    loha    (w1_a w1_b) * (w2_a w2_b), elementwise           rank r1 r2
    lokr    w1 (x) w2, Kronecker; each whole or as a · b     rank n1 n2, n the smallest inner side of each

(LyCORIS: arXiv 2309.14859, and its `modules/`.) A convolution is flattened to k = in * kh * kw, and all of
this holds unchanged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.errors import UnsupportedLayout
from compose.factors import NEGLIGIBLE, Spectrum
from compose.lapack import alone

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """An update `[d, k]`, the rank of its factors, and `dim`, by which alpha is divided (0: not at all)."""

    d: int
    k: int
    rank: int
    dim: int


@dataclass(frozen=True, slots=True)
class Form:
    """`size` reads the shapes of the tensors by role, and raises Misfit; `rebuild` makes up `[d, rank]` and
    down `[rank, k]` of the tensors, without alpha. A product, which may be smaller than its factors, also
    says how its update `[d, k]` is made, `whole`; and may know better than any matrix its thin SVD of so many
    vectors, its `inner` product with another (None if they are not alike), and what is `between` two matrices
    `[d, m]` and `[k, n]`: left' · update · right `[m, n]`.
    """

    size: Callable[[Shapes], Size]
    rebuild: Callable[[Tensors], tuple[Tensor, Tensor]]
    whole: Callable[[Tensors], Tensor] | None = None
    svd: Callable[[Tensors, int | None], Spectrum] | None = None
    inner: Callable[[Tensors, Tensors], float | None] | None = None
    between: Callable[[Tensors, Tensor, Tensor], Tensor] | None = None


class Misfit(UnsupportedLayout):
    """Tensors of one layer that do not fit each other."""


def form(roles: Mapping[str, object]) -> str:
    """Which form the tensors of a layer are of, by their roles. Raises Misfit naming what is missing."""
    have = roles.keys() - {"alpha", "magnitude", "dora_scale"}
    if any(role.startswith("hada_") for role in have):
        tucker = {"hada_t1", "hada_t2"} if have & {"hada_t1", "hada_t2"} else set()
        name, needs = "loha", {f"hada_w{i}_{side}" for i in "12" for side in "ab"} | tucker
    elif any(role.startswith("lokr_") for role in have):
        name, needs = "lokr", set()
        for half in ("lokr_w1", "lokr_w2"):
            needs |= {half} if half in have else {f"{half}_a", f"{half}_b"}
        needs |= have & {"lokr_t2"} if "lokr_w2" not in have else set()
    else:
        name, needs = ("tucker", {"mid", "up", "down"}) if "mid" in have else ("lora", {"up", "down"})
    if lack := sorted(needs - have):
        raise Misfit(f"has no matching {' and '.join(lack)}; the file is incomplete, export it again")
    if more := sorted(have - needs):
        raise Misfit(f"has {' and '.join(more)} besides {' and '.join(sorted(needs))}: which is meant?")
    return name


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """`[out, in, …]` -> `[out, in * …]`."""
    if len(shape) not in {2, 4} or 0 in shape:
        raise Misfit("a matrix is [out, in] or [out, in, height, width]")
    return shape[0], shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)


def _pointwise(shape: tuple[int, ...]) -> tuple[int, int]:
    if shape[2:] not in {(), (1, 1)}:
        raise Misfit("this side is [out, in] or [out, in, 1, 1]")
    return _flat(shape)


def _core(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """`[r, q, kh, kw]` -> r, q, kh * kw."""
    if len(shape) != 4 or 0 in shape:
        raise Misfit("a Tucker core is [rank, rank, height, width]")
    return shape[0], shape[1], shape[2] * shape[3]


def _agree(one: int, other: int, what: str) -> None:
    if one != other:
        raise Misfit(what)


def _lora_size(shapes: Shapes) -> Size:
    (d, r), (inner, k) = _pointwise(shapes["up"]), _flat(shapes["down"])
    _agree(r, inner, "up is [out, rank], down is [rank, in]")
    return Size(d, k, r, r)


def _lora(tensors: Tensors) -> tuple[Tensor, Tensor]:
    return tensors["up"].flatten(1), tensors["down"].flatten(1)


def _tucker_size(shapes: Shapes) -> Size:
    (d, r), (q, k) = _pointwise(shapes["up"]), _pointwise(shapes["down"])
    i, j, kernel = _core(shapes["mid"])
    _agree(r, i, "up is [out, rank], mid is [rank, rank, height, width]")
    _agree(q, j, "mid is [rank, rank, height, width], down is [rank, in]")
    return Size(d, k * kernel, r, q)


def _tucker(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """down'[i, (c h w)] = sum_j mid[i, j, h, w] down[j, c] (LyCORIS, `tucker_weight_from_conv`)."""
    return tensors["up"].flatten(1), _through(tensors["mid"], tensors["down"].flatten(1))


def _through(core: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("ijhw,jc->ichw", core, down).flatten(1)


def _half_size(shapes: Shapes, half: str) -> tuple[int, int, int]:
    """d, k and rank of one factor of a LoHa."""
    a, b, core = shapes[f"hada_w{half}_a"], shapes[f"hada_w{half}_b"], shapes.get(f"hada_t{half}")
    (d, r), (q, k) = _flat(a), _flat(b)
    if core is None:
        _agree(r, q, "w_a is [out, rank], w_b is [rank, in]")
        return d, k, r
    i, j, kernel = _core(core)
    _agree(d, i, "in Tucker form w_a is [rank, out], the core [rank, rank, height, width]")
    _agree(q, j, "in Tucker form w_b is [rank, in], the core [rank, rank, height, width]")
    return r, k * kernel, i


def _loha_size(shapes: Shapes) -> Size:
    (d, k, r), (d2, k2, r2) = _half_size(shapes, "1"), _half_size(shapes, "2")
    _agree(d, d2, "both products of a LoHa are of one shape")
    _agree(k, k2, "both products of a LoHa are of one shape")
    return Size(d, k, min(r * r2, d, k), shapes["hada_w1_b"][0])


def _half(tensors: Tensors, half: str) -> tuple[Tensor, Tensor]:
    a, b = tensors[f"hada_w{half}_a"].flatten(1), tensors[f"hada_w{half}_b"].flatten(1)
    core = tensors.get(f"hada_t{half}")
    return (a, b) if core is None else (a.mT, _through(core, b))


def _loha(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """(A B) * (C D) = KR_rows(A, C) · KR_columns(B, D): row i of `up` is A_i (x) C_i, column j of `down`
    B^j (x) D^j (Khatri and Rao, 1968). Where that is wider than the update, the update and a unit matrix.
    """
    (A, B), (C, D) = _half(tensors, "1"), _half(tensors, "2")
    (d, r), k, r2 = A.shape, B.shape[1], C.shape[1]
    if r * r2 > min(d, k):
        return _beside_a_unit(_loha_whole(tensors))
    return (A[:, :, None] * C[:, None, :]).flatten(1), (B[:, None, :] * D[None, :, :]).flatten(0, 1)


def _loha_whole(tensors: Tensors) -> Tensor:
    (A, B), (C, D) = _half(tensors, "1"), _half(tensors, "2")
    return ((A.double() @ B.double()) * (C.double() @ D.double())).to(A.dtype)


def _beside_a_unit(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as left · right, of its smaller side."""
    d, k = matrix.shape
    unit = torch.eye(min(d, k), dtype=matrix.dtype, device=matrix.device)
    return (matrix, unit) if k <= d else (unit, matrix)


def _lokr_half(shapes: Shapes, half: str) -> tuple[int, int, int, int]:
    """d, k, smallest inner side and given rank (0 where whole) of one factor of a LoKr."""
    if half in shapes:
        d, k = _flat(shapes[half])
        return d, k, min(d, k), 0
    (d, r), (q, k) = _flat(shapes[f"{half}_a"]), _flat(shapes[f"{half}_b"])
    if half == "lokr_w2" and (core := shapes.get("lokr_t2")):
        i, j, kernel = _core(core)
        _agree(d, i, "in Tucker form w2_a is [rank, out], the core [rank, rank, height, width]")
        _agree(q, j, "in Tucker form w2_b is [rank, in], the core [rank, rank, height, width]")
        return r, k * kernel, min(r, i, k * kernel), q
    _agree(r, q, f"{half}_a is [out, rank], {half}_b is [rank, in]")
    return d, k, min(d, k, r), r


def _lokr_size(shapes: Shapes) -> Size:
    (a, b, n, r), (c, e, m, r2) = _lokr_half(shapes, "lokr_w1"), _lokr_half(shapes, "lokr_w2")
    return Size(a * c, b * e, n * m, r or r2)  # with both whole LyCORIS' scale is 1, whatever alpha says


def _lokr_pair(tensors: Tensors, half: str) -> tuple[Tensor, Tensor] | None:
    """One factor as left · right, where it is stored so."""
    if half in tensors:
        return None
    left, right = tensors[f"{half}_a"].flatten(1), tensors[f"{half}_b"].flatten(1)
    core = tensors.get("lokr_t2") if half == "lokr_w2" else None
    return (left, right) if core is None else (left.mT, _through(core, right))


def _lokr_matrix(tensors: Tensors, half: str) -> Tensor:
    """One factor as a matrix."""
    pair = _lokr_pair(tensors, half)
    if pair is None:
        return tensors[half].flatten(1)
    left, right = pair
    return (left.double() @ right.double()).to(left.dtype)


def _lokr_thin(tensors: Tensors, half: str) -> tuple[Tensor, Tensor]:
    """One factor as left · right with the smallest inner side there is."""
    pair = _lokr_pair(tensors, half)
    if pair and pair[0].shape[1] <= min(pair[0].shape[0], pair[1].shape[1]):
        return pair
    return _beside_a_unit(_lokr_matrix(tensors, half))


def _lokr_whole(tensors: Tensors) -> Tensor:
    return torch.kron(*(_lokr_matrix(tensors, half).contiguous() for half in ("lokr_w1", "lokr_w2")))


def _lokr_svd(tensors: Tensors, rank: int | None) -> Spectrum:
    """(U S V') (x) (P T Q') = (U (x) P) (S (x) T) (V (x) Q)' (Van Loan, 2000), values descending; float64."""
    halves = (_lokr_matrix(tensors, half).double() for half in ("lokr_w1", "lokr_w2"))
    (U, S, Vt), (P, T, Qt) = (alone(_thin_svd, matrix) for matrix in halves)
    values, order = torch.outer(S, T).flatten().sort(descending=True, stable=True)
    values = torch.where(values > values[:1] * NEGLIGIBLE, values, 0)
    i, j = order[:rank] // len(T), order[:rank] % len(T)
    left = torch.einsum("aq,cq->acq", U[:, i], P[:, j]).flatten(0, 1)
    right = torch.einsum("qb,qe->qbe", Vt[i], Qt[j]).flatten(1)
    return Spectrum(left[None], values[None], right[None])


def _lokr(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """(A B) (x) (C D) = (A (x) C) · (B (x) D). The kernel of a convolution is in the second factor alone, so
    its columns come out in the order in, height, width.
    """
    (A, B), (C, D) = _lokr_thin(tensors, "lokr_w1"), _lokr_thin(tensors, "lokr_w2")
    return torch.kron(A.contiguous(), C.contiguous()), torch.kron(B.contiguous(), D.contiguous())


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vt


def _lokr_inner(one: Tensors, other: Tensors) -> float | None:
    """<A (x) B, C (x) D> = <A, C> <B, D>, float64."""
    found = 1.0
    for half in ("lokr_w1", "lokr_w2"):
        A, B = _lokr_matrix(one, half).double(), _lokr_matrix(other, half).double()
        if A.shape != B.shape:
            return None
        found *= float((A * B).sum())
    return found


def _lokr_between(tensors: Tensors, left: Tensor, right: Tensor) -> Tensor:
    """left' (A (x) B) right, by (A (x) B) vec(X) = vec(B X A')."""
    A, B = (_lokr_matrix(tensors, half) for half in ("lokr_w1", "lokr_w2"))
    inner = torch.einsum("ce,ben->bcn", B, right.view(A.shape[1], B.shape[1], -1))
    return left.mT @ (A @ inner.flatten(1)).view(-1, right.shape[1])


FORMS: Mapping[str, Form] = {
    "lora": Form(_lora_size, _lora),
    "tucker": Form(_tucker_size, _tucker),
    "loha": Form(_loha_size, _loha, _loha_whole),
    "lokr": Form(_lokr_size, _lokr, _lokr_whole, _lokr_svd, _lokr_inner, _lokr_between),
}
