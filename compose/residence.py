"""Several bases on one device: each loaded when it is first wanted, the least recently used let go when the
memory budget says so.
"""

import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from compose.bases import Base
from compose.errors import InvalidRequest
from compose.warm import WarmPipeline, dtype_on, warm_up


class Residence:
    """The bases that are warm. Not thread-safe: one thread owns it."""

    def __init__(
        self, first: WarmPipeline, others: Sequence[Base] = (), *, budget: int | None = None
    ) -> None:
        """`budget` in bytes for all bases together; None: nine tenths of the device's memory. Raises
        InvalidRequest for a base that does not fit, and for two of one name.
        """
        self._device = first.device
        self.budget = _memory(first.device) * 9 // 10 if budget is None else budget
        self.others = tuple(others)
        self._bases = {base.name: base for base in (first.base, *others)}
        if len(self._bases) != 1 + len(self.others):
            raise InvalidRequest("two bases have the same name; write NAME=… before one", field="base")
        self._warm = OrderedDict([(first.base.name, first)])
        self._loaded: tuple[WarmPipeline, ...] = (first,)
        for base in self._bases.values():
            if needs(base, self._device) > self.budget:
                raise InvalidRequest(
                    f"{base.name} needs about {needs(base, self._device) >> 20} MB with its golden weights, "
                    f"the budget is {self.budget >> 20} MB; raise --memory, or leave it out",
                    field="base",
                )

    def warm(self, name: str, check: Callable[[], None] = lambda: None) -> WarmPipeline:
        """The base, loaded now if it is not here; what `check` raises, between its components, ends that.
        Raises IncompatibleBase when it cannot be loaded.
        """
        if name not in self._warm:
            base = self._bases[name]
            wanted = needs(base, self._device)
            while self._warm and self.held() + wanted > self.budget:
                self._warm.popitem(last=False)
                self._loaded = tuple(self._warm.values())  # nobody holds it any more
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            self._warm[name] = warm_up(base, device=str(self._device), check=check)
        self._warm.move_to_end(name)
        self._loaded = tuple(self._warm.values())
        return self._warm[name]

    def held(self) -> int:
        """Bytes of all bases that are loaded, with what their golden weights may grow to."""
        return sum(needs(warm.base, self._device) for warm in self._warm.values())

    def loaded(self) -> tuple[WarmPipeline, ...]:
        """Those that are loaded, the least recently used first. From any thread."""
        return self._loaded


def needs(base: Base, device: torch.device) -> int:
    """Bytes a base takes at most: its weights, twice, for nearly all of them have golden ones beside them."""
    return 2 * base.parameters * dtype_on(base, device).itemsize


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
        return total
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
