"""Putting stacks on layer by layer: every kind of layer, on every device.

Only arenas in which something differs from what is applied are written, and of those all layers of the stack:
what is multiplied together, and so every bit, depends on the stack and not on what was applied before. When
anything fails midway, every layer goes back to golden. Quantised layers are not written: what adapters add is
computed beside them (`compose.sidecars`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from compose.arenas import Arena, Part
from compose.errors import IncompatibleBase
from compose.factors import Factors
from compose.sidecars import Sidecar
from compose.weights import Weight

Stack = Sequence[tuple[Mapping[str, Factors], Weight]]
"""The layers of each adapter, with its weight: what is applied, in this order."""

Wanted = Mapping[str, tuple[Part, ...]]
"""What is added to each layer."""


class LayerByLayer:
    """A base's arenas and sidecars, and what each layer of them has on. Not thread-safe."""

    def __init__(self, base: str, arenas: Sequence[Arena], sidecars: Mapping[str, Sidecar]) -> None:
        self._base, self._arenas, self._sidecars = base, arenas, sidecars
        self._arena = {name: arena for arena in arenas for name in arena.names}
        self.applied: dict[str, tuple[Part, ...] | None] = {}  # None: nobody knows

    def acts_on_text(self) -> bool:
        """Whether something was put on a text encoder."""
        return any(name.startswith("text_encoder") for name in self.applied)

    def apply(self, wanted: Wanted, check: Callable[[], None]) -> None:
        """As `WarmPipeline.apply`; `check` is called before every arena."""
        changed = [name for name in {**self.applied, **wanted} if not self._is(name, wanted.get(name, ()))]
        written = {id(self._arena[name]) for name in changed if name in self._arena}
        for arena, names in self._by_arena({**dict.fromkeys(changed), **wanted}):
            if id(arena) not in written:
                continue
            check()
            try:
                arena.restore([name for name in names if name not in wanted])
                if again := [name for name in names if name in wanted]:
                    arena.patch(again, wanted)
            except BaseException:
                touched = {**self.applied, **wanted}
                self.applied = dict.fromkeys(touched)  # should putting it back fail as well
                for each, mine in self._by_arena(touched):
                    each.restore(mine)
                for sidecar in self._sidecars.values():
                    sidecar.put(())
                self.applied = {}
                raise
            for name in names:
                self.applied.pop(name, None)
            self.applied |= {name: wanted[name] for name in names if name in wanted}
        for name in changed:
            if name in self._sidecars:
                self._sidecars[name].put(wanted.get(name, ()))
        self.applied = {**wanted}

    def wanted(self, stack: Stack, factors: Sequence[float]) -> Wanted:
        """What a stack adds to each layer. Raises IncompatibleBase."""
        found: dict[str, tuple[Part, ...]] = {}
        for place, (layers, weight) in enumerate(stack):
            scale = factors[place] if factors else 1.0
            for name, part in layers.items():
                self._check(name, part)
                acts = weight.of(name) if name.startswith("text_encoder") else weight.of(name) * scale
                if acts:
                    found[name] = (*found.get(name, ()), (part, acts))
        return found

    def _check(self, name: str, part: Factors) -> None:
        arena, sidecar = self._arena.get(name), self._sidecars.get(name)
        check_shape(
            self._base,
            name,
            part,
            tuple(arena.live.shape[1:]) if arena else sidecar.shape if sidecar else None,
        )
        if sidecar:
            sidecar.check(name, part.magnitude)

    def _is(self, name: str, parts: Sequence[Part]) -> bool:
        now = self.applied.get(name, ())
        return (
            now is not None
            and len(now) == len(parts)
            and all(a is b and w == v for (a, w), (b, v) in zip(now, parts, strict=True))
        )

    def _by_arena(self, layers: Iterable[str]) -> list[tuple[Arena, list[str]]]:
        """The arenas in which these layers are, in their order."""
        found: dict[int, list[str]] = defaultdict(list)
        for name in layers:
            if name in self._arena:
                found[id(self._arena[name])].append(name)
        return [(arena, found[id(arena)]) for arena in self._arenas if id(arena) in found]


def check_shape(base: str, name: str, part: Factors, here: tuple[int, ...] | None) -> None:
    """Raises IncompatibleBase for a layer that a base does not have in this shape."""
    if part.shape != here:
        raise IncompatibleBase(f"{base} has no {name!r} of shape {part.shape}", field="stack")
