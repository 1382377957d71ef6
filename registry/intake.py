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
    """A thread for each sink. As a context manager it leaves when all that was fed is done, or given up:
    after the first failure no sink gets anything more, so that what was written has no gap.
    """

    def __init__(self, *sinks: Callable[[Bytes], object]) -> None:
        self._sinks = [(sink, ThreadPoolExecutor(1, "intake")) for sink in sinks]
        self._waiting: deque[list[Future[None]]] = deque()
        self._failed = False

    def feed(self, data: Bytes) -> list[Future[None]]:
        """Gives everybody the next piece; what to wait for before there is a next, and whose error to raise:
        a piece that was fed before, or nothing. Those futures must not be cancelled.
        """
        self._waiting.append([pool.submit(self._give, sink, data) for sink, pool in self._sinks])
        return self._waiting.popleft() if len(self._waiting) > DEPTH else []

    def rest(self) -> list[Future[None]]:
        """What is not done yet."""
        rest = [future for piece in self._waiting for future in piece]
        self._waiting.clear()
        return rest

    def _give(self, sink: Callable[[Bytes], object], data: Bytes) -> None:
        if self._failed:
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
        for _, pool in self._sinks:
            pool.shutdown()
