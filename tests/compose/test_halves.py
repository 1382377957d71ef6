"""Products of float32 in halves of float16: moved where a float16 holds them, they lose nothing."""

import numpy as np
import pytest

from compose import halves
from compose.halves import Single


def halved(x: Single) -> tuple[Single, Single]:
    """What a float16 holds of each, and what one holds of the rest."""
    high = x.astype(np.float16).astype(np.float32)
    return high, (x - high).astype(np.float16).astype(np.float32)


def product(parts: list[tuple[float, Single, Single]]) -> Single:
    """The sum of weighted products, as the kernel makes it."""
    weight = np.array([[weight for weight, *_ in parts]], np.float32)
    up, down = (halves.exponents(np.array([[abs(part[i]).max() for part in parts]])) for i in (1, 2))
    ups, downs, back = halves.moves(weight, up, down)
    total = np.zeros((parts[0][1].shape[0], parts[0][2].shape[1]), np.float32)
    for (_, left, right), up_by, down_by in zip(parts, ups[0], downs[0], strict=True):
        (a, b), (c, d) = halved(left * up_by), halved(right * down_by)
        assert np.isfinite([*a.flat, *c.flat]).all()
        total += b @ c + a @ d + a @ c
    return total * back[0]


def factors(up: float, down: float, seed: int = 0) -> tuple[Single, Single]:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((24, 8)) * up, rng.standard_normal((8, 40)) * down
    return left.astype(np.float32), right.astype(np.float32)


@pytest.mark.parametrize("weight", [1.0, -0.3, 1e-6, 40.0])
@pytest.mark.parametrize("up", [1e-9, 1e-3, 1.0, 3e4, 1e9])
@pytest.mark.parametrize("down", [1e-9, 1e-3, 1.0, 3e4, 1e9])
def test_a_product_is_as_exact_as_float32s(weight: float, up: float, down: float) -> None:
    left, right = factors(up, down)
    meant = np.float64(np.float32(weight)) * left.astype(np.float64) @ right
    assert abs(product([(weight, left, right)]) - meant).max() <= 2**-21 * abs(meant).max()


def test_a_small_part_beside_a_large_one_is_as_exact_as_their_sum() -> None:
    parts = [(0.5, *factors(1e4, 1e3, 1)), (2.0, *factors(1e-6, 1e-3, 2)), (1e-5, *factors(1.0, 1.0, 3))]
    meant = sum(np.float64(np.float32(w)) * left.astype(np.float64) @ right for w, left, right in parts)
    assert abs(product(parts) - meant).max() <= 2**-21 * abs(meant).max()


def test_what_is_no_number_or_too_large_is_told_apart() -> None:
    found = halves.exponents(np.array([0.0, 1e-40, 0.75, 1.0, 2.0**39, 1e300, np.inf, np.nan]))
    assert found[:4].tolist() == [0, halves.SMALLEST, 0, 1]
    assert (found <= halves.LARGEST).tolist() == [True] * 5 + [False] * 3


def test_parts_that_are_not_there_move_nothing() -> None:
    ups, downs, back = halves.moves(np.zeros((2, 3), np.float32), *[np.zeros((2, 3), np.int64)] * 2)
    assert not ups.any()
    assert not downs.any()
    assert (back > 0).all()
