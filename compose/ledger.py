"""One account of memory: bases, their golden copies and what stands beside them, adapters that are held,
merges that are kept, the scorer. All of it together stays within one stated budget.

    ledger = Ledger(20 << 30)
    ledger.claim("adapters", key, size, free=drop)      # may free what was used least recently; raises NoRoom
    ledger.touch("adapters", key)                       # it was used
    ledger.release("adapters", key)                     # it is gone

Whoever claims says how to free it. What is `owned` (a base: the thread that renders may be using it) is freed
by its owner alone; a claim from elsewhere that only such freeing makes room for is let in, and the owner
makes the room at its next claim. What has no `free` stays. Workspace of renders and merges is not counted:
that is what the part of the device beyond the budget is for.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compose.errors import NoRoom

Key = tuple[str, object]


@dataclass(slots=True)
class _Entry:
    parts: Mapping[str, int]
    free: Callable[[], None] | None
    owned: bool
    used: int

    @property
    def size(self) -> int:
        return sum(self.parts.values())


class Ledger:
    """Bytes by kind and name. Safe to use from several threads; `free` is called on the claiming one, and may
    call back.
    """

    def __init__(self, budget: int, *, name: str = "--memory") -> None:
        self.budget, self._name = budget, name
        self._mutex = threading.Lock()
        self._entries: dict[Key, _Entry] = {}
        self._clock = 0

    def claim(
        self,
        kind: str,
        name: object,
        size: int | Mapping[str, int],
        *,
        free: Callable[[], None] | None = None,
        owned: bool = False,
        what: str = "",
    ) -> None:
        """Puts bytes down to an entry, in the place of what it had, and frees what was used least recently
        until everything fits; by parts where an entry is of several kinds. Raises NoRoom, and changes
        nothing, when that is not enough.
        """
        parts = {kind: size} if isinstance(size, int) else dict(size)
        with self._mutex:
            gone = self._least_used((kind, name), sum(parts.values()), owned, what or kind)
            freed = [self._entries.pop(key).free for key in gone]
            self._clock += 1
            self._entries[kind, name] = _Entry(parts, free, owned, self._clock)
        for act in freed:
            if act:
                act()

    def _least_used(self, key: Key, size: int, owner: bool, what: str) -> list[Key]:
        """What goes for `size` more bytes, the least recently used first."""
        others = {k: entry for k, entry in self._entries.items() if k != key}
        lacking = size + sum(entry.size for entry in others.values()) - self.budget
        in_use = max((k for k, e in others.items() if e.owned), key=lambda k: others[k].used, default=None)
        gone = []
        for k, entry in sorted(others.items(), key=lambda item: item[1].used):
            if lacking <= 0:
                break
            if entry.free and (owner or not entry.owned):
                gone.append(k)
                lacking -= entry.size
        if not owner:  # the owner will let go of whatever it does not work with
            lacking -= sum(e.size for k, e in others.items() if e.owned and e.free and k != in_use)
        if lacking > 0:
            stays = sum(e.size for k, e in others.items() if k not in gone)
            raise NoRoom(
                f"{what} needs {megabytes(size)}, and beside the {megabytes(stays)} that stay the budget of "
                f"{megabytes(self.budget)} has no room for it; raise {self._name}"
            )
        return gone

    def touch(self, kind: str, name: object) -> None:
        """An entry was used; harmless when it is gone."""
        with self._mutex:
            self._clock += 1
            if entry := self._entries.get((kind, name)):
                entry.used = self._clock

    def release(self, kind: str, name: object) -> None:
        """An entry is gone; harmless when it was."""
        with self._mutex:
            self._entries.pop((kind, name), None)

    def parts(self) -> Mapping[str, int]:
        """Bytes by kind, in the order in which the kinds came."""
        found: dict[str, int] = defaultdict(int)
        with self._mutex:
            for entry in self._entries.values():
                for kind, size in entry.parts.items():
                    found[kind] += size
        return dict(found)

    def used(self) -> int:
        """Bytes of everything."""
        with self._mutex:
            return sum(entry.size for entry in self._entries.values())


def megabytes(size: int) -> str:
    """For messages: `41 MB`."""
    return f"{-(-size // 1_000_000)} MB"
