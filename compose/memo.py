"""What was computed and may be wanted again, within a budget of bytes.

A run (a merge) asks for its keys at one place after the other (the batches of a stack). What is over the
budget then makes room in order of last use, whole keys, but never what this run has asked for: a scan through
places that do not all fit would throw out each just before it is asked for again. What finds no room is
computed and not kept.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Memo:
    """Values by key and place. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes, self._run = limit, 0, 0
        self._kept: OrderedDict[object, dict[int, tuple[Any, int]]] = OrderedDict()
        self._used: dict[object, int] = {}

    def begin(self) -> None:
        """A new run begins: what the last one asked for may go."""
        self._run += 1

    def clear(self) -> None:
        """Keeps nothing."""
        self._kept.clear()
        self._used.clear()
        self.nbytes = 0

    def holds(self, key: object, place: int) -> bool:
        """Whether there is something."""
        return place in self._kept.get(key, {})

    def once(self, key: object, place: int, compute: Callable[[], T], *, besides: Iterable[Tensor] = ()) -> T:
        """`compute()`, or what it was; `besides` are tensors that are there anyway and do not count."""
        self._used[key] = self._run
        places = self._kept.setdefault(key, {})
        self._kept.move_to_end(key)
        if place in places:
            found: T = places[place][0]
            return found
        made = compute()
        size = _size(made, besides)
        while self.nbytes + size > self.limit and self._used[oldest := next(iter(self._kept))] != self._run:
            self.nbytes -= sum(held for _, held in self._kept.pop(oldest).values())
            del self._used[oldest]
        if self.nbytes + size <= self.limit:
            places[place] = made, size
            self.nbytes += size
        return made


def _size(value: object, besides: Iterable[Tensor]) -> int:
    """Bytes of the tensors in a value, what several of them share once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    size = 0
    for tensor in _tensors(value):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            size += storage.nbytes()
    return size


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
