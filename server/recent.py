"""What happened lately: events a second over the last minute, and percentiles of the last durations."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 60
KEPT = 512


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the `count` last durations, in seconds: that of nearest rank."""

    count: int
    p50: float
    p95: float
    p99: float


class Rate:
    """Counts events in a slot for each of the last 60 whole seconds; `clock` tells seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._mutex = clock, threading.Lock()
        self._began = clock()
        self._slots: deque[tuple[int, int]] = deque()

    def add(self, count: int = 1) -> None:
        """So many now; from any thread."""
        second = int(self._clock())
        with self._mutex:
            if self._slots and self._slots[-1][0] >= second:
                second, before = self._slots.pop()
                count += before
            self._slots.append((second, count))
            self._forget(second)

    def per_second(self) -> float:
        """Over the last minute, or since the beginning where that is shorter."""
        now = self._clock()
        with self._mutex:
            self._forget(int(now))
            total = sum(count for _, count in self._slots)
        return total / min(WINDOW, max(1.0, now - self._began))

    def _forget(self, second: int) -> None:
        while self._slots and self._slots[0][0] <= second - WINDOW:
            self._slots.popleft()


class Durations:
    """The last 512 durations by name; from any thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._kept: dict[str, deque[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """Another one; the oldest goes."""
        with self._mutex:
            self._kept.setdefault(name, deque(maxlen=KEPT)).append(seconds)

    def percentiles(self) -> dict[str, Percentiles]:
        """By name, in order of first appearance."""
        with self._mutex:
            kept = {name: sorted(values) for name, values in self._kept.items()}
        return {
            name: Percentiles(len(values), *(_at(values, share) for share in (50, 95, 99)))
            for name, values in kept.items()
        }


def _at(ordered: list[float], percent: int) -> float:
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]
