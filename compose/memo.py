"""What was computed and may be wanted again, within a budget of bytes.

A run (a merge) asks for its keys at one place after the other (the batches of a stack). What is over the
budget then makes room in order of last use, whole keys, but never what this run has asked for: a scan through
places that do not all fit would throw out each just before it is asked for again. What finds no room is
computed and not kept.
"""

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
Sizes = Mapping[int, int]
"""Bytes of memory by its address."""


class Memo:
    """Values by key and place; memory that several of them share counts once. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes, self._run = limit, 0, 0
        self._kept: OrderedDict[object, dict[int, tuple[Any, Sizes]]] = OrderedDict()
        self._used: dict[object, int] = {}
        self._holders: Counter[int] = Counter()

    def begin(self) -> None:
        """A new run begins: what the last one asked for may go."""
        self._run += 1

    def clear(self) -> None:
        """Keeps nothing."""
        self._kept.clear()
        self._used.clear()
        self._holders.clear()
        self.nbytes = 0

    def once(self, key: object, place: int, compute: Callable[[], T], *, besides: Iterable[Tensor] = ()) -> T:
        """`compute()`, or what it was; `besides` are tensors that are there anyway and do not count."""
        self._used[key] = self._run
        places = self._kept.setdefault(key, {})
        self._kept.move_to_end(key)
        if place in places:
            found: T = places[place][0]
            return found
        made = compute()
        sizes = _sizes(made, besides)
        while not self._fits(sizes) and self._used[oldest := next(iter(self._kept))] != self._run:
            self._let_go(oldest)
        if self._fits(sizes):
            places[place] = made, sizes
            self.nbytes += self._more(sizes)
            self._holders.update(sizes.keys())
        return made

    def _more(self, sizes: Sizes) -> int:
        """Bytes of what no value here holds."""
        return sum(size for storage, size in sizes.items() if not self._holders[storage])

    def _fits(self, sizes: Sizes) -> bool:
        return self.nbytes + self._more(sizes) <= self.limit

    def _let_go(self, key: object) -> None:
        del self._used[key]
        for _, sizes in self._kept.pop(key).values():
            self._holders.subtract(sizes.keys())
            self._holders = +self._holders  # without those that nobody holds
            self.nbytes -= self._more(sizes)


def _sizes(value: object, besides: Iterable[Tensor]) -> Sizes:
    """Of the memory of the tensors in a value."""
    anyway = {tensor.untyped_storage().data_ptr() for tensor in besides}
    storages = (tensor.untyped_storage() for tensor in _tensors(value))
    return {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in anyway}


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
