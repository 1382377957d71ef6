"""Merges of pinned stacks: made once, kept for a while, and what they compute from no weight for longer.

A stack whose factors are too many to be kept is read from its files as it is merged, a batch of layers at a
time.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext

from compose.factors import Factors
from compose.groups import Adapter
from compose.merging import Merged, Prepared
from compose.methods import Parameters
from compose.moments import Moment
from registry.errors import Conflict
from server.calibrations import Calibrations
from server.pinned import Pinned
from server.shelf import Shelf
from server.telemetry import Cache

KEPT, KEPT_BYTES = 8, 1 << 30
PREPARED_KEPT, PREPARED_BYTES = 32, 3 << 30
"""Of all prepared stacks together, their adapters included; the last used one stays whatever it holds, which
`compose.merging` bounds.
"""

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
        prepared_bytes: int = PREPARED_BYTES,
    ) -> None:
        self._shelf, self._calibrations, self._device = shelf, calibrations, device
        self._prepared_limit = prepared_bytes
        self._mutex = threading.Lock()
        self._merging = threading.Lock()  # a merge wants every core
        self._merged: OrderedDict[object, Merged] = OrderedDict()
        self._prepared: OrderedDict[object, tuple[Prepared, int]] = OrderedDict()
        self.caches = Cache("merges"), Cache("prepared")

    def __len__(self) -> int:
        """Merges that are kept."""
        return len(self._merged)

    def merge(self, stack: Sequence[Pinned], family: str, method: str, parameters: Parameters) -> Merged:
        """The merge of LoRAs in this order. Raises IncompatibleBase, InvalidRequest, NonFinite, Damaged."""
        key = key_of(stack, family, method, parameters)
        large = 2 * sum(p.version.size_bytes for p in stack) > LARGE_BYTES  # half precision becomes float32
        for pinned in stack:
            if pinned.weight.parts:
                with self._shelf.file(pinned, family) if large else nullcontext() as file:
                    layers = file if file is not None else self._shelf.layers(pinned, family)
                    pinned.weight.check_parts(layers, what=pinned.version.ref)
        with self._mutex:
            if known := self.caches[0].asked(self._merged.get(key)):
                self._merged.move_to_end(key)
                return known
        weights = [p.weight for p in stack]
        with self._merging, ExitStack() as files:
            if large:
                adapters = self._adapters(stack, lambda p: files.enter_context(self._shelf.file(p, family)))
                prepared = Prepared(adapters, device=self._device)
            else:
                prepared = self._prepare(stack, family)
            merged = prepared.merge(weights, method=method, parameters=parameters)
            self._make_room()
        if _size(merged) <= KEPT_BYTES:
            with self._mutex:
                self._merged[key] = merged
                while len(self._merged) > KEPT or sum(map(_size, self._merged.values())) > KEPT_BYTES:
                    self._merged.popitem(last=False)
        return merged

    def _prepare(self, stack: Sequence[Pinned], family: str) -> Prepared:
        """What does not depend on the weights: kept, so that moving a slider costs little."""
        key = (family, tuple((*p.content, p.moments) for p in stack))
        if self.caches[1].asked(self._prepared.get(key)) is None:
            adapters = self._adapters(stack, lambda p: self._shelf.layers(p, family))
            given = sum(f.up.nbytes + f.down.nbytes for a in adapters for f in a.layers.values())
            self._prepared[key] = Prepared(adapters, device=self._device), given
        self._prepared.move_to_end(key)
        return self._prepared[key][0]

    def _make_room(self) -> None:
        while len(self._prepared) > PREPARED_KEPT or (
            len(self._prepared) > 1 and self.prepared_bytes() > self._prepared_limit
        ):
            self._prepared.popitem(last=False)

    def prepared_bytes(self) -> int:
        """What is kept between merges besides the merges, with the adapters whether or not the shelf still
        has them.
        """
        return sum(prepared.nbytes() + given for prepared, given in self._prepared.values())

    def _adapters(
        self, stack: Sequence[Pinned], read: Callable[[Pinned], Mapping[str, Factors]]
    ) -> list[Adapter]:
        return [Adapter(read(pinned), moments=self._moments(pinned)) for pinned in stack]

    def _moments(self, pinned: Pinned) -> Mapping[str, Moment]:
        if not pinned.moments:
            return {}
        found = self._calibrations.of(pinned.version)
        if found is None or found.digest != pinned.moments:
            raise Conflict(
                f"{pinned.version.ref} was calibrated anew while this waited; ask again", field="stack"
            )
        return found.moments


def key_of(stack: Sequence[Pinned], family: str, method: str, parameters: Parameters) -> object:
    """Equal for what merges to equal layers."""
    return method, parameters, family, tuple((p.content, p.weight, p.moments) for p in stack)


def _size(merged: Merged) -> int:
    return sum(f.up.nbytes + f.down.nbytes for f in merged.layers.values())
