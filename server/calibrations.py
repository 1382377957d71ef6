"""What was measured of adapters on this server's base: kept as derived files, or shipped with the demo
adapters.

A calibration belongs to the bytes of an adapter and to a base. Merges that used one record its digest,
because another calibration gives another merge.
"""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from compose.bases import Base
from compose.calibrate import SCENES, from_bytes, prompts, prompts_together, to_bytes
from compose.errors import InvalidRequest
from compose.moments import Moments
from compose.pocket.calibrate import scenes, shipped
from registry.catalog import Catalog
from registry.records import Version

log = logging.getLogger("atelier")
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
        """What was measured of a version, if anything was; nothing for a damaged file."""
        with self._mutex:
            if found := self._loaded.get(version.digest):
                self._loaded.move_to_end(version.digest)
                return found
        data = self._catalog.derived.read(KIND, version.digest, of=self.base.digest)
        if not data and self.base.name == "pocket":
            path = shipped(self.base.digest).get(version.digest)
            data = path.read_bytes() if path else None
        if not data:
            return None
        try:
            read = self._read(data)
        except InvalidRequest as error:
            log.warning("the calibration of %s is not used: %s", version.ref, error)
            return None
        with self._mutex:  # whoever measured anew meanwhile is right
            return self._loaded.setdefault(version.digest, read)

    def keep(self, version: Version, moments: Moments, told: Sequence[str]) -> Calibration:
        """Keeps a measurement in the place of an older one."""
        data = to_bytes(
            moments,
            {"adapter": version.digest, "base": self.base.digest, "prompts": json.dumps(list(told))},
        )
        found = self._read(data)
        self._catalog.derived.write(KIND, version.digest, data, of=self.base.digest)
        with self._mutex:
            self._loaded[version.digest] = found
            while len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
        return found

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

    def _read(self, data: bytes) -> Calibration:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return Calibration(from_bytes(data, self.base.family), digest)
