"""Whatever a render is at, and whatever ends it: within one step the server is free, nothing is left in the
queue, the weights are golden or the next render's, and the next render is right.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from atelier.client import AtelierError, Client, Rendering
from atelier.messages import render_request
from atelier.v1 import render_pb2_grpc
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving
from tests.gates import Gate, HeldBlobs, HeldEngine, wire

PHASES = ("queued", "loading", "patching", "denoising", "decoding", "sending")
ENDS = ("cancel", "deadline", "disconnect", "shutdown")
QUICK = {"seed": 1, "steps": 2, "width": 64, "height": 64}
FEW = {"seed": 7, "steps": 3, "width": 64, "height": 64, "count": 2}
MANY = FEW | {"steps": 1, "count": 32}
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
"""With these a connection takes less than the pictures of `MANY` before the server waits for its reader."""


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Held:
    """A server, the gate its renders pass, and what its renders look like."""

    running: Running
    gate: Gate
    bare: bytes
    stacked: bytes


def picture(client: Client, **settings: object) -> bytes:
    (found,) = client.render("a red star", **{**QUICK, **settings}).pictures()
    return found.png


@pytest.fixture
def held(tmp_path: Path, warm: WarmPipeline) -> Iterator[Held]:
    gate = Gate()
    for seed, name in enumerate(("known", "fresh")):
        write_kohya(tmp_path / name, random_factors("pocket", seed=seed, rank=2))
    with serving(tmp_path / "data", warm, engine=HeldEngine(warm, gate)) as running:
        with Client(running.address) as client:
            for name in ("known", "fresh"):
                client.check_in(tmp_path / name, name=name)
            bare, stacked = picture(client), picture(client, stack={"known": 0.7})
        running.catalog.blobs = HeldBlobs(tmp_path / "data", gate)
        try:
            yield Held(running, gate, bare, stacked)
        finally:
            gate.open()


class Reader(threading.Thread):
    """Reads a render; with `pause_at_pictures` only to the first part of a picture, until told to go on."""

    def __init__(self, rendering: Rendering, *, pause_at_pictures: bool) -> None:
        super().__init__(daemon=True)
        self._rendering, self._pause = rendering, pause_at_pictures
        self.seen, self.go_on = threading.Event(), threading.Event()
        self.error: AtelierError | None = None
        self.start()

    def run(self) -> None:
        try:
            for event in self._rendering:
                if event.HasField("image") and self._pause:
                    self.seen.set()
                    self.go_on.wait(60)
        except AtelierError as error:
            self.error = error


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_render_ends_within_a_step_whatever_it_is_at(
    phase: str, end: str, held: Held, warm: WarmPipeline, tmp_path: Path
) -> None:
    running, gate, queue = held.running, held.gate, held.running.queue
    with ExitStack() as opened:
        others = opened.enter_context(Client(running.address))
        if phase == "queued":
            gate.shut("denoising")
            before = Reader(others.render("a red star", **FEW), pause_at_pictures=False)
            assert gate.reached.wait(60)
        elif phase != "sending":
            gate.shut(phase)
        done, address = queue.status().done, running.address
        if end == "disconnect":
            cut = opened.enter_context(wire(running.address))
            address = cut.address
        channel = opened.enter_context(grpc.insecure_channel(address, options=NARROW))
        wanted = render_request("a blue star", stack={"fresh": 1.0}, **(MANY if phase == "sending" else FEW))
        seconds = 5 if phase == "sending" else 3
        victim = render_pb2_grpc.RenderServiceStub(channel)
        rendering = Rendering(victim.Render(wanted, timeout=seconds if end == "deadline" else None), address)
        reader = Reader(rendering, pause_at_pictures=phase == "sending")
        if phase == "queued":
            until(lambda: len(queue.status().waiting) == 1)
        elif phase == "sending":
            assert reader.seen.wait(60)
            until(lambda: queue.status().running is None)
            done += 1  # the render thread was not held by who does not read
        else:
            assert gate.reached.wait(60)

        stopping = threading.Thread(target=running.stop, args=(0.0,))
        match end:
            case "cancel":
                rendering.cancel()
            case "disconnect":
                cut.cut()
            case "shutdown":
                stopping.start()
                until(lambda: queue.status().draining)
            case "deadline":
                pass
        reader.go_on.set()
        reader.join(60)
        codes = {
            "cancel": grpc.StatusCode.CANCELLED,
            "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
            "disconnect": grpc.StatusCode.UNAVAILABLE,
            "shutdown": grpc.StatusCode.UNAVAILABLE,
        }
        if phase != "sending":  # there, what was on its way may arrive
            assert reader.error is not None
            assert reader.error.code is codes[end]
        until(lambda: not queue.status().waiting)
        if phase != "queued":
            until(lambda: (now := queue.status().running) is None or now.callers == 0)
        before_done = 1 if phase == "queued" and end != "shutdown" else 0
        gate.open()
        if phase == "queued":
            before.join(60)
        until(lambda: queue.status().running is None)
        assert gate.steps <= 1 or phase == "queued"
        status = queue.status()
        assert not status.waiting
        if (phase, end) != ("sending", "deadline"):  # which may come before all of it is rendered
            assert status.done == done + before_done
        if end != "shutdown":
            assert picture(others, stack={"known": 0.7}) == held.stacked
            assert picture(others) == held.bare
            assert warm.is_golden()
            return
        stopping.join(60)
    with serving(tmp_path / "other", warm) as fresh, Client(fresh.address) as client:
        client.check_in(tmp_path / "known", name="known")
        assert picture(client, stack={"known": 0.7}) == held.stacked
        assert picture(client) == held.bare
    assert warm.is_golden()
