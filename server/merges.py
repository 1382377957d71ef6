"""Merges of pinned stacks: made once, kept for a while, and what they compute from no weight for longer.

A stack whose factors are too many to be kept is read from its files as it is merged, a batch of layers at a
time.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from compose.errors import NoRoom
from compose.factors import Factors
from compose.groups import Adapter, nobody_asks
from compose.ledger import Ledger
from compose.merging import Merged, Prepared
from compose.methods import Parameters
from compose.moments import Moment
from registry.errors import Conflict
from server.calibrations import Calibrations
from server.pinned import Pinned
from server.shelf import Check, Shelf
from server.telemetry import Cache

KEPT, KEPT_BYTES = 8, 1 << 30
PREPARED_KEPT = 2
WAIT_SECONDS = 0.1
LARGE_BYTES = 2 << 30
"""Of a stack's factors in float32; of a larger one nothing is kept."""


class Merges:
    """Safe to use from several threads."""

    def __init__(
        self,
        shelf: Shelf,
        calibrations: Calibrations,
        *,
        device: str = "cpu",
        ledger: Ledger | None = None,
    ) -> None:
        self._shelf, self._calibrations, self._device = shelf, calibrations, device
        self._ledger = ledger or Ledger(8 * KEPT_BYTES)
        self._mutex = threading.Lock()
        self._merging = threading.Lock()
        self._merged: OrderedDict[object, Merged] = OrderedDict()
        self._prepared: OrderedDict[object, Prepared] = OrderedDict()
        self.caches = Cache("merges"), Cache("prepared")

    def __len__(self) -> int:
        """Merges that are kept."""
        return len(self._merged)

    def merge(
        self,
        stack: Sequence[Pinned],
        family: str,
        method: str,
        parameters: Parameters,
        check: Check = nobody_asks,
    ) -> Merged:
        """The merge of LoRAs in this order; what `check` raises, between batches of layers, ends it. Raises
        IncompatibleBase, InvalidRequest, NonFinite, Damaged.
        """
        key = key_of(stack, family, method, parameters)
        large = 2 * sum(p.version.size_bytes for p in stack) > LARGE_BYTES  # half precision becomes float32
        with suppress(NoRoom):  # then they are looked at in the file, below
            for pinned in stack if not large else ():
                if pinned.weight.parts:
                    pinned.weight.check_parts(self._shelf.layers(pinned, family), what=pinned.version.ref)
        with self._mutex:
            known = self.caches[0].asked(self._merged.get(key))
        if known:
            return self._used(key, known)
        weights = [p.weight for p in stack]
        with self._turn(check), ExitStack() as files:
            if known := self._merged.get(key):  # made by whom this waited for
                return self._used(key, known)
            kept = None
            if not large:
                with suppress(NoRoom):  # several may not fit
                    kept = self._prepare(stack, family, check)
            prepared = kept
            if prepared is None:
                adapters = self._adapters(stack, lambda p: files.enter_context(self._shelf.file(p, family)))
                for pinned, adapter in zip(stack, adapters, strict=True):
                    pinned.weight.check_parts(adapter.layers, what=pinned.version.ref)
                prepared = Prepared(adapters, device=self._device)
            merged = prepared.merge(weights, method=method, parameters=parameters, check=check)
            if kept is not None:
                self._keep("prepared", self._prepared, _what(stack, family), kept, kept.nbytes())
        if _size(merged) <= KEPT_BYTES:
            self._keep("merges", self._merged, key, merged, _size(merged))
            with self._mutex:
                while len(self._merged) > KEPT or sum(map(_size, self._merged.values())) > KEPT_BYTES:
                    self._ledger.release("merges", self._merged.popitem(last=False)[0])
        return merged

    def _used(self, key: object, merged: Merged) -> Merged:
        with self._mutex:
            if key in self._merged:
                self._merged.move_to_end(key)
        self._ledger.touch("merges", key)
        return merged

    def _keep(self, kind: str, kept: OrderedDict[object, Any], key: object, value: object, size: int) -> None:
        """Keeps something as long as the ledger has room for it."""

        def drop() -> None:
            with self._mutex:
                kept.pop(key, None)

        with self._mutex:  # before it is counted: whoever frees what is counted must find it
            kept[key] = value
            kept.move_to_end(key)
        try:
            self._ledger.claim(kind, key, size, free=drop)
        except NoRoom:
            drop()
        with self._mutex:
            if key not in kept:
                self._ledger.release(kind, key)

    @contextmanager
    def _turn(self, check: Check) -> Iterator[None]:
        """One merge at a time, as each wants every core; who waits in vain goes."""
        while not self._merging.acquire(timeout=WAIT_SECONDS):
            check()
        try:
            yield
        finally:
            self._merging.release()

    def _prepare(self, stack: Sequence[Pinned], family: str, check: Check) -> Prepared:
        """What does not depend on the weights: kept, so that moving a slider costs little."""
        with self._mutex:
            found = self.caches[1].asked(self._prepared.get(_what(stack, family)))
            while found is None and len(self._prepared) >= PREPARED_KEPT:
                self._ledger.release("prepared", self._prepared.popitem(last=False)[0])
        if found is not None:
            return found
        adapters = self._adapters(stack, lambda p: self._shelf.layers(p, family, check))
        return Prepared(adapters, device=self._device)

    def _adapters(
        self, stack: Sequence[Pinned], read: Callable[[Pinned], Mapping[str, Factors]]
    ) -> list[Adapter]:
        return [Adapter(read(pinned), moments=self._moments(pinned)) for pinned in stack]

    def _moments(self, pinned: Pinned) -> Mapping[str, Moment]:
        if not pinned.moments:
            return {}
        found = self._calibrations.kept(pinned.version, pinned.moments)
        if found is None:
            raise Conflict(
                f"{pinned.version.ref} was calibrated anew while this waited; ask again", field="stack"
            )
        return found.moments


def key_of(stack: Sequence[Pinned], family: str, method: str, parameters: Parameters) -> object:
    """Equal for what merges to equal layers."""
    return method, parameters, family, tuple((p.content, p.weight, p.moments) for p in stack)


def _what(stack: Sequence[Pinned], family: str) -> object:
    """Equal for what is prepared alike: no weight counts."""
    return family, tuple((*p.content, p.moments) for p in stack)


def _size(merged: Merged) -> int:
    return sum(f.up.nbytes + f.down.nbytes for f in merged.layers.values())
