"""What was measured of adapters on this server's base: kept as derived files, or shipped with the demo
adapters.

A calibration belongs to the bytes of an adapter and to a base. Merges that used one record its digest,
because another calibration gives another merge.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from compose.bases import Base
from compose.calibrate import SCENES, from_bytes, prompts, prompts_together, to_bytes
from compose.moments import Moments
from compose.pocket.calibrate import scenes, shipped
from registry.catalog import Catalog
from registry.records import Version

KIND = "moments"
KEPT = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Moments by layer, and the digest of their file."""

    moments: Moments
    digest: str


class Calibrations:
    """The calibrations on one base. Safe to use from several threads."""

    def __init__(self, catalog: Catalog, base: Base) -> None:
        self._catalog, self.base = catalog, base
        self._mutex = threading.Lock()
        self._loaded: OrderedDict[str, Calibration] = OrderedDict()

    def of(self, version: Version) -> Calibration | None:
        """What was measured of a version, if anything was. Raises InvalidRequest for a damaged file."""
        with self._mutex:
            if found := self._loaded.get(version.digest):
                self._loaded.move_to_end(version.digest)
                return found
        data = self._catalog.derived.read(KIND, version.digest, of=self.base.digest)
        if data is None and self.base.name == "pocket" and (path := shipped().get(version.digest)):
            data = path.read_bytes()
        return self._keep(version.digest, data) if data else None

    def keep(self, version: Version, moments: Moments, told: Sequence[str]) -> Calibration:
        """Keeps a measurement in the place of an older one."""
        data = to_bytes(
            moments,
            {"adapter": version.digest, "base": self.base.digest, "prompts": json.dumps(list(told))},
        )
        self._catalog.derived.write(KIND, version.digest, data, of=self.base.digest)
        return self._keep(version.digest, data)

    def prompts(self, trigger: str, count: int) -> list[str]:
        """Prompts that call an adapter in scenes that the base knows."""
        known = scenes(count) if self.base.family == "pocket" else SCENES
        told = prompts(trigger, known)
        return [told[i % len(told)] for i in range(count)]

    def together(self, triggers: Sequence[str], count: int) -> list[str]:
        """Prompts that call several adapters at once: words stand for what is seen, phrases follow."""
        known = scenes(count) if self.base.family == "pocket" else SCENES
        told = prompts_together(triggers, known)
        return [told[i % len(told)] for i in range(count)]

    def _keep(self, digest: str, data: bytes) -> Calibration:
        found = Calibration(from_bytes(data, self.base.family), f"sha256:{hashlib.sha256(data).hexdigest()}")
        with self._mutex:
            self._loaded[digest] = found
            while len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
        return found
