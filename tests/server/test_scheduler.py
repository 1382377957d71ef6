"""The queue by itself: progress coalesces, the first reason is the true one, a drain ends everything."""

import asyncio
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from compose.render import Rendered
from compose.settings import Settings
from compose.warm import WarmPipeline
from server.calls import OTHERS
from server.engine import InProcessEngine, Work
from server.errors import Cancelled, Draining, ServerError
from server.job import Ask, Caller, Job, Ticket
from server.outbox import Done, Event, Finished, Outbox, Started, Step
from server.pace import Effort
from server.scheduler import CAPACITY, Scheduler
from server.spool import Spool
from server.stacks import Composition
from tests.gates import Gate, HeldEngine
from tests.server.test_cancellation import until

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
    job = Job(bare(SHORT), threading.Condition(), Spool())
    for step in (5, 10, 15, 20):  # of 20 steps from a picture, a fifth
        job.step(0, step)
    assert job.step_seconds() == 1.0
    job.step(1, 20)  # the only one of its picture
    assert job.step_seconds() == 1.0


async def many_and_one(
    warm: WarmPipeline,
    gate: Gate,
    other: str,
    *,
    capacity: int = CAPACITY,
    durable: bool = False,
    **more: Any,
) -> tuple[Scheduler, Ticket, Ticket]:
    """Four pictures of `many`, held after the first, and one picture of somebody else who waits."""
    queue = Scheduler(HeldEngine(warm, gate), capacity=capacity)
    gate.shut("delivering")
    many = bare(replace(SHORT, count=4))
    many = replace(many, effort=Effort("kind", 4 * SHORT.steps), durable=durable)
    ticket = queue.admit(replace(many, identity="many", key="a stack"), Caller("many"))
    assert await asyncio.to_thread(gate.reached.wait, 60)
    ticket.job._turn_began = time.perf_counter()  # it began at once
    after = queue.admit(replace(bare(SHORT), **more), Caller(other))
    await asyncio.to_thread(until, lambda: queue._others_wait() > 0)  # it is loaded
    return queue, ticket, after


async def pictures_of(ticket: Ticket) -> tuple[list[tuple[int, bytes]], Rendered, float]:
    """Pictures, how it ended, and when."""
    pictures = []
    async for event in ticket.events():
        if isinstance(event, Finished):
            pictures.append((event.image, bytes(event.picture)))
        if isinstance(event, Done):
            assert isinstance(event.result, Rendered)
            return pictures, event.result, time.monotonic()
    raise AssertionError("no end")


async def test_between_two_pictures_of_many_others_have_their_turn(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else", key="another stack")
    gate.open()
    (pictures, whole, last), (_, _, first) = await asyncio.gather(pictures_of(many), pictures_of(one))
    assert first < last
    assert [image for image, _ in pictures] == [0, 1, 2, 3]
    assert whole.seconds[OTHERS] > 0
    assert whole.gave_way_at is None
    assert queue.status().done == 2
    alone, undisturbed, _ = await pictures_of(queue.admit(bare(replace(SHORT, count=4)), SOMEBODY))
    assert alone == pictures
    assert OTHERS not in undisturbed.seconds
    await asyncio.to_thread(queue.close, 60.0)


async def test_a_base_that_would_have_to_be_changed_stays_for_a_few_pictures(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else", key="another stack", base="another")
    gate.open()
    (_, _, first), (_, _, last) = await asyncio.gather(pictures_of(many), pictures_of(one))
    assert first < last  # four are fewer than it may be overtaken by
    await asyncio.to_thread(queue.close, 60.0)


async def test_a_clients_own_later_job_waits_for_all_pictures_of_the_first(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, later = await many_and_one(warm, gate, "many")
    urgent = queue.admit(replace(bare(SHORT), priority=1), Caller("many"))
    await asyncio.to_thread(until, lambda: all(job.work is not None for job in queue._waiting))
    gate.open()
    ends = [end for _, _, end in await asyncio.gather(*map(pictures_of, (many, later, urgent)))]
    assert ends[2] < ends[0] < ends[1]
    await asyncio.to_thread(queue.close, 60.0)


async def test_a_job_between_two_turns_is_joined_left_and_counts_what_is_left(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else")
    assert many.job.left() == Effort("kind", 4 * SHORT.steps)
    gate.shut("denoising")  # of the second job
    gate._opened.set()
    assert await asyncio.to_thread(gate.reached.wait, 60)
    (waiting,) = queue.status().waiting
    assert (waiting.client, waiting.phase, waiting.image) == ("many", "waiting", 0)
    assert many.job.left() == Effort("kind", 3 * SHORT.steps)
    joined = queue.admit(replace(bare(SHORT), identity="many"), Caller("a third"))
    assert joined.job is many.job
    many.leave()
    gate.open()
    pictures, _, _ = await pictures_of(joined)
    assert [image for image, _ in pictures] == [0, 1, 2, 3]
    assert await ending(one) == "done"
    assert queue.status().coalesced == 1
    await asyncio.to_thread(queue.close, 60.0)


async def test_who_gives_up_between_two_turns_costs_nothing_more(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else")
    gate.shut("denoising")
    gate._opened.set()
    assert await asyncio.to_thread(gate.reached.wait, 60)
    many.leave()
    assert queue.status().waiting == ()
    gate.open()
    assert await ending(one) == "done"
    await asyncio.to_thread(queue.close, 60.0)
    assert (queue.status().done, queue.status().cancelled) == (1, 1)
    assert queue._in_flight == {}


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
            bare(replace(tiny, seed=kind, count=1 + kind % 3)),
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
