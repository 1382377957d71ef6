"""Which versions are alike: cosines of random projections, kept with each version, a few hundred bytes each.

A projection is a vector of float32 whose inner products estimate those of the adapters it was made from
(`compose.projection`); vectors of one `space` can be compared. An estimate: whoever needs the cosine itself
computes it from the factors of the few that are found.

Every check-in asks what is near, so the vectors of versions that are there are held in memory, of length 1,
a matrix for each space: 512 bytes a version, 50 MB for 100,000, where reading them each time took 0.18 s.
Invariant: `Nearby` holds what a reader of the database would find; it is told of every change before the next
transaction begins, and being told twice does no harm.
"""

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ROOM = 1024
"""Rows that a matrix begins with."""


class Projection(NamedTuple):
    """What is kept with a version; an empty vector says that it has none and never will."""

    space: str
    vector: bytes


class Near(NamedTuple):
    """A version, by its row, and the estimated cosine."""

    version: int
    cosine: float


class Nearby:
    """The projections of all versions that are not deleted. Safe to use from several threads.

    `load` gives (version, space, vector) of each; it is called once, when somebody asks.
    """

    def __init__(self, load: Callable[[], Iterable[tuple[int, str, bytes]]]) -> None:
        self._load = load
        self._mutex, self._loaded = threading.Lock(), False
        self._spaces: dict[tuple[str, int], _Vectors] = {}
        self._where: dict[int, _Vectors] = {}

    def add(self, version: int, projection: Projection) -> None:
        """A version is there; the vector may be another than before."""
        with self._mutex:
            if self._loaded:
                self._add(version, projection)

    def remove(self, version: int) -> None:
        """A version is not there any more."""
        with self._mutex:
            if vectors := self._where.pop(version, None):
                vectors.remove(version)

    def nearest(self, version: int, *, at_least: float, limit: int) -> list[Near]:
        """The `limit` others with the largest cosines of `at_least` or more, the largest first."""
        with self._mutex:
            if not self._loaded:
                for other, space, vector in self._load():
                    self._add(other, Projection(space, vector))
                self._loaded = True
            vectors = self._where.get(version)
            return vectors.nearest(version, at_least=at_least, limit=limit) if vectors else []

    def _add(self, version: int, projection: Projection) -> None:
        vector = np.frombuffer(projection.vector, np.float32)
        length = float(np.linalg.norm(vector.astype(np.float64)))  # its square may exceed float32
        if before := self._where.pop(version, None):
            before.remove(version)
        if not 0 < length < np.inf:
            return
        key = projection.space, len(vector)
        vectors = self._spaces.setdefault(key, _Vectors(len(vector)))
        vectors.put(version, vector / length)
        self._where[version] = vectors


class _Vectors:
    """Vectors `[count, width]` of one space; the last takes the place of one that goes."""

    def __init__(self, width: int) -> None:
        self._matrix = np.empty((ROOM, width), np.float32)
        self._versions = np.empty(ROOM, np.int64)
        self._places: dict[int, int] = {}

    def put(self, version: int, vector: npt.NDArray[np.float32]) -> None:
        count = len(self._places)
        if count == len(self._matrix):
            self._matrix = np.concatenate(
                [self._matrix, np.empty_like(self._matrix[: max(ROOM, count // 4)])]
            )
            self._versions = np.resize(self._versions, len(self._matrix))
        self._matrix[count], self._versions[count], self._places[version] = vector, version, count

    def remove(self, version: int) -> None:
        place, last = self._places.pop(version), len(self._places)
        if place != last:
            self._matrix[place], self._versions[place] = self._matrix[last], self._versions[last]
            self._places[int(self._versions[place])] = place

    def nearest(self, version: int, *, at_least: float, limit: int) -> list[Near]:
        count, own = len(self._places), self._places[version]
        cosines = self._matrix[:count] @ self._matrix[own]
        cosines[own] = -np.inf
        found = np.flatnonzero(cosines >= at_least)
        order = np.lexsort((self._versions[found], -cosines[found]))[:limit]
        return [Near(int(self._versions[i]), float(cosines[i])) for i in found[order]]
