"""How fast this server renders: seconds of a denoising step by what decides it, measured while it works."""

from collections.abc import Hashable
from dataclasses import dataclass, field

NEWEST = 0.2
"""The weight of the newest measurement in the running average."""
KINDS_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Effort:
    """Denoising steps of one kind: of one base, size and number of pictures at once, for example."""

    kind: Hashable
    steps: int


@dataclass(slots=True)
class Pace:
    """The running averages."""

    _seconds: dict[Hashable, float] = field(default_factory=dict)

    def measured(self, kind: Hashable, seconds: float) -> None:
        """A step of a kind took this long."""
        before = self._seconds.pop(kind, seconds)
        self._seconds[kind] = before + NEWEST * (seconds - before)
        if len(self._seconds) > KINDS_LIMIT:
            del self._seconds[next(iter(self._seconds))]  # what was measured longest ago

    def step(self, effort: Effort | None) -> float | None:
        """Seconds of one of its steps; None when nothing like it was measured."""
        return self._seconds.get(effort.kind) if effort else None

    def of(self, effort: Effort | None) -> float | None:
        """Seconds of all of its steps, decoding left out; None when nothing like it was measured."""
        step = self.step(effort)
        return None if step is None or effort is None else step * effort.steps
