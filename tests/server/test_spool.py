"""Pictures that nobody reads: they cost no memory beyond what all may have, none is lost, and nobody else
waits for who does not read.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest

from atelier.client import AtelierError, Client, Rendering
from atelier.messages import render_request
from atelier.v1 import render_pb2_grpc
from compose.warm import WarmPipeline
from server.spool import Spool
from tests.conftest import Running, serving
from tests.server.test_cancellation import MANY, NARROW, until

Start = Callable[..., Running]


def pictures(count: int) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, (100, 250, 4), np.uint8) for _ in range(count)]  # 100 kB each


def test_what_has_no_room_in_memory_is_in_files_and_comes_back_as_it_was(tmp_path: Path) -> None:
    spool, made = Spool(tmp_path, memory=300_000), pictures(12)
    put = [spool.put(picture) for picture in made]
    assert spool.held()[1] == 1_200_000
    until(lambda: spool.held()[0] <= 300_000)
    assert len(list(tmp_path.iterdir())) == 9
    for picture, kept in zip(made, put, strict=True):
        assert np.array_equal(kept.array(), picture)
        assert kept.array().shape == (100, 250, 4)
        assert bytes(kept) == picture.tobytes()
        assert kept.part(70_000, 200_000) == picture.tobytes()[70_000:]
    assert not spool.full()
    del put[:6], kept
    assert spool.held()[1] == 600_000
    assert len(list(tmp_path.iterdir())) == 3
    put.clear()
    assert spool.held() == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_on_a_disk_that_takes_nothing_pictures_stay_until_nobody_new_is_let_in(tmp_path: Path) -> None:
    spool, made = Spool(tmp_path / "gone", memory=300_000), pictures(7)
    put = [spool.put(picture) for picture in made[:6]]
    assert not spool.full()
    put.append(spool.put(made[6]))
    assert spool.full()
    assert all(np.array_equal(kept.array(), picture) for kept, picture in zip(put, made, strict=True))
    (tmp_path / "gone").mkdir()
    put.append(spool.put(made[0]))  # it is tried again
    until(lambda: spool.held()[0] <= 300_000)
    assert not spool.full()


@pytest.fixture
def start(tmp_path: Path, warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A server that holds so much for who does not read."""
    with ExitStack() as opened:

        def started(**bytes_held: int) -> Running:
            monkeypatch.setattr("server.serving.Spool", partial(Spool, **bytes_held))
            return opened.enter_context(serving(tmp_path / "data", warm))

        yield started


def slowly(running: Running, opened: ExitStack, seed: int) -> Rendering:
    """A render of 32 pictures whose caller has a connection of its own, and reads nothing yet."""
    channel = opened.enter_context(grpc.insecure_channel(running.address, options=NARROW))
    request = render_request("a blue star", **(MANY | {"seed": seed}))
    call = render_pb2_grpc.RenderServiceStub(channel).Render(request)
    next(event for event in call if event.HasField("started"))
    return Rendering(call, running.address)


def test_slow_readers_cost_no_memory_hold_nobody_and_lose_nothing(start: Start) -> None:
    running = start(memory=200_000)
    spool, incoming = running.queue.spool, running.catalog.blobs.incoming
    with ExitStack() as opened, Client(running.address, timeout=120) as client:
        slow = [slowly(running, opened, seed) for seed in (100, 200, 300, 400)]
        until(lambda: running.queue.status().done == 4)  # what they asked for is rendered all the same
        until(lambda: spool.held()[0] <= 200_000)
        assert spool.held()[1] > 1_000_000
        assert list(incoming.iterdir())
        quick = {seed: [p.png for p in client.render("a blue star", **(MANY | {"seed": seed})).pictures()]
                 for seed in (100, 400)}  # fmt: skip
        for seed, rendering in zip((100, 200, 300, 400), slow, strict=True):
            read = [picture.png for picture in rendering.pictures()]
            assert len(read) == 32
            assert seed not in quick or read == quick[seed]
        until(lambda: spool.held() == (0, 0))
        assert list(incoming.iterdir()) == []


def test_when_too_much_waits_to_be_read_nobody_new_is_let_in_and_nothing_is_cut(start: Start) -> None:
    running = start(memory=100_000, limit=300_000)
    with ExitStack() as opened, Client(running.address, timeout=120) as client:
        slow = slowly(running, opened, 100)
        until(lambda: running.queue.status().done == 1)
        assert running.queue.spool.full()
        refused = running.queue.status().refused
        with pytest.raises(AtelierError, match="of finished pictures wait to be read") as caught:
            list(client.render("a star", steps=1, seed=1))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert running.queue.status().refused == refused + 1
        assert len(list(slow.pictures())) == 32
        until(lambda: not running.queue.spool.full())
        assert len(list(client.render("a star", steps=1, seed=1).pictures())) == 1
