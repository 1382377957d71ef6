"""Bytes on their way to several who want each of them, in order, none waiting for another: a file that comes
in is written and hashed twice over, and the hashes let other threads run.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

Bytes = bytes | memoryview
DEPTH = 2
"""Pieces that may wait for the slowest."""


class Intake:
    """A thread for each sink, of which the first keeps what comes. As a context manager it leaves when all
    that was fed is done, or given up: after the first failure no sink gets anything more, so that what was
    written has no gap.
    """

    def __init__(self, *sinks: Callable[[Bytes], object]) -> None:
        self._sinks = [(sink, ThreadPoolExecutor(1, "intake")) for sink in sinks]
        self._waiting: deque[list[Future[None]]] = deque()
        self._failed = self._cut = False

    def feed(self, data: Bytes) -> list[Future[None]]:
        """Gives everybody the next piece; what to wait for before there is a next, and whose error to raise:
        a piece that was fed before, or nothing. Those futures must not be cancelled.
        """
        self._waiting.append(
            [pool.submit(self._give, number, sink, data) for number, (sink, pool) in enumerate(self._sinks)]
        )
        return self._waiting.popleft() if len(self._waiting) > DEPTH else []

    def rest(self) -> list[Future[None]]:
        """What is not done yet."""
        return [future for piece in self._left() for future in piece]

    def cut(self) -> list[Future[None]]:
        """What is not kept yet, when nothing more will come: the other sinks are given nothing from now on,
        and nobody waits for them.
        """
        self._cut = True
        return [piece[0] for piece in self._left()]

    def _left(self) -> list[list[Future[None]]]:
        left = list(self._waiting)
        self._waiting.clear()
        return left

    def _give(self, number: int, sink: Callable[[Bytes], object], data: Bytes) -> None:
        if self._failed or (self._cut and number):
            return
        try:
            sink(data)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> "Intake":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, (_, pool) in enumerate(self._sinks):
            pool.shutdown(wait=not (self._cut and number))
