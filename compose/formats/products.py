"""Updates kept as the products that their file stores: a LoKr of whole matrices, a LoHa of high rank.

As factors they are of a layer's full rank, and take more memory than the layer does. As products they take
what they take on disk, and the update is formed in one pass over the layer, cheaper than from any factors;
those are made for whoever asks for them, a layer at a time.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compose.factors import Factors, Spectrum, inner, picked, rank_for_energy, rank_for_ratio
from compose.formats.forms import FORMS

_SCALED = ("lokr_w1", "lokr_w1_a", "hada_w1_a")
"""Roles of which each product has one, and is linear in it."""


def is_smaller(form: str, d: int, k: int, rank: int) -> bool:
    """Whether an update `[d, k]` is kept as the product it is: factors of it would hold more numbers than the
    update itself.
    """
    return FORMS[form].whole is not None and rank * (d + k) > d * k


class Product(Factors):
    """One layer's update `[d, k]`, of the form `form`: tensors by role, whose first takes the scale. Of its
    rows those from start to end of each of `rows`, or all.
    """

    __slots__ = ("_rows", "_tensors", "form", "magnitude", "rank", "shape")

    form: str
    rank: int
    shape: tuple[int, int]
    magnitude: Tensor | None
    _rows: tuple[tuple[int, int], ...]
    _tensors: Mapping[str, Tensor]

    def __init__(
        self,
        form: str,
        tensors: Mapping[str, Tensor],
        magnitude: Tensor | None,
        *,
        rank: int,
        shape: tuple[int, int],
        rows: Sequence[tuple[int, int]] = (),
    ) -> None:
        told = {"form": form, "_tensors": tensors, "magnitude": magnitude, "rank": rank, "shape": shape}
        for name, value in {**told, "_rows": tuple(rows)}.items():
            object.__setattr__(self, name, value)  # frozen, as factors are

    @classmethod
    def scaled(
        cls,
        form: str,
        tensors: Mapping[str, Tensor],
        magnitude: Tensor | None,
        *,
        scale: float,
        rank: int,
        shape: tuple[int, int],
    ) -> "Product":
        """Of a file's tensors."""
        role = next(role for role in _SCALED if role in tensors)
        held = {**tensors, role: tensors[role] * scale} if scale != 1 else tensors
        return cls(form, held, magnitude, rank=rank, shape=shape)

    @property
    def up(self) -> Tensor:
        """`[d, r]`, made anew: ask for both sides by `formed`."""
        return self.formed().up

    @property
    def down(self) -> Tensor:
        """`[r, k]`, made anew."""
        return self.formed().down

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors of the file."""
        tensors = tuple(self._tensors.values())
        return tensors if self.magnitude is None else (*tensors, self.magnitude)

    def made_of(self, held: Sequence[Tensor]) -> "Product":
        """The same, of copies of what is `held`."""
        n = len(self._tensors)
        tensors = dict(zip(self._tensors, held[:n], strict=True))
        magnitude = held[n] if len(held) > n else None
        return Product(self.form, tensors, magnitude, rank=self.rank, shape=self.shape, rows=self._rows)

    def to(self, device: torch.device | str) -> "Product":
        """The same on a device."""
        return self.made_of([tensor.to(device) for tensor in self.held])

    def formed(self) -> Factors:
        """As up and down."""
        up, down = FORMS[self.form].rebuild(self._tensors)
        return Factors(picked(up, self._rows) if self._rows else up, down.contiguous(), self.magnitude)

    def whole(self) -> Tensor:
        """The update, `[d, k]`."""
        form = FORMS[self.form]
        assert form.whole
        delta = form.whole(self._tensors)
        return picked(delta, self._rows) if self._rows else delta

    def onto(self, weight: Tensor) -> Tensor:
        """weight + the update, on the weight's device."""
        return weight + self.to(weight.device).whole()

    def of_rows(self, rows: Sequence[tuple[int, int]]) -> "Product":
        """Some rows of the update, from start to end each. Not of some rows again."""
        magnitude = None if self.magnitude is None else picked(self.magnitude, rows)
        shape = sum(end - start for start, end in rows), self.shape[1]
        return Product(self.form, self._tensors, magnitude, rank=self.rank, shape=shape, rows=rows)

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """left' · update · right, `[m, n]` of `[d, m]` and `[k, n]`."""
        between = FORMS[self.form].between
        if between is None or self._rows:
            return left.mT @ (self.whole() @ right)
        return between(self._tensors, left, right)

    def inner(self, other: "Product") -> float | None:
        """<self, other>_F, float64, where the form makes it cheap."""
        inner = FORMS[self.form].inner
        if inner is None or self.form != other.form or self._rows or other._rows:
            return None
        return inner(self._tensors, other._tensors)

    def spectrum(
        self, weight: float, *, rank: int | None, energy: float | None, ratio: float | None
    ) -> Spectrum | None:
        """The SVD of weight times the update, as a batch of one layer, split, of as many vectors as `cut`
        keeps; None where the form does not make it cheap.
        """
        svd = FORMS[self.form].svd
        if svd is None or self._rows or self.magnitude is not None:
            return None
        if energy is not None or ratio is not None:
            values = svd(self._tensors, 0).values
            found = (
                rank_for_energy(values, energy)
                if energy is not None
                else rank_for_ratio(values, ratio or 1.0)
            )
            rank = int(found)
        s = svd(self._tensors, rank)
        values = s.values * abs(weight)
        half = values[:, : s.left.shape[-1]].sqrt()
        right = s.right * half.unsqueeze(-1)
        return Spectrum(s.left * half.unsqueeze(-2), values, right if weight >= 0 else -right)


def products(layers: Mapping[str, Factors]) -> list[str]:
    """Which of an adapter's layers are products; a file's are not read for it."""
    told = getattr(layers, "is_product", None)
    return [name for name in layers if (told(name) if told else isinstance(layers[name], Product))]


def inner_product(one: Factors, other: Factors) -> float:
    """<one, other>_F of two updates of one shape, float64. Products are not made factors of for it."""
    if isinstance(one, Product) and isinstance(other, Product) and (found := one.inner(other)) is not None:
        return found
    if isinstance(one, Product) and isinstance(other, Product):
        return float((one.whole() * other.whole()).sum(dtype=torch.float64))
    if isinstance(one, Product):
        exact = one.made_of([tensor.double() for tensor in one.held])
        return float(exact.between(other.up.double(), other.down.double().mT).trace())
    if isinstance(other, Product):
        return inner_product(other, one)
    return float(inner(one.up, one.down, other.up, other.down))
