"""How fast the server thinks it is, and for how long it believes that."""

import asyncio
import time
from dataclasses import replace

import pytest

from compose.warm import WarmPipeline
from server.engine import InProcessEngine
from server.errors import DeadlineExceeded
from server.job import Caller
from server.pace import KNOWN_SECONDS, Effort, Pace
from server.scheduler import Scheduler
from tests.server.test_scheduler import SHORT, bare, ending

STEPS = Effort("kind", 10)


def test_a_step_takes_what_it_took_lately() -> None:
    pace = Pace()
    assert (pace.of(STEPS), pace.step(None)) == (None, None)
    pace.measured("kind", 1.0, now=0.0)
    pace.measured("kind", 2.0, now=KNOWN_SECONDS)
    assert pace.of(STEPS) == pytest.approx(12.0)
    assert pace.step(STEPS, since=KNOWN_SECONDS - 1) == pytest.approx(1.2)
    assert pace.step(STEPS, since=KNOWN_SECONDS + 1) is None
    pace.measured("kind", 0.1, now=3 * KNOWN_SECONDS)
    assert pace.step(STEPS) == 0.1


async def test_a_machine_that_stood_still_once_does_not_refuse_everybody_for_ever(warm: WarmPipeline) -> None:
    queue = Scheduler(InProcessEngine(warm))
    ask = replace(bare(SHORT), effort=Effort("kind", SHORT.steps))
    queue._pace.measured("kind", 1000.0, time.monotonic())
    with pytest.raises(DeadlineExceeded, match=r"2 steps of 1000000 ms"):
        queue.admit(ask, Caller("in a hurry", time.monotonic() + 600))
    queue._pace.measured("kind", 1000.0, time.monotonic() - KNOWN_SECONDS)
    for _ in range(2):  # the first is measured
        assert await ending(queue.admit(ask, Caller("in a hurry", time.monotonic() + 600))) == "done"
    await asyncio.to_thread(queue.close, 60.0)
