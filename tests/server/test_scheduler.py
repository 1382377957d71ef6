"""The queue by itself: progress coalesces, the first reason is the true one, a drain ends everything."""

import asyncio
import random
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from compose.settings import Settings
from compose.warm import WarmPipeline
from server.engine import InProcessEngine, Work
from server.errors import Cancelled, Draining, ServerError
from server.job import Ask, Caller, Job, Ticket
from server.outbox import Done, Event, Outbox, Started, Step
from server.pace import Effort
from server.scheduler import Scheduler
from server.stacks import Composition
from tests.gates import Gate, HeldEngine

LONG = Settings(prompt="a red star", steps=150, width=64, height=64, count=64)
SHORT = Settings(prompt="a red star", steps=2, width=64, height=64)
SOMEBODY = Caller("somebody")


def bare(settings: Settings) -> Ask:
    return Ask(what="the bare base", load=lambda _: Work(settings, Composition({}, (), key=())))


async def events(outbox: Outbox, seen: list[Event]) -> None:
    async for event in outbox.events():
        seen.append(event)


async def test_a_slow_reader_sees_the_newest_progress_only() -> None:
    outbox = Outbox()
    outbox.put(Started(0.0))
    for step in range(1, 21):
        outbox.put(Step(0, step))
    outbox.fail(Cancelled("enough"))
    seen: list[Event] = []
    with pytest.raises(Cancelled):
        await events(outbox, seen)
    assert seen == [Started(0.0), Step(0, 20)]


async def test_the_first_reason_of_a_failure_is_told() -> None:
    outbox = Outbox()
    outbox.fail(Draining("the server is shutting down"))
    outbox.fail(Cancelled("the render was cancelled"))
    with pytest.raises(Draining):
        await events(outbox, [])


async def test_a_drain_ends_the_running_and_the_waiting_jobs_and_takes_no_more(warm: WarmPipeline) -> None:
    queue = Scheduler(InProcessEngine(warm))
    running, waiting = queue.admit(bare(LONG), SOMEBODY), queue.admit(bare(LONG), SOMEBODY)
    assert [running.position, waiting.position] == [0, 1]
    assert isinstance(await anext(running.events()), Started)
    begun = time.monotonic()
    await asyncio.to_thread(queue.close, 0.1)
    assert time.monotonic() - begun < 30  # 64 pictures of 150 steps take minutes
    for stopped in (running, waiting):
        with pytest.raises(Draining, match="send the request again"):
            await events(stopped.outbox, [])
    with pytest.raises(Draining):
        queue.admit(bare(LONG), SOMEBODY)


async def test_a_drain_lets_a_short_job_finish(warm: WarmPipeline) -> None:
    queue = Scheduler(InProcessEngine(warm))
    short = queue.admit(bare(SHORT), SOMEBODY)
    await asyncio.to_thread(queue.close, 60.0)
    seen: list[Event] = []
    await events(short.outbox, seen)
    assert isinstance(seen[-1], Done)


async def ending(ticket: Ticket) -> str:
    """How it ended for one caller: `done`, or the error's name."""
    try:
        async for _ in ticket.events():
            pass
    except ServerError as error:
        return type(error).__name__
    return "done"


async def test_the_stack_that_is_applied_goes_first(warm: WarmPipeline) -> None:
    gate = Gate()
    queue = Scheduler(HeldEngine(warm, gate))
    gate.shut("denoising")
    first = queue.admit(replace(bare(SHORT), key="a"), Caller("first"))
    assert await asyncio.to_thread(gate.reached.wait, 60)
    ended: list[str] = []

    async def end(ticket: Ticket, name: str) -> None:
        assert await ending(ticket) == "done"
        ended.append(name)

    waiting = [(queue.admit(replace(bare(SHORT), key=key), Caller(f"{key}{i}")), f"{key}{i}")
               for i in range(2) for key in "ba"]  # fmt: skip
    gate.open()
    await asyncio.gather(end(first, "first"), *(end(ticket, name) for ticket, name in waiting))
    assert ended == ["first", "a0", "a1", "b0", "b1"]
    await asyncio.to_thread(queue.close, 60.0)


def test_a_step_takes_what_each_that_is_done_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("server.job.time.perf_counter", lambda: float(next(ticks)))
    job = Job(bare(SHORT), threading.Condition())
    for step in (5, 10, 15, 20):  # of 20 steps from a picture, a fifth
        job.step(0, step)
    assert job.step_seconds() == 1.0
    job.step(1, 20)  # the only one of its picture
    assert job.step_seconds() == 1.0


async def test_who_waited_until_it_is_too_late_is_told_so_and_costs_nothing(warm: WarmPipeline) -> None:
    gate = Gate()
    queue = Scheduler(HeldEngine(warm, gate))
    gate.shut("denoising")
    first = queue.admit(replace(bare(SHORT), effort=Effort("kind", SHORT.steps)), SOMEBODY)
    assert await asyncio.to_thread(gate.reached.wait, 60)
    passed = queue.admit(bare(SHORT), Caller("late", time.monotonic() + 0.05))
    long = replace(bare(SHORT), effort=Effort("kind", 10**8))
    hopeless = queue.admit(long, Caller("late", time.monotonic() + 600))  # nothing is measured yet
    await asyncio.sleep(0.06)
    gate.open()
    assert await asyncio.gather(*map(ending, (first, passed, hopeless))) == [
        "done",
        "DeadlineExceeded",
        "DeadlineExceeded",
    ]
    await asyncio.to_thread(queue.close, 60.0)
    assert (queue.status().done, queue.status().cancelled) == (1, 2)


async def test_whoever_comes_leaves_and_shares_in_any_order_everybody_ends_and_nothing_is_left(
    warm: WarmPipeline,
) -> None:
    queue, chance = Scheduler(InProcessEngine(warm), capacity=16), random.Random(5)
    tiny = Settings(prompt="a red star", steps=2, width=32, height=32)

    def fails(_: object) -> Work:
        raise Cancelled("it could not be loaded")

    async def one(number: int) -> str:
        await asyncio.sleep(chance.random() * 0.5)
        kind = chance.randrange(6)
        ask = replace(
            bare(replace(tiny, seed=kind)),
            identity=kind if kind < 3 else None,
            key=chance.choice("xyz"),
            priority=chance.randrange(-3, 3),
            keep=chance.random() < 0.2,
            effort=Effort("kind", 2),
        )
        if chance.random() < 0.1:
            ask = replace(ask, load=fails, identity=None)
        deadline = time.monotonic() + chance.random() if chance.random() < 0.2 else None
        try:
            ticket = queue.admit(ask, Caller(f"client {number % 5}", deadline))
        except ServerError as error:
            return type(error).__name__
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.2)
            ticket.leave()
            return "left"
        with ticket:
            return await ending(ticket)

    ends = Counter(await asyncio.wait_for(asyncio.gather(*(one(n) for n in range(150))), 120))
    assert set(ends) <= {"done", "left", "Cancelled", "DeadlineExceeded", "QueueFull"}
    assert ends["done"] > 10
    status = queue.status()
    while status.running:  # who left may have been the last
        await asyncio.sleep(0.01)
        status = queue.status()
    assert (status.waiting, queue._in_flight, queue._waiting) == ((), {}, [])
    assert len(queue._queue) == 0
    assert not queue._queue._accounts
    await asyncio.to_thread(queue.close, 60.0)
