"""Float32 products out of float16 ones, which tensor cores make fastest: each factor is what a float16 holds
of it and the rest, and three products of such halves come to float32's accuracy (Ootomo and Yokota,
"Recovering single precision accuracy from Tensor Cores", arXiv 2203.03341).

A float16 ends at 65504, and below 2**-14 it holds ever less; so powers of two, which change no digit, move
both factors between the two, and the sum back.
"""

import numpy as np
from numpy.typing import NDArray

LARGEST, SMALLEST = 40, -60
"""Exponents of factors that are moved: larger numbers are no weights, smaller ones nothing beside them."""

_TOP, _MOST = 15, 100
"""A moved number is below 2**_TOP; a sum moved by 2**_MOST is still far from what a float32 ends at."""

Whole = NDArray[np.int64]
Single = NDArray[np.float32]


def exponents(largest: NDArray[np.float64]) -> Whole:
    """The least e of each with largest < 2**e; above LARGEST for what is no finite number."""
    with np.errstate(invalid="ignore"):
        found = np.frexp(largest)[1].astype(np.int64)
    return np.where(np.isfinite(largest), np.maximum(found, SMALLEST), LARGEST + 1)


def moves(weight: Single, up: Whole, down: Whole) -> tuple[Single, Single, Single]:
    """What the ups and the downs of layers `[n, p]` are multiplied by, ups with their weights, and what the
    sum of a layer's products `[n]` is multiplied by then; `up` and `down` are `exponents`. A part of weight 0
    tells of nothing.
    """
    left, there = up + np.frexp(weight)[1], weight != 0
    largest = np.max(left + down, axis=1, where=there, initial=2 * _TOP - _MOST)
    shift = 2 * _TOP - largest
    by = (shift[:, None] + down - left) // 2
    ups = np.where(there, np.ldexp(weight.astype(np.float64), by), 0)
    downs = np.where(there, np.ldexp(1.0, shift[:, None] - by), 0)
    return ups.astype(np.float32), downs.astype(np.float32), np.ldexp(1.0, -shift).astype(np.float32)
