"""Several bases on one device: each loaded when it is first wanted, the least recently used let go when the
memory budget says so (`compose.ledger`), together with adapters and merges that nobody used for longer.

A base counts with its weights, the golden copies that they may grow to, and what stands beside it. On a GPU
whose budget does not hold both, the golden copies lie in the host's memory and count there.
"""

import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch

from compose.bases import Base
from compose.companions import numbers
from compose.errors import InvalidRequest
from compose.ledger import Ledger
from compose.warm import WarmPipeline, dtype_on, warm_up


class Residence:
    """The bases that are warm. Not thread-safe: one thread owns it; the ledgers are for all."""

    def __init__(
        self,
        first: WarmPipeline,
        others: Sequence[Base] = (),
        *,
        budget: int | None = None,
        host_budget: int | None = None,
        taken: int = 0,
    ) -> None:
        """`budget` in bytes for everything on the device, `host_budget` for golden copies that find no room
        there; None: nine tenths of each memory. `taken` of the device's are the scorer's for good. Raises
        InvalidRequest for a base that does not fit, and for two of one name.
        """
        self._device, self._taken = first.device, taken
        self.ledger = Ledger(budget_on(first.device) if budget is None else budget)
        self.host = Ledger(
            budget_on(torch.device("cpu")) if host_budget is None else host_budget, name="the host's memory"
        )
        self.others = tuple(others)
        self._bases = {base.name: base for base in (first.base, *others)}
        if len(self._bases) != 1 + len(self.others):
            raise InvalidRequest("two bases have the same name; write NAME=… before one", field="base")
        check_room(first.base.name, held(first), self._device, self.ledger.budget, taken)
        for base in self.others:
            check_room(base.name, estimate(base, self._device), self._device, self.ledger.budget, taken)
        self._warm = OrderedDict([(first.base.name, first)])
        self._loaded: tuple[WarmPipeline, ...] = (first,)
        self._count(first.base, held(first), on_host=first.golden_on_host)

    def warm(self, name: str, check: Callable[[], None] = lambda: None) -> WarmPipeline:
        """The base, loaded now if it is not here; what `check` raises, between its components, ends that.
        Raises IncompatibleBase when it cannot be loaded, NoRoom.
        """
        base = self._bases[name]
        if name in self._warm:
            warm = self._warm[name]
            self.ledger.touch("bases", name)
            if self.ledger.used() > self.ledger.budget:  # makes the room that is owed
                self._count(base, held(warm), on_host=warm.golden_on_host)
        else:
            on_host = golden_on_host(base, self._device, self.ledger.budget - self._taken)
            try:
                self._count(base, estimate(base, self._device), on_host=on_host)
                warm = warm_up(base, device=str(self._device), check=check, golden_on_host=on_host)
                self._count(base, held(warm), on_host=warm.golden_on_host)
            except BaseException:
                self.ledger.release("bases", name)
                self.host.release("golden", name)
                raise
            self._warm[name] = warm
        self._warm.move_to_end(name)
        self._loaded = tuple(self._warm.values())
        return warm

    def _count(self, base: Base, parts: Mapping[str, int], *, on_host: bool) -> None:
        here = {kind: size for kind, size in parts.items() if kind != "golden" or not on_host}
        told = {"free": lambda: self._let_go(base.name), "owned": True, "what": base.name}
        self.ledger.claim("bases", base.name, here, **told)  # type: ignore[arg-type]
        if on_host:
            what = f"the golden copy of {base.name}"
            self.host.claim("golden", base.name, parts["golden"], what=what)

    def _let_go(self, name: str) -> None:
        self._warm.pop(name, None)
        self._loaded = tuple(self._warm.values())  # nobody holds it any more
        self.host.release("golden", name)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            _empty_host_cache()

    def held(self) -> int:
        """Bytes on the device of all bases that are loaded, with what their golden weights may grow to."""
        parts = self.ledger.parts()
        return sum(parts.get(kind, 0) for kind in ("bases", "golden", "beside"))

    def loaded(self) -> tuple[WarmPipeline, ...]:
        """Those that are loaded, the least recently used first. From any thread."""
        return self._loaded


def _empty_host_cache() -> None:
    """Gives pinned memory back, where torch offers that: it keeps what is freed of it."""
    public = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    if empty := public or getattr(torch._C, "_host_emptyCache", None):
        empty()


def beside(base: Base) -> int:
    """Numbers in the weights of the models that stand beside a base."""
    return numbers((*base.controls, *base.references))


def estimate(base: Base, device: torch.device) -> dict[str, int]:
    """Bytes a base takes at most, before it is loaded: its weights, as many again for golden copies of nearly
    all of them, and what stands beside it.
    """
    size = dtype_on(base, device).itemsize
    small = base.denoiser - base.uncast if base.fp8 else 0  # one byte each, and no golden copy
    rest = (base.parameters - small) * size
    return {"bases": rest + small, "golden": rest, "beside": beside(base) * size}


def held(warm: WarmPipeline) -> dict[str, int]:
    """The same of one that is loaded, exactly."""
    itemsize = dtype_on(warm.base, warm.device).itemsize
    return {
        "bases": warm.weight_bytes(),
        "golden": warm.golden_bytes(),
        "beside": beside(warm.base) * itemsize,
    }


def needs(base: Base, device: torch.device) -> int:
    """Bytes a base takes at most, with everything."""
    return sum(estimate(base, device).values())


def golden_on_host(base: Base, device: torch.device, budget: int) -> bool:
    """Whether the golden copy of a base on a GPU finds no room within the budget."""
    return device.type == "cuda" and needs(base, device) > budget


def check_room(
    name: str, parts: Mapping[str, int], device: torch.device, budget: int, taken: int = 0
) -> None:
    """Raises InvalidRequest for a base of these parts that does not fit by itself beside the scorer, which
    has `taken` of the budget.
    """
    wanted = sum(parts.values()) - (parts["golden"] if device.type == "cuda" else 0)
    if wanted > budget - taken:
        golden = "" if device.type == "cuda" else " with its golden weights"
        scorer = f", of which the scorer takes {-(-taken >> 20)} MB" if taken else ""
        raise InvalidRequest(
            f"{name} needs about {wanted >> 20} MB{golden}, the budget is {budget >> 20} MB{scorer}; "
            "raise --memory, or leave it out",
            field="base",
        )


def budget_on(device: torch.device) -> int:
    """Nine tenths of a device's memory."""
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total * 9 // 10
