"""How fast this server renders: seconds of a denoising step by what decides it, measured while it works.

What was measured a while ago is a guess: whoever were refused for it would never let it be measured again,
and a machine that stood still for a moment would refuse them for ever.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

NEWEST = 0.2
"""The weight of the newest measurement in the running average."""
KNOWN_SECONDS = 30.0
"""How long what was measured is more than a guess."""
KINDS_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Effort:
    """Denoising steps of one kind: of one base, size and number of pictures at once, for example."""

    kind: Hashable
    steps: int


@dataclass(slots=True)
class Pace:
    """The running averages, each with when it was measured last."""

    _seconds: dict[Hashable, tuple[float, float]] = field(default_factory=dict)

    def measured(self, kind: Hashable, seconds: float, now: float) -> None:
        """A step of a kind took this long; after a while without any, that alone counts."""
        before, at = self._seconds.pop(kind, (seconds, now))
        if now - at > KNOWN_SECONDS:
            before = seconds
        self._seconds[kind] = before + NEWEST * (seconds - before), now
        if len(self._seconds) > KINDS_LIMIT:
            del self._seconds[next(iter(self._seconds))]  # what was measured longest ago

    def step(self, effort: Effort | None, since: float = -math.inf) -> float | None:
        """Seconds of one of its steps; None when nothing like it was measured since then."""
        seconds, at = self._seconds.get(effort.kind, (0.0, -math.inf)) if effort else (0.0, -math.inf)
        return seconds if at > since else None

    def of(self, effort: Effort | None) -> float | None:
        """Seconds of all of its steps, decoding left out; None when nothing like it was measured."""
        step = self.step(effort)
        return None if step is None or effort is None else step * effort.steps
