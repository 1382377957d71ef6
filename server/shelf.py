"""What adapters hold, read once: layers and words by content, the least recently used first to go."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor

from compose import formats
from compose.errors import IncompatibleBase, NoRoom
from compose.factors import Factors, to_device
from compose.families import families
from compose.groups import nobody_asks
from compose.ledger import Ledger
from compose.words import Word
from registry.catalog import Catalog
from registry.headers import read_header
from server.checkin import TEXTUAL_INVERSION, recognise
from server.pinned import Pinned, config_of
from server.telemetry import Cache

Loaded = TypeVar("Loaded", dict[str, Factors], tuple[formats.LoadedWord, ...])

CACHE_BYTES, KIND = 2 << 30, "adapters"
Check = Callable[[], None]
"""Raises when nobody wants any more what is being made."""


class Shelf:
    """The factors and words of pinned adapters, on the device that renders. Safe to use from several
    threads.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        device: str = "cpu",
        capacity: int = CACHE_BYTES,
        ledger: Ledger | None = None,
    ) -> None:
        """`capacity` in bytes is for what is held here, within what `ledger` grants to everything."""
        self._catalog, self._device, self.capacity = catalog, device, capacity
        self._ledger = ledger or Ledger(2 * capacity)
        self._mutex = threading.Lock()
        self._loaded: OrderedDict[object, dict[str, Factors] | tuple[formats.LoadedWord, ...]] = OrderedDict()
        self.cache = Cache("shelf")

    def layers(self, pinned: Pinned, family: str, check: Check = nobody_asks) -> dict[str, Factors]:
        """Its layers on a base of `family`; what `check` raises, between layers, ends the reading. Raises
        IncompatibleBase, NonFinite, Damaged, NoRoom.
        """
        known = self._kept((*pinned.content, family))
        if isinstance(known, dict):
            return known
        key = (*pinned.content, family)
        with self.file(pinned, family) as found:
            self._claim(key, sum(found.nbytes(name) for name in found), pinned)
            try:
                layers = to_device(_checked(found, check), self._device)
            except BaseException:
                with self._mutex:
                    self._settle(key)
                raise
        return self._keep(key, layers)

    @contextmanager
    def file(self, pinned: Pinned, family: str) -> Iterator[formats.Layers]:
        """The same, each read from the file when it is asked for, and not kept. Raises as `layers` does."""
        version = pinned.version
        if version.facts["family"] not in {"", family}:
            raise IncompatibleBase(
                f"{version.ref} is for {version.facts['family']}, not for {family}; take it out of the stack",
                field="stack",
            )
        path = self._catalog.blobs.verified(version.digest)
        sketch = recognise(read_header(path), config_of(version))
        with formats.layers(path, formats.require(sketch, family, what=version.ref)) as found:
            yield found

    def words(self, pinned: Pinned, family: str) -> list[Word]:
        """The words a version brings: a textual inversion of one word answers to its trigger, any others to
        what their file calls them.
        """
        version = pinned.version
        if version.kind != TEXTUAL_INVERSION and not version.facts.get("words"):
            return []
        found = self._vectors(pinned, family)
        named = bool(version.facts.get("words"))
        return [
            Word(
                word.token or version.name if named else self._word(pinned),
                _by_kind(word, family),
                pinned.weight.value,
                f"{version.digest}/{place}",
            )
            for place, word in enumerate(found)
        ]

    def _vectors(self, pinned: Pinned, family: str) -> tuple[formats.LoadedWord, ...]:
        key = ("words", *pinned.content, family)
        known = self._kept(key)
        if isinstance(known, tuple):
            return known
        path = self._catalog.blobs.verified(pinned.version.digest)
        sketch = recognise(read_header(path), config_of(pinned.version))
        formats.require(sketch, family, what=pinned.version.ref)
        words = formats.load_words(path, formats.words_for(sketch, family))
        self._claim(key, sum(t.nbytes for t in _tensors(words)), pinned)
        return self._keep(key, words)

    def held(self) -> Sequence[tuple[str, int]]:
        """Digests and bytes of what is held, the most recently used first."""
        with self._mutex:
            kept = list(self._loaded.items())
        digests = (str(key[1] if key[0] == "words" else key[0]) for key, _ in kept if isinstance(key, tuple))
        sizes = (sum(t.nbytes for t in _tensors(value)) for _, value in kept)
        return list(zip(digests, sizes, strict=True))[::-1]

    @staticmethod
    def _word(pinned: Pinned) -> str:
        return pinned.triggers[0] if pinned.triggers else pinned.version.name

    def _kept(self, key: object) -> dict[str, Factors] | tuple[formats.LoadedWord, ...] | None:
        with self._mutex:
            if key in self._loaded:
                self._loaded.move_to_end(key)
            found = self.cache.asked(self._loaded.get(key))
        if found is not None:
            self._ledger.touch(KIND, key)
        return found

    def _claim(self, key: object, size: int, pinned: Pinned) -> None:
        self._ledger.claim(KIND, key, size, free=partial(self._drop, key), what=pinned.version.ref)

    def _drop(self, key: object) -> None:
        with self._mutex:
            self._loaded.pop(key, None)

    def _settle(self, key: object) -> None:
        """What nobody keeps is not counted: another may have read the same. With the mutex held."""
        if key not in self._loaded:
            self._ledger.release(KIND, key)

    def _keep(self, key: object, value: Loaded) -> Loaded:
        size = sum(t.nbytes for t in _tensors(value))
        with self._mutex:  # before it is counted: whoever frees what is counted must find it
            self._loaded.setdefault(key, value)
        try:  # exactly now; and others may have taken the room while it was read
            self._ledger.claim(KIND, key, size, free=partial(self._drop, key))
        except NoRoom:
            with self._mutex:
                if self._loaded.get(key) is value:
                    del self._loaded[key]
                self._settle(key)
            return value
        with self._mutex:
            self._settle(key)
            sizes = {key: sum(t.nbytes for t in _tensors(held)) for key, held in self._loaded.items()}
            total = sum(sizes.values())
            while total > self.capacity and len(self._loaded) > 1:
                oldest, _ = self._loaded.popitem(last=False)
                total -= sizes[oldest]
                self._ledger.release(KIND, oldest)
        return value


def _by_kind(word: formats.LoadedWord, family: str) -> dict[str, Tensor]:
    """The vectors of a word by the kind of text encoder; a file for one encoder may not say which."""
    kinds = families()[family].words
    if len(kinds) == 1:
        return dict(zip(kinds, word.vectors.values(), strict=True))
    return dict(word.vectors)


def _checked(layers: Mapping[str, Factors], check: Check) -> Iterator[tuple[str, Factors]]:
    for name, factors in layers.items():
        check()
        yield name, factors


def _tensors(loaded: dict[str, Factors] | tuple[formats.LoadedWord, ...]) -> list[Tensor]:
    if isinstance(loaded, dict):
        return [tensor for factors in loaded.values() for tensor in factors.held]
    return [tensor for word in loaded for tensor in word.vectors.values()]
