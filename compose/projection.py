"""A few hundred bytes by which adapters that do the same are found among a hundred thousand.

Each layer's update B A is sketched without being formed (TensorSketch: Pham and Pagh, 2013): with random
signs s, t and rows and columns folded into m = COORDINATES buckets,

    b_r = sum_i s_i B[i, r] e(i mod m),   a_r = sum_j t_j A[r, j] e(j mod m),   T(B A) = sum_r b_r * a_r

(* is circular convolution, by FFT), and the layers' sketches are added under random signs of their own. Inner
products of two such sums estimate the Frobenius inner product of the two adapters without bias, whatever
their ranks; one pass over the factors. The standard deviation of an estimated cosine is about 0.1 for
unrelated adapters, and falls to nothing as they agree. The signs come from SHAKE-256, so that a projection is
the same for ever.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from compose.errors import NonFinite
from compose.factors import Factors
from compose.formats.products import Product, inner_product
from compose.threads import heed

COORDINATES = 128
THREADS, PIECE = 2, 32
"""Torch's own threads are one on a small machine, and most of the work is to read; layers that a thread takes
at a time.
"""


class Sketches:
    """The sketches of an adapter's layers, which may come in any order, from several threads."""

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._sketches = torch.empty(len(self._places), COORDINATES)  # one piece: small ones scatter the heap

    def put(self, name: str, layer: Factors) -> None:
        """A layer is here."""
        self._sketches[self._places[name]] = _sketch(name, layer)

    def projection(self) -> bytes:
        """`COORDINATES` float32, when all are here. Raises NonFinite for what float32 cannot hold."""
        total = torch.zeros(COORDINATES)
        for found in self._sketches:  # one after the other, so that rounding is the same for ever
            total += found
        if not bool(total.isfinite().all()):  # no factor is that large, their products are
            raise NonFinite("what these layers come to is beyond float32: the training went wrong")
        return total.numpy().tobytes()


def projection(layers: Mapping[str, Factors]) -> bytes:
    """`COORDINATES` float32 of an adapter's updates; each layer is asked for once, `THREADS` at a time.
    Raises NonFinite for updates that float32 cannot hold.
    """
    names, sketches = list(layers), Sketches(layers)

    def sketch(start: int) -> None:
        for name in names[start : start + PIECE]:
            sketches.put(name, layers[name])

    with ThreadPoolExecutor(THREADS, initializer=heed) as pool:
        try:
            for _ in pool.map(sketch, range(0, len(names), PIECE)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    return sketches.projection()


def _sketch(name: str, layer: Factors) -> Tensor:
    if isinstance(layer, Product):  # both sides folded, each number where the sum of its buckets says
        d, k = layer.shape
        square = layer.to("cpu").between(_buckets("up", d), _buckets("down", k))
        rows = torch.arange(COORDINATES)
        places = (rows[:, None] + rows) % COORDINATES
        sums = torch.zeros(COORDINATES).index_add_(0, places.flatten(), square.flatten())
        return sums.mul_(_signs(name, COORDINATES))
    ups = torch.fft.rfft(_folded(layer.up, "up", dim=0), dim=0)
    downs = torch.fft.rfft(_folded(layer.down, "down", dim=1), dim=1)
    sketch: Tensor = torch.fft.irfft((ups * downs.mT).sum(dim=1), n=COORDINATES)
    return sketch.cpu().mul_(_signs(name, COORDINATES))


def cosine(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> float:
    """Between all updates of two adapters; 0 where one has none. Each layer is asked for once."""
    aa = bb = ab = 0.0
    for name, layer in one.items():
        aa += inner_product(layer, layer)
        if name in other:
            twin = other[name]
            bb += inner_product(twin, twin)
            if layer.shape == twin.shape:
                ab += inner_product(layer, twin)
    bb += sum(inner_product(layer, layer) for name in other if name not in one for layer in [other[name]])
    found = ab / (aa * bb) ** 0.5 if aa and bb else 0.0
    return max(-1.0, min(1.0, found)) if math.isfinite(found) else 0.0


def _folded(matrix: Tensor, side: str, dim: int) -> Tensor:
    """`COORDINATES` along `dim`: what was there, under random signs, added up by its number modulo that."""
    length = matrix.shape[dim]
    signs, whole = _signs(side, length), length - length % COORDINATES
    signs = signs[:, None] if dim == 0 else signs
    signed = matrix * signs.to(matrix.device)
    shape = (*matrix.shape[:dim], whole // COORDINATES, COORDINATES, *matrix.shape[dim + 1 :])
    folded = signed.narrow(dim, 0, whole).reshape(shape).sum(dim)
    folded.narrow(dim, 0, length - whole).add_(signed.narrow(dim, whole, length - whole))
    return folded


@lru_cache(maxsize=16)
def _buckets(side: str, length: int) -> Tensor:
    """`[length, COORDINATES]`, what `_folded` multiplies by from this side."""
    numbers = torch.arange(length)
    found = torch.zeros(length, COORDINATES)
    found[numbers, numbers % COORDINATES] = _signs(side, length)
    return found


@lru_cache(maxsize=4096)
def _signs(what: str, length: int) -> Tensor:
    """`[length]`, 1 and -1."""
    bits = hashlib.shake_256(what.encode()).digest((length + 7) // 8)
    found = np.unpackbits(np.frombuffer(bits, np.uint8))[:length]
    return torch.from_numpy(found.astype(np.float32) * 2 - 1)
