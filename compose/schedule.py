"""When adapters act: over shares of the denoising steps, by turns, or each for itself.

    Plan(schedules=((), (Phase(0.4, 1.0),)))         the second from 40% of the steps on
    Plan(schedules=((Phase(0, 1, 1.0, 0.0),),))      the first, less and less
    Plan(mode="switch", every=2)                     one adapter at a time, the next after two steps
    Plan(mode="composite")                           each alone, and the mean of what they predict

Switch and composite are Multi-LoRA Composition (arXiv 2402.16843, sections 3.2 and 3.3). A text encoder reads
the prompt once, before the first step: its layers, and words, are not scheduled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compose.errors import InvalidRequest
from compose.methods.method import Method
from compose.methods.naive import naive
from compose.weights import WEIGHT_LIMIT

PHASES_LIMIT = 16
MODES: Mapping[str, Method] = {
    "switch": Method(
        naive,
        "one adapter at a time, the next after `every` steps (arXiv 2402.16843, section 3.2)",
        frozenset({"every"}),
        ordered=True,
    ),
    "composite": Method(
        naive,
        "each adapter alone in every step, and the mean of what they predict (arXiv 2402.16843, section 3.3)",
    ),
}
"""Ways to render a stack that no file can hold."""


@dataclass(frozen=True, slots=True)
class Phase:
    """From `start` to `end`, shares of the steps in [0, 1], an adapter acts `weight` times as strongly, or
    from that in a straight line to `end_weight`. A step is in the phase in which it begins.
    """

    start: float
    end: float
    weight: float = 1.0
    end_weight: float | None = None

    def at(self, share: float) -> float:
        """The factor at a share of the steps within the phase."""
        if self.end_weight is None:
            return self.weight
        return self.weight + (self.end_weight - self.weight) * (share - self.start) / (self.end - self.start)


Schedule = tuple[Phase, ...]
"""Outside of its phases an adapter does not act; no phases: it always does."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a stack acts over the steps: a schedule for each adapter, or none; and a mode, "" for together."""

    schedules: tuple[Schedule, ...] = ()
    mode: str = ""
    every: int = 1

    def factors(self, step: int, steps: int, adapters: int) -> tuple[float, ...]:
        """Of each adapter in step `step` of 0 … `steps` - 1; () for all as they are."""
        if self.mode == "switch" and adapters > 1:
            now = step // self.every % adapters
            return tuple(float(place == now) for place in range(adapters))
        if not any(self.schedules):
            return ()
        share = step / steps
        return tuple(_factor(schedule, share) for schedule in self.schedules)

    def check(self, adapters: int) -> None:
        """Raises InvalidRequest for phases that are none, and for schedules that are not one for each
        adapter.
        """
        if self.schedules and len(self.schedules) != adapters:
            raise InvalidRequest(
                f"{len(self.schedules)} schedules for {adapters} adapters; give one for each, in their order",
                field="schedules",
            )
        for schedule in self.schedules:
            _check(schedule)


ALWAYS = Plan()


def _factor(schedule: Schedule, share: float) -> float:
    if not schedule:
        return 1.0
    return next((phase.at(share) for phase in schedule if phase.start <= share < phase.end), 0.0)


def _check(schedule: Sequence[Phase]) -> None:
    if len(schedule) > PHASES_LIMIT:
        raise InvalidRequest(
            f"a schedule of {len(schedule)} phases, the limit is {PHASES_LIMIT}", field="schedules.phases"
        )
    before = 0.0
    for phase in schedule:
        if not 0 <= phase.start < phase.end <= 1:  # so is a NaN refused
            raise InvalidRequest(
                f"a phase from {phase.start:g} to {phase.end:g} is none: it lies within 0 and 1, "
                "and ends after it starts",
                field="schedules.phases",
            )
        if phase.start < before:
            raise InvalidRequest(
                f"a phase starts at {phase.start:g}, before the one before it ends at {before:g}",
                field="schedules.phases",
            )
        for weight in (phase.weight, phase.end_weight):
            if weight is not None and not (math.isfinite(weight) and abs(weight) <= WEIGHT_LIMIT):
                raise InvalidRequest(
                    f"a phase's weight {weight} is not within -{WEIGHT_LIMIT:g} and {WEIGHT_LIMIT:g}",
                    field="schedules.phases",
                )
        before = phase.end
