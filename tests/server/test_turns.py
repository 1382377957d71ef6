"""Renders of many pictures, between which others have their turns: what that costs, and who pays."""

import asyncio
from dataclasses import replace

import pytest

from compose.render import Listener
from compose.warm import WarmPipeline
from server.engine import AnyWork, InProcessEngine, Result
from server.errors import QueueFull
from server.job import Ask, Caller, Ticket
from server.outbox import Finished
from server.scheduler import AHEAD, Scheduler
from tests.gates import Gate
from tests.server.test_cancellation import until
from tests.server.test_scheduler import SHORT, bare, ending, many_and_one, pictures_of


async def held_at_the_other(gate: Gate) -> None:
    """The render of many has given way, and somebody else's is held."""
    gate.shut("denoising")
    gate._opened.set()
    assert await asyncio.to_thread(gate.reached.wait, 60)


async def test_what_waits_for_its_next_turn_takes_room_in_the_queue(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else", capacity=1)
    await held_at_the_other(gate)
    with pytest.raises(QueueFull, match="1 renders are waiting"):
        queue.admit(bare(SHORT), Caller("a third"))
    many.leave()
    third = queue.admit(bare(SHORT), Caller("a third"))
    gate.open()
    assert [await ending(ticket) for ticket in (one, third)] == ["done", "done"]
    await asyncio.to_thread(queue.close, 60.0)


async def test_who_left_pays_for_no_later_turn(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else")
    await held_at_the_other(gate)
    stays = queue.admit(replace(bare(SHORT), identity="many"), Caller("a third"))
    assert stays.job is many.job
    many.leave()
    gate.open()
    await asyncio.gather(pictures_of(stays), pictures_of(one))
    assert many.job.clients == {"a third"}
    await asyncio.to_thread(queue.close, 60.0)


async def test_a_turn_lasts_as_long_as_it_takes_to_begin_one(warm: WarmPipeline) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else")
    many.job._turn_began -= 1000  # a base had to be loaded
    gate.open()
    (_, _, first), (_, _, last) = await asyncio.gather(pictures_of(many), pictures_of(one))
    assert first < last
    await asyncio.to_thread(queue.close, 60.0)


async def test_a_stack_that_would_have_to_be_merged_again_stays_for_as_long_as_that(
    warm: WarmPipeline,
) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else")
    many.job.load_seconds = 1000
    assert queue._others_next(many.job)  # few wait: it will still be there
    others = [queue.admit(bare(SHORT), Caller(f"other {i}")) for i in range(AHEAD - 1)]
    await asyncio.to_thread(until, lambda: queue._others_wait() == AHEAD)
    assert not queue._others_next(many.job)
    gate.open()
    assert [await ending(ticket) for ticket in (many, one, *others)] == ["done"] * (2 + len(others))
    await asyncio.to_thread(queue.close, 60.0)


class Bases(InProcessEngine):
    """Remembers what each turn was for."""

    def __init__(self, warm: WarmPipeline) -> None:
        super().__init__(warm)
        self.turns: list[str] = []

    def do(self, work: AnyWork, listener: Listener) -> Result:
        """As ever."""
        self.turns.append(work.base)
        return super().do(replace(work, base=""), listener)


async def test_two_that_take_turns_on_two_bases_change_the_base_no_more_often_than_they_may(
    warm: WarmPipeline,
) -> None:
    engine = Bases(warm)
    queue, count = Scheduler(engine), 64

    def ask(base: str) -> Ticket:
        work = bare(replace(SHORT, steps=1, count=count)).load(lambda: None)
        return queue.admit(
            replace(bare(SHORT), load=lambda _: replace(work, base=base), base=base, key=base), Caller(base)
        )

    both = [ask(base) for base in ("one", "another")]
    assert [await ending(ticket) for ticket in both] == ["done", "done"]
    changes = sum(a != b for a, b in zip(engine.turns, engine.turns[1:], strict=False))
    assert changes <= 2 * count // 8
    await asyncio.to_thread(queue.close, 60.0)


async def test_a_durable_render_of_many_is_given_back_after_its_turn_when_the_server_ends(
    warm: WarmPipeline,
) -> None:
    gate = Gate()
    queue, many, one = await many_and_one(warm, gate, "somebody else", durable=True)
    closing = asyncio.create_task(asyncio.to_thread(queue.close, 60.0))
    await asyncio.to_thread(until, lambda: queue.status().draining)
    gate.open()
    images = [event.image for event in many.outbox._events if isinstance(event, Finished)]
    assert [await ending(ticket) for ticket in (one, many)] == ["done", "Draining"]
    assert (images, many.job.image) == ([0], 0)
    await closing


async def test_many_of_one_client_are_done_one_after_the_other_and_loaded_once(warm: WarmPipeline) -> None:
    gate, loads = Gate(), list[int]()
    queue, many, one = await many_and_one(warm, gate, "many")

    def ask(number: int) -> Ask:
        work = bare(replace(SHORT, count=3)).load(lambda: None)

        def load(_: object) -> AnyWork:
            loads.append(number)
            return work

        return replace(bare(SHORT), load=load)

    later = [queue.admit(ask(number), Caller("many")) for number in range(AHEAD + 2)]
    await asyncio.to_thread(until, lambda: queue._others_wait() == AHEAD)
    gate.open()
    ends = [end for _, _, end in await asyncio.gather(*map(pictures_of, (many, one, *later)))]
    assert ends == sorted(ends)
    assert loads == list(range(len(later)))
    await asyncio.to_thread(queue.close, 60.0)
