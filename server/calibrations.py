"""What was measured of adapters on this server's bases: kept as derived files, or shipped with the demo
adapters.

A calibration belongs to the bytes of an adapter and to a base. Merges that used one record its digest,
because another calibration gives another merge; so one that was measured anew is kept beside the new one, and
whoever names it finds it.
"""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compose.bases import Base
from compose.calibrate import SCENES, from_bytes, prompts_together, to_bytes
from compose.errors import InvalidRequest
from compose.moments import Moments
from compose.pocket.calibrate import scenes, shipped
from registry.catalog import Catalog
from registry.records import Version
from server.served import Served

log = logging.getLogger("atelier")
KIND = "moments"
KEPT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Calibration:
    """Moments by layer, the digest of their file, and bytes of them."""

    moments: Moments
    digest: str
    size: int


class Calibrations:
    """The calibrations on a server's bases. Safe to use from several threads."""

    def __init__(self, catalog: Catalog, served: Served) -> None:
        self._catalog, self.served = catalog, served
        self._mutex = threading.Lock()
        self._loaded: OrderedDict[tuple[str, str], Calibration] = OrderedDict()

    def of(self, version: Version, base: Base) -> Calibration | None:
        """What was measured of a version on a base, if anything was; nothing for a damaged file."""
        key = version.digest, base.digest
        with self._mutex:
            if found := self._loaded.get(key):
                self._loaded.move_to_end(key)
                return found
        return self._load(version, base, self._data(version, base), key)

    def _data(self, version: Version, base: Base) -> bytes | None:
        data = self._catalog.derived.read(KIND, version.digest, of=base.digest)
        if not data and base.family == "pocket":
            path = shipped(base.digest).get(version.digest)
            data = path.read_bytes() if path else None
        return data

    def _load(
        self, version: Version, base: Base, data: bytes | None, key: tuple[str, str]
    ) -> Calibration | None:
        if not data:
            return None
        try:
            read = _read(data, base)
        except InvalidRequest as error:
            log.warning("the calibration of %s is not used: %s", version.ref, error)
            return None
        with self._mutex:  # whoever measured anew meanwhile is right
            found = self._loaded.setdefault(key, read)
            self._trim()
            return found

    def kept(self, version: Version, digest: str) -> Calibration | None:
        """The measurement of this digest, on whichever base it was made, and whether or not one was made
        since.
        """
        alike = [b for b in self.served.bases if version.facts["family"] in {"", b.family}]
        found = (c for look in (self.of, self._older(digest)) for base in alike if (c := look(version, base)))
        return next((calibration for calibration in found if calibration.digest == digest), None)

    def _older(self, digest: str) -> Callable[[Version, Base], Calibration | None]:
        def look(version: Version, base: Base) -> Calibration | None:
            key = version.digest, _replaced(base, digest)
            with self._mutex:
                if found := self._loaded.get(key):
                    return found
            return self._load(version, base, self._catalog.derived.read(KIND, key[0], of=key[1]), key)

        return look

    def keep(self, version: Version, base: Base, moments: Moments, told: Sequence[str]) -> Calibration:
        """Keeps a measurement in the place of an older one, which is found by its digest from now on."""
        data = to_bytes(
            moments,
            {"adapter": version.digest, "base": base.digest, "prompts": json.dumps(list(told))},
        )
        found = _read(data, base)
        if (before := self._data(version, base)) and before != data:
            self._catalog.derived.write(KIND, version.digest, before, of=_replaced(base, _digest(before)))
        self._catalog.derived.write(KIND, version.digest, data, of=base.digest)
        with self._mutex:
            self._loaded[version.digest, base.digest] = found
            self._trim()
        return found

    def _trim(self) -> None:
        while len(self._loaded) > 1 and sum(c.size for c in self._loaded.values()) > KEPT_BYTES:
            self._loaded.popitem(last=False)


def calling(triggers: Sequence[str], base: Base, count: int) -> list[str]:
    """Prompts that call adapters at once in scenes that the base knows: words stand for what is seen, phrases
    follow.
    """
    told = prompts_together(triggers, scenes(count) if base.family == "pocket" else SCENES)
    return [told[i % len(told)] for i in range(count)]


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _replaced(base: Base, digest: str) -> str:
    """What a measurement depends on that is not the newest on its base."""
    return f"{base.digest} {digest}"


def _read(data: bytes, base: Base) -> Calibration:
    return Calibration(from_bytes(data, base.family), _digest(data), 2 * len(data))  # from half precision
