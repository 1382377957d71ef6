"""Which versions are alike: cosines of random projections, kept with each version, a few hundred bytes each.

A projection is a vector of float32 whose inner products estimate those of the adapters it was made from
(`compose.projection`); vectors of one `space` can be compared. An estimate: whoever needs the cosine itself
computes it from the factors of the few that are found.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Projection(NamedTuple):
    """What is kept with a version; an empty vector says that it has none and never will."""

    space: str
    vector: bytes


class Near(NamedTuple):
    """A version, by its row, and the estimated cosine."""

    version: int
    cosine: float


def nearest(vector: bytes, others: Sequence[tuple[int, bytes]], *, at_least: float, limit: int) -> list[Near]:
    """The `limit` others with the largest cosines of `at_least` or more, the largest first."""
    own = np.frombuffer(vector, np.float32)
    kept = [(row, other) for row, other in others if len(other) == len(vector)]
    if not kept or not own.any():
        return []
    matrix = np.frombuffer(b"".join(other for _, other in kept), np.float32).reshape(len(kept), -1)
    norms = np.linalg.norm(matrix, axis=1) * np.linalg.norm(own)
    cosines = np.divide(matrix @ own, norms, out=np.zeros(len(kept), np.float32), where=norms > 0)
    order = np.argsort(-cosines, kind="stable")[:limit]
    return [Near(kept[i][0], float(cosines[i])) for i in order if cosines[i] >= at_least]
