"""The queue by itself: progress coalesces, the first reason is the true one, a drain ends everything."""

import asyncio
import time

import pytest

from compose.settings import Settings
from compose.warm import WarmPipeline
from server.engine import InProcessEngine, Work
from server.errors import Cancelled, Draining
from server.job import Ask, Caller
from server.outbox import Done, Event, Outbox, Started, Step
from server.scheduler import Scheduler
from server.stacks import Composition

LONG = Settings(prompt="a red star", steps=150, width=64, height=64, count=64)
SHORT = Settings(prompt="a red star", steps=2, width=64, height=64)
SOMEBODY = Caller("somebody")


def bare(settings: Settings) -> Ask:
    return Ask(what="the bare base", load=lambda: Work(settings, Composition({}, (), key=())))


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
