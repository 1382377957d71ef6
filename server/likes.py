"""Which versions do the same as another: found by their projections, measured by their factors.

A check-in tells estimates (`compose.projection`), good to 0.01 where they matter: a file takes no time to be
compared with all others. Whoever asks is told cosines computed from the files of the few that estimates
choose, a layer of each in memory at a time.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from compose import formats
from compose.errors import ComposeError, InvalidRequest
from compose.factors import Factors
from compose.projection import cosine, projection
from registry.catalog import Catalog
from registry.errors import RegistryError
from registry.headers import read_header
from registry.nearest import Projection
from registry.records import Version
from server.checkin import LORA, TEXTUAL_INVERSION, as_layers, recognise

ALIKE = 0.95
"""A cosine that deserves a word at check-in."""
SLACK, CANDIDATES = 0.2, 20
Similar = list[tuple[Version, float]]


class Likes:
    """Safe to use from several threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._one = threading.Lock()

    def nearly(self, version: Version) -> Similar:
        """Versions that are ALIKE by estimate, the nearest first."""
        near = self._catalog.nearest(version, at_least=ALIKE, limit=CANDIDATES)
        return [(other, min(value, 1.0)) for other, value in near]

    def of(self, version: Version, at_least: float) -> Similar:
        """Versions of this kind and family with a cosine of `at_least` or more, the nearest first.

        Raises InvalidRequest for a kind that has no weights of its own.
        """
        if version.kind not in {LORA, TEXTUAL_INVERSION}:
            raise InvalidRequest(f"{version.ref} is a {version.kind}: it has no weights", field="ref")
        with self._one:
            self._project_older()
        near = self._catalog.nearest(version, at_least=at_least - SLACK, limit=CANDIDATES)
        found = [(other, self._cosine(version, other)) for other, _ in near]
        return sorted(
            ((v, value) for v, value in found if value >= at_least), key=lambda pair: (-pair[1], pair[0].ref)
        )

    def _project_older(self) -> None:
        """Versions that were checked in before projections were kept."""
        while older := self._catalog.unprojected((LORA, TEXTUAL_INVERSION)):
            for version in older:
                try:
                    with self._layers(version) as layers:
                        vector = projection(layers)
                except (ComposeError, RegistryError, OSError):  # damaged: `verify` tells of it
                    vector = b""
                self._catalog.project(
                    version, Projection(f"{version.kind}/{version.facts['family']}", vector)
                )

    def _cosine(self, one: Version, other: Version) -> float:
        try:
            with self._layers(one) as a, self._layers(other) as b:
                return cosine(a, b)
        except (ComposeError, RegistryError, OSError):
            return 0.0

    @contextmanager
    def _layers(self, version: Version) -> Iterator[Mapping[str, Factors]]:
        path = self._catalog.blobs.path(version.digest)
        config = str(version.facts.get("declared", {}).get("adapter_config", ""))
        sketch = recognise(read_header(path), config)
        if sketch.is_words:
            yield as_layers(formats.load_words(path, sketch))
            return
        with formats.layers(
            path, formats.require(sketch, version.facts["family"], what=version.ref)
        ) as found:
            yield found
