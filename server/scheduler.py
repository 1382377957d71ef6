"""The queue before the GPU, and the one thread that works it off.

Bounded: when it is full a job is refused before any work. First come, first served. A job ends within one
denoising step of being cancelled or of its deadline, whether it waits or runs. What a job has to say goes to
its `Outbox`, which a slow reader can leave full without holding the GPU: progress and previews coalesce,
pictures never drop.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from compose.render import Picture
from server.engine import AnyWork, Engine, Result
from server.errors import Cancelled, DeadlineExceeded, Draining, QueueFull

CAPACITY = 64


@dataclass(frozen=True, slots=True)
class Started:
    """The job runs now; seconds it waited."""

    queue_seconds: float


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
    picture: Picture


@dataclass(frozen=True, slots=True)
class Finished:
    """A picture."""

    image: int
    picture: Picture


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


@dataclass(slots=True, eq=False)
class Job:
    """Work with a deadline (of time.monotonic) and a way to call it off. It is its own render's listener."""

    work: AnyWork
    outbox: Outbox
    deadline: float | None = None
    queued_at: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded when the job shall end."""
        if self.cancelled.is_set():
            raise Cancelled("the render was cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded(
                "the deadline passed before the render was done; allow more time or fewer steps"
            )

    def step(self, image: int, step: int) -> None:
        """Progress."""
        self.outbox.put(Step(image, step))

    def preview(self, image: int, step: int, picture: Picture) -> None:
        """What the picture will roughly be."""
        self.outbox.put(Preview(image, step, picture))

    def picture(self, image: int, picture: Picture) -> None:
        """A finished picture."""
        self.outbox.put(Finished(image, picture))


@dataclass(frozen=True, slots=True)
class Listed:
    """A job on the status page. `seconds` it waited; `phase` is `loading`, `waiting` or `running`."""

    client: str
    what: str
    priority: int
    seconds: float
    phase: str
    callers: int = 1
    image: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """What waits, in the order in which it will run."""

    waiting: tuple[Listed, ...]
    capacity: int
    draining: bool
    coalesced: int = 0


class Scheduler:
    """Owns the thread that renders."""

    def __init__(self, engine: Engine, *, capacity: int = CAPACITY) -> None:
        self._engine = engine
        self._capacity = capacity
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="render", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> int:
        """Puts a job into the queue; how many are before it. Raises QueueFull, Draining."""
        with self._changed:
            if self._closed:
                raise Draining(
                    "the server is shutting down; send the request to another, or again in a minute"
                )
            if len(self._waiting) >= self._capacity:
                raise QueueFull(
                    f"{len(self._waiting)} renders are waiting, which is the limit; try again later"
                )
            before = len(self._waiting) + (self._running is not None)
            self._waiting.append(job)
            self._changed.notify()
        return before

    def status(self) -> Status:
        """How it stands."""
        now = time.monotonic()
        with self._changed:
            waiting = tuple(
                Listed(job.work.call.client, "render", 0, now - job.queued_at, "waiting")
                for job in self._waiting
            )
            return Status(waiting, self._capacity, self._closed)

    def cancel(self, job: Job) -> None:
        """Calls a job off: at once while it waits, within one step while it runs. Harmless afterwards."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self, grace: float) -> None:
        """Takes no more jobs, gives the accepted ones `grace` seconds, then cancels what is left and stops
        the thread.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(grace)
        with self._changed:
            left = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
        for job in left:
            job.cancelled.set()
            job.outbox.fail(Draining("the server is shutting down; send the request again in a minute"))
        self._thread.join()

    def _work(self) -> None:
        while job := self._next():
            started = time.monotonic()
            try:
                job.check()
                job.outbox.put(Started(started - job.queued_at))
                job.outbox.put(Done(self._engine.do(job.work, job)))
            except BaseException as error:  # whatever it is, it is this job's, and the thread lives on
                job.outbox.fail(error)
            finally:
                with self._changed:
                    self._running = None

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running
