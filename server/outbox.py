"""What a job has to say, on its way from the render thread to whoever reads.

A slow reader leaves its `Outbox` full and holds nobody: progress and previews coalesce, pictures never drop.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from server.engine import Result
from server.spool import Spooled


@dataclass(frozen=True, slots=True)
class Started:
    """The job runs now; seconds it waited, and seconds that its stack took to load meanwhile."""

    queue_seconds: float
    load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """Denoising steps of one picture that are done."""

    image: int
    step: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture as it looks so far."""

    image: int
    step: int
    picture: Spooled


@dataclass(frozen=True, slots=True)
class Finished:
    """A picture."""

    image: int
    picture: Spooled


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a job that went well."""

    result: Result


Event = Started | Step | Preview | Finished | Done
_COALESCED = (Step, Preview)


class Outbox:
    """Events from the GPU thread to an asyncio reader. Unread progress is replaced by newer progress."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._mutex = threading.Lock()
        self._events: deque[Event] = deque()
        self._error: BaseException | None = None

    def put(self, event: Event) -> None:
        """Adds an event; from any thread."""
        with self._mutex:
            if isinstance(event, _COALESCED):
                older = [e for e in self._events if type(e) is type(event)]
                for unread in older:
                    self._events.remove(unread)
            self._events.append(event)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error; from any thread."""
        with self._mutex:
            self._error = self._error or error  # the first reason is the true one
        self._wake()

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ready.set)

    async def events(self) -> AsyncIterator[Event]:
        """Events until `Done`; raises what the job failed with."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            while True:
                with self._mutex:
                    event = self._events.popleft() if self._events else None
                    error = self._error
                if event is None:
                    break
                yield event
                if isinstance(event, Done):
                    return
            if error:
                raise error
