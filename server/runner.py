"""Jobs: renders that outlive who asked for them. What they are is in `registry.jobs`; here they are done.

Of every creator's jobs `FED` are in the scheduler's queue, the others wait in the catalog, so that a thousand
of one creator stand in nobody's way. A job that the end of the server cuts short is queued again, and only
the pictures it lacks are rendered.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass, field
from datetime import timedelta

import grpc

from registry.errors import NotFound
from registry.jobs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, JobEvent, Jobs
from server import outbox
from server.calls import Call, enter
from server.errors import BadRequest, Draining, QueueFull, status
from server.guides import Sent
from server.job import Caller
from server.orders import Order
from server.rendering import Rendering, Renderings, Summary
from server.telemetry import Telemetry

log = logging.getLogger("atelier")
FED, UNDONE_LIMIT = 2, 1000
KEPT = timedelta(days=7)
SWEEP_SECONDS, RETRY_SECONDS = 3600.0, 5.0
Progress = outbox.Step | outbox.Preview


@dataclass(slots=True, eq=False)
class _Watcher:
    """Who watches a job: woken by what is kept, and told the newest progress besides."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    progress: dict[type, Progress] = field(default_factory=dict)


class JobRunner:
    """Does the jobs of a catalog, on the event loop."""

    def __init__(
        self,
        jobs: Jobs,
        renderings: Renderings,
        *,
        keep: timedelta = KEPT,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._jobs, self._renderings, self._keep = jobs, renderings, keep
        self._telemetry = telemetry
        self._waiting: defaultdict[str, list[Job]] = defaultdict(list)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._fed: defaultdict[str, set[str]] = defaultdict(set)
        self._watchers: defaultdict[str, set[_Watcher]] = defaultdict(set)
        self._stopping = False
        self._ending = asyncio.Event()
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes up what the server before left; what needs a base, a ControlNet or an IP-Adapter that this
        one does not serve is left to wait.
        """
        for job in await asyncio.to_thread(self._jobs.unfinished):
            if self._renderings.takes(job.order):
                self.add(job)
            else:
                log.warning(
                    "the job %s waits for a base, a ControlNet or an IP-Adapter that is not served", job.name
                )
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Feeds no more, and waits until what ran is put away. The scheduler is closed by now."""
        self._stopping = True
        self._ending.set()
        if self._sweeping:
            self._sweeping.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        for watcher in [w for watchers in self._watchers.values() for w in watchers]:
            watcher.changed.set()

    def check_room(self) -> None:
        """Raises QueueFull, Draining."""
        undone = len(self._tasks) + sum(map(len, self._waiting.values()))
        if undone >= UNDONE_LIMIT:
            raise QueueFull(f"{undone} jobs are not done yet, which is the limit; try again later")
        if self._stopping:
            raise Draining("the server is shutting down; send the request again in a minute")

    def add(self, job: Job) -> None:
        """Lets a job wait for its turn; one that does so already stays where it is."""
        mine = self._waiting[job.creator]
        if job.state == QUEUED and job.name not in self._tasks and job.name not in {j.name for j in mine}:
            mine.append(job)
            mine.sort(key=lambda other: (-other.priority, other.number))
        self._feed(job.creator)

    async def cancel(self, name: str) -> Job:
        """Calls a job off: within one step when it renders. Raises NotFound."""
        job = await asyncio.to_thread(self._jobs.change, name, CANCELLED, keep=self._keep)
        self._drop(job)
        return job

    async def delete(self, name: str) -> None:
        """Forgets a job. Raises NotFound."""
        self._drop(await self.cancel(name))
        await asyncio.to_thread(self._jobs.delete, name)
        self._wake(name)

    def _drop(self, job: Job) -> None:
        waiting = self._waiting.get(job.creator, [])
        waiting[:] = [other for other in waiting if other.name != job.name]
        if task := self._tasks.get(job.name):
            task.cancel()
        self._wake(job.name)

    async def watch(self, name: str, after: int) -> AsyncGenerator[tuple[int, JobEvent | Progress], None]:
        """What happens to a job after an event, each with the number of the last event that is kept. Raises
        NotFound, BadRequest, Draining.
        """
        watcher, seen = _Watcher(), after
        self._watchers[name].add(watcher)
        try:
            while True:
                watcher.changed.clear()
                job = await asyncio.to_thread(self._jobs.get, name)
                if not 0 <= seen <= job.sequence:
                    raise BadRequest(
                        f"after_sequence {seen} is not within 0 and {job.sequence}, its last event's",
                        field="after_sequence",
                    )
                for event in await asyncio.to_thread(self._jobs.events, name, seen):
                    seen = event.sequence
                    yield seen, event
                if job.over and seen >= job.sequence:
                    return
                done = len(job.images)
                while watcher.progress:
                    _, progress = watcher.progress.popitem()
                    if progress.image >= done:  # else its picture was told already
                        yield seen, progress
                if self._stopping:
                    raise Draining(f"the server is shutting down; watch on from event {seen}")
                await watcher.changed.wait()
        finally:
            self._watchers[name].discard(watcher)
            if not self._watchers[name]:
                del self._watchers[name]

    def _wake(self, name: str, progress: Progress | None = None) -> None:
        for watcher in self._watchers.get(name, ()):
            if progress:
                watcher.progress[type(progress)] = progress
            watcher.changed.set()

    def _feed(self, creator: str) -> None:
        """Puts the next jobs of a creator into the queue."""
        waiting, fed = self._waiting[creator], self._fed[creator]
        while waiting and len(fed) < FED and not self._stopping:
            job = waiting.pop(0)
            fed.add(job.name)
            task = asyncio.create_task(self._do(job), context=Context())  # of no call: it outlives that
            self._tasks[job.name] = task
            task.add_done_callback(lambda _, job=job: self._done(job))  # type: ignore[misc]
        if not waiting:
            del self._waiting[creator]
        if not fed:
            del self._fed[creator]

    def _done(self, job: Job) -> None:
        del self._tasks[job.name]
        self._fed[job.creator].discard(job.name)
        self._wake(job.name)
        self._feed(job.creator)

    async def _do(self, job: Job) -> None:
        """Renders what a job lacks, as a call of its own, known by the job's name, once the disk has room for
        it. Whatever goes wrong is the job's.
        """
        if not self._jobs.has_room():
            log.warning("the job %s waits for room on the disk", job.name)
        while not self._jobs.has_room():
            if self._ending.is_set():
                return
            await self._pause()
        call = Call(self._telemetry, "job", request_id=job.name, client=job.creator)
        enter(call)
        code = grpc.StatusCode.CANCELLED
        try:
            order, first = await asyncio.to_thread(self._order, job)
            await self._render(job, order, first)
            code = grpc.StatusCode.OK
        except Draining:
            code, self._stopping = grpc.StatusCode.UNAVAILABLE, True
            await self._settle(job, QUEUED)
        except Exception as error:
            code, message, _ = status(error)
            await self._settle(job, FAILED, {"error_code": code.name, "error": message})
        finally:
            call.finish(code)

    def _order(self, job: Job) -> tuple[Order, int]:
        sent = Sent.kept(self._jobs.inputs(job.name))
        return self._renderings.resumed(job.order, len(job.images), sent=sent)

    async def _render(self, job: Job, order: Order, first: int) -> None:
        name = job.name
        told: dict[str, object] = {"warnings": [], "seconds": {}}
        if len(job.images) < job.order["count"]:
            events = self._renderings.run(order, Caller(job.creator or "jobs"), durable=True)
            async with aclosing(events):
                async for event in events:
                    match event:
                        case outbox.Started():
                            await self._change(job, RUNNING)
                        case outbox.Step(image, step):
                            self._wake(name, outbox.Step(first + image, step))
                        case outbox.Preview(image, step, picture):
                            self._wake(name, outbox.Preview(first + image, step, picture))
                        case Rendering(image, png, _):
                            data = await asyncio.to_thread(bytes, png)
                            await asyncio.to_thread(self._jobs.add_image, name, first + image, data)
                            self._wake(name)
                        case Summary(_, seconds, differences, warnings):
                            told = {"warnings": [*differences, *warnings], "seconds": dict(seconds)}
        await self._settle(job, DONE, told)

    async def _settle(self, job: Job, state: str, told: dict[str, object] | None = None) -> None:
        """Keeps how a job came out as soon as that can be kept: a full disk is not full for ever. What cannot
        be before the end is found running at the next start, and queued again.
        """
        while True:
            try:
                with contextlib.suppress(NotFound):  # it was deleted meanwhile
                    await self._change(job, state, told)
                return
            except Exception as error:
                log.error("that the job %s is %s cannot be kept: %s", job.name, state, error)
            if self._ending.is_set():
                return
            await self._pause()

    async def _pause(self) -> None:
        """Until it is worth trying again, or the server ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), RETRY_SECONDS)

    async def _change(self, job: Job, state: str, told: dict[str, object] | None = None) -> None:
        await asyncio.to_thread(self._jobs.change, job.name, state, told=told, keep=self._keep)
        self._wake(job.name)

    async def _sweep(self) -> None:
        """Forgets jobs whose time has come, now and then."""
        while True:
            try:
                for name in await asyncio.to_thread(self._jobs.expire):
                    self._wake(name)
            except Exception:
                log.exception("jobs that are over could not be swept away; the next try is in an hour")
            await asyncio.sleep(SWEEP_SECONDS)
