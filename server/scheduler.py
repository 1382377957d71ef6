"""The queue before the GPU, the one thread that works it off, and those that load stacks ahead of it.

Bounded: who asks is given a place, or refused, before anything is loaded. Fair between clients
(`server.fairness`). A deadline that will be missed is refused at once, as far as the server has measured how
fast it is (`server.pace`). A job of several pictures takes a turn for each, and goes on when it is its turn
again. Whatever a job does, waiting, loading or rendering, it ends within one denoising step of its last
caller's leaving (`server.job`).
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType

from compose.threads import heed
from server.calls import OTHERS, working_for
from server.engine import AnyWork, Engine, Result
from server.errors import Cancelled, DeadlineExceeded, Draining, QueueFull
from server.fairness import Claim, FairQueue
from server.job import Ask, Caller, Job, Kept, Place, Ticket
from server.outbox import Done
from server.pace import KNOWN_SECONDS, Pace
from server.spool import Spool

CAPACITY, SHARERS = 64, 64
"""Of jobs that wait, and of callers for one job; the next caller begins another."""
LOADERS, AHEAD = 2, 4
"""Threads that load, and how many jobs of those next in turn are loaded."""
_LAST = (math.inf,)
"""A rank behind all claims."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A job on the status page; `seconds` it waited, or since it began. `phase`: `loading`, `waiting`, also
    between two turns, or `running`.
    """

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
    """What waits, in the order in which it will run, what runs, and jobs counted since the start by how they
    ended. `coalesced` are callers who were given the job of another.
    """

    waiting: tuple[Listed, ...]
    running: Listed | None
    capacity: int
    draining: bool
    done: int
    failed: int
    cancelled: int
    refused: int
    coalesced: int


class Scheduler:
    """Owns the thread that renders. Safe to use from several threads."""

    def __init__(
        self,
        engine: Engine,
        *,
        capacity: int = CAPACITY,
        shares: Mapping[str, float] = MappingProxyType({}),
        spool: Spool | None = None,
    ) -> None:
        """`shares` of clients are those of `FairQueue`; pictures wait in the spool for their readers."""
        self._engine, self._capacity, self.spool = engine, capacity, spool or Spool()
        self._changed = threading.Condition()
        self._queue: FairQueue[Job] = FairQueue(shares=shares)
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._turn_began = 0.0
        self._last_key: object = None
        self._in_flight: dict[object, Job] = {}
        self._kept, self._pace, self._counts = Kept(), Pace(), Counter[str]()
        self._places: set[Place] = set()
        self._closed = self._stopped = False
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in [(self._work, "render"), *[(self._load, "load")] * LOADERS]
        ]
        for thread in self._threads:
            thread.start()

    def admit(self, ask: Ask, caller: Caller) -> Ticket:
        """A place in the queue, or a share in the same job of somebody else; `position` is how many are
        before it. Raises QueueFull, Draining, DeadlineExceeded.
        """
        with self._changed:
            self._check_open(goes_on=ask.place is not None)
            if ask.keep and (told := self._kept.events(ask.identity)):
                self._counts["coalesced"] += 1
                ticket = self._ticket(Job(ask, self._changed, self.spool, over=True), caller)
                for event in told:
                    ticket.outbox.put(event)
                return ticket
            job = self._in_flight.get(ask.identity) if ask.identity is not None else None
            if job and job.shared and len(job.tickets) < SHARERS:
                return self._join(job, ask, caller)
            if ask.place is None and not ask.durable:
                self._check_room()
            job = Job(
                ask,
                self._changed,
                self.spool,
                keep=ask.keep,
                durable=ask.durable,
                others=self._others_next,
            )
            ticket = self._ticket(job, caller)
            self._enter(ticket)
            ticket.job.tickets.append(ticket)
            self._waiting.append(ticket.job)
            if ask.identity is not None:
                self._in_flight[ask.identity] = ticket.job
            self._changed.notify_all()
            return ticket

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for a request of many jobs, which is not refused halfway. Raises QueueFull, Draining."""
        place = Place()
        with self._changed:
            self._check_open(goes_on=False)
            self._check_room()
            self._places.add(place)
        try:
            yield place
        finally:
            with self._changed:
                self._places.discard(place)
                self._changed.notify_all()

    def status(self) -> Status:
        """How it stands."""
        now = time.monotonic()
        with self._changed:
            order = [claim.item for claim in self._queue.order()]
            names = ("done", "failed", "cancelled", "refused", "coalesced")
            return Status(
                waiting=tuple(_listed(job, now) for job in order),
                running=_listed(self._running, now, runs=True) if self._running else None,
                capacity=self._capacity,
                draining=self._closed,
                **{name: self._counts[name] for name in names},
            )

    def close(self, grace: float) -> None:
        """Takes no more jobs, gives the accepted ones `grace` seconds, then cancels what is left and stops.
        Durable jobs that wait are given back at once, unless somebody else waits for them, too: they will be
        there after a restart.
        """
        with self._changed:
            self._closed = True
            for job in [job for job in self._waiting if job.durable]:
                self._end(job, error=_gone())
            self._changed.notify_all()
        self._threads[0].join(grace)
        with self._changed:
            self._stopped = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                self._end(job, error=_gone())
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _check_open(self, *, goes_on: bool) -> None:
        if self._stopped or (self._closed and not goes_on):
            self._counts["refused"] += 1
            raise Draining("the server is shutting down; send the request to another, or again in a minute")

    def _check_room(self) -> None:
        if self.spool.full():
            self._counts["refused"] += 1
            _, unread = self.spool.held()
            raise QueueFull(
                f"{unread >> 20} MB of finished pictures wait to be read, which is the limit; read those you "
                "asked for, or try again later"
            )
        single = [job for job in self._waiting if job.ask.place is None and not job.durable]
        taken = len(self._places) + len(single)
        if taken >= self._capacity:
            self._counts["refused"] += 1
            raise QueueFull(f"{taken} renders are waiting, which is the limit; try again later")

    def _ticket(self, job: Job, caller: Caller) -> Ticket:
        ask = job.ask
        claim = Claim(
            item=job,
            client=caller.name,
            priority=ask.priority,
            deadline=caller.deadline,
            key=ask.key,
            cost=self._pace.of(job.left()) or 1.0,
            since=time.monotonic(),
        )
        return Ticket(job, caller, claim, self._leave)

    def _join(self, job: Job, ask: Ask, caller: Caller) -> Ticket:
        ticket = self._ticket(job, caller)
        ticket.claim.priority = ask.priority
        if job is not self._running:
            self._enter(ticket)
        job.join(ticket)
        job.keep, job.durable = job.keep or ask.keep, job.durable and ask.durable
        self._counts["coalesced"] += 1
        self._changed.notify_all()
        return ticket

    def _enter(self, ticket: Ticket) -> None:
        """Lets a ticket wait. Raises DeadlineExceeded when it would in vain."""
        self._queue.add(ticket.claim)
        order = [claim.item for claim in self._queue.order()]
        before = order[: order.index(ticket.job)]
        ticket.position = len(before) + (self._running is not None)
        now = time.monotonic()
        wait = sum(self._pace.of(job.left()) or 0.0 for job in before)
        if self._running:
            wait += max(0.0, (self._pace.of(self._running.left()) or 0.0) - now + self._turn_began)
        others = f"; about {wait:.1f} s of other renders are before it" if before or self._running else ""
        if late := self._too_late(ticket, now, others):
            self._queue.remove(ticket.claim)
            self._counts["refused"] += 1
            raise late

    def _too_late(self, ticket: Ticket, now: float, more: str = "") -> DeadlineExceeded | None:
        """Why a ticket's deadline will be missed even if its job runs at once, as far as anything like it was
        measured. What is before it does not count: that may be called off.
        """
        effort, deadline = ticket.job.left(), ticket.caller.deadline
        step = self._pace.step(effort, since=now - KNOWN_SECONDS)
        if deadline is None or effort is None or step is None or now + step * effort.steps <= deadline:
            return None
        own, left = step * effort.steps, max(0.0, deadline - now)
        return DeadlineExceeded(
            f"the render takes about {own:.1f} s ({effort.steps} steps of {step * 1e3:.0f} ms), and its "
            f"deadline is in {left:.1f} s{more}; allow more time or fewer steps"
        )

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            self._queue.remove(ticket.claim)
            if ticket in ticket.job.tickets:
                ticket.job.tickets.remove(ticket)
                self._abandon(ticket.job)

    def _abandon(self, job: Job) -> None:
        """Ends a job that nobody waits for; one that runs finds out at its next step."""
        if job.tickets or job.over:
            return
        if job is self._running:
            self._forget(job)
        else:
            self._end(job, error=Cancelled("the render was cancelled"))

    def _forget(self, job: Job) -> None:
        """Nobody joins it any more."""
        if self._in_flight.get(job.ask.identity) is job:
            del self._in_flight[job.ask.identity]

    def _end(self, job: Job, *, result: Result | None = None, error: BaseException | None = None) -> None:
        """Tells all tickets how it ended. What runs goes on until its next check."""
        with self._changed:
            if not job.over:
                cancelled = isinstance(error, Draining) or not job.tickets
                self._counts["done" if error is None else "cancelled" if cancelled else "failed"] += 1
            job.over = True
            self._forget(job)
            for ticket in job.tickets:
                self._queue.remove(ticket.claim)
                if error is not None:
                    ticket.outbox.fail(error)
                elif result is not None:
                    ticket.outbox.put(Done(result))
            job.tickets.clear()
            if job in self._waiting:
                self._waiting.remove(job)
            if result is not None and job.keep and job.shared:
                self._kept.keep(job.ask.identity, job.pictures, result)
            job.pictures = []  # nobody joins it any more
            self._changed.notify_all()

    def _work(self) -> None:
        heed()
        while taken := self._next():
            job, work, begun = taken
            try:
                job.check()
                result = job.rest(time.monotonic(), self._engine.do(work, job))
                if result is not None:
                    self._end(job, result=result)
            except BaseException as error:  # whatever it is, it is this job's, and the thread lives on
                self._end(job, error=error)
            with self._changed:
                self._running = None
                for client in job.clients:
                    self._queue.served(client, (time.monotonic() - begun) / len(job.clients))
                if job.ask.effort and (seconds := job.step_seconds()):
                    self._pace.measured(job.ask.effort.kind, seconds, time.monotonic())
                if not job.over:
                    self._again(job)

    def _others_wait(self) -> int:
        """How many other jobs could have their turn."""
        with self._changed:
            return sum(job.work is not None for job in self._waiting)

    def _others_next(self, job: Job) -> bool:
        """Whether another job may have its turn before the next picture of this: one of somebody else, or of
        the same client and more urgent. Not until the turn has lasted as long as it takes to begin one, or
        bases would be loaded and stacks be merged for a picture each.
        """
        begin, lasted = job.turn_seconds()
        with self._changed:
            mine = {t.caller.name: t.claim.rank() for t in job.tickets}
            waiting = [t for other in self._waiting if other.work is not None for t in other.tickets]
            if not any(t.claim.rank() < mine.get(t.caller.name, _LAST) for t in waiting):
                return False
            return lasted >= begin + (job.load_seconds if self._others_wait() >= AHEAD else 0.0)

    def _again(self, job: Job) -> None:
        """Lets a job wait for its next turn, a durable one after the next start if the server ends; what it
        works on is loaded again by then, where the turns of many others come before.
        """
        if self._closed and job.durable:
            self._end(job, error=_gone())
            return
        job.ask.call.begin(OTHERS)
        other_bases = any(other.ask.base != job.ask.base for other in self._waiting)
        self._waiting.append(job)
        for ticket in job.tickets:
            claim = ticket.claim
            claim.since, claim.overtaken = time.monotonic(), 0
            claim.cost = self._pace.of(job.left()) or 1.0
            # to change a stack takes no time; to change the base may be to load it
            claim.key = job.ask.key if other_bases else None
            self._queue.add(claim)
        if all(claim.item is not job for claim in self._queue.order()[:AHEAD]):
            job.work, job.loading = None, False
        self._abandon(job)
        self._changed.notify_all()

    def _next(self) -> tuple[Job, AnyWork, float] | None:
        with self._changed:
            while True:
                now = time.monotonic()
                nearest = self._drop_late(now)
                job = self._queue.take(now=now, key=self._last_key, ready=lambda job: job.work is not None)
                if job and job.work is not None:
                    self._waiting.remove(job)
                    self._running, self._last_key, self._turn_began = job, job.ask.key, now
                    work = job.start(now)
                    self._changed.notify_all()
                    return job, work, now
                if self._stopped or (self._closed and not self._waiting and not self._places):
                    return None
                self._changed.wait(nearest)

    def _drop_late(self, now: float) -> float | None:
        """Ends what waits in vain; seconds to the next deadline."""
        nearest = None
        for job in tuple(self._waiting):
            for ticket in job.drop_late(now):
                self._queue.remove(ticket.claim)
            for ticket in tuple(job.tickets):
                if late := self._too_late(ticket, now):
                    ticket.outbox.fail(late)
                    job.tickets.remove(ticket)
                    self._queue.remove(ticket.claim)
                elif (deadline := ticket.caller.deadline) is not None:
                    nearest = min(deadline - now, nearest or deadline - now)
            self._abandon(job)
        return nearest

    def _load(self) -> None:
        heed()
        while job := self._next_to_load():
            begun = time.perf_counter()
            try:
                with working_for(job.ask.call):
                    work = job.ask.load(partial(self._check_wanted, job))
            except BaseException as error:  # this job's, too
                self._end(job, error=error)
                continue
            with self._changed:
                job.work, job.load_seconds = work, time.perf_counter() - begun
                job.ask.call.took("compose", job.load_seconds)
                self._changed.notify_all()

    def _check_wanted(self, job: Job) -> None:
        """Raises Cancelled for a job that is over before it was loaded."""
        with self._changed:
            if job.over:
                raise Cancelled("the render was cancelled")

    def _next_to_load(self) -> Job | None:
        with self._changed:
            while True:
                for job in self._wanted():
                    if not job.loading:
                        job.loading = True
                        return job
                if self._stopped or (self._closed and not self._waiting and not self._places):
                    return None
                self._changed.wait()

    def _wanted(self) -> list[Job]:
        """Those that shall be there for the next turns. While one waits for its merge others that merge are
        passed over, who would only wait with it and hold up all that do not.
        """
        merging = any(j.ask.merges and j.loading and j.work is None for j in self._waiting)
        able = [c for c in self._queue.order() if c.item.loading or not (merging and c.item.ask.merges)]
        same = (c for c in able if c.key is not None and c.key == self._last_key)
        return [claim.item for claim in (*able[:AHEAD], *islice(same, 1))]


def _gone() -> Draining:
    return Draining("the server is shutting down; send the request again in a minute")


def _listed(job: Job, now: float, *, runs: bool = False) -> Listed:
    since = job.began or min((ticket.claim.since for ticket in job.tickets), default=now)
    phase = "running" if runs else "waiting" if job.work is not None else "loading"
    return Listed(
        client=job.describe(),
        what=job.ask.what,
        priority=max((ticket.claim.priority for ticket in job.tickets), default=job.ask.priority),
        seconds=now - since,
        phase=phase,
        callers=len(job.tickets),
        image=job.image,
        step=job.steps_done,
    )
