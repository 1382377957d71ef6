"""What takes long before a render begins is called off, too: merges, and bases that are loaded. Afterwards
the server is free, nothing half made is left, and the next is right.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from atelier.client import Client, Rendering
from atelier.messages import method, render_request, weighted
from atelier.v1 import compose_pb2, compose_pb2_grpc, render_pb2, render_pb2_grpc
from compose import bases
from compose.groups import Adapter
from compose.interference import Report
from compose.merging import Merged
from compose.methods import Parameters
from compose.residence import Residence
from compose.warm import WarmPipeline
from compose.weights import Weight
from server.calibrations import Calibrations
from server.errors import Cancelled
from server.served import served
from server.stacks import Stacks
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving
from tests.gates import Gate, HeldBlobs, HeldEngine, wire
from tests.pipelines import tiny
from tests.server.test_cancellation import Reader, until

ENDS = ("cancel", "deadline", "disconnect")
CODES = {
    "cancel": grpc.StatusCode.CANCELLED,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "disconnect": grpc.StatusCode.UNAVAILABLE,
}
TIES = method("ties", rank=4)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def running(tmp_path: Path, warm: WarmPipeline, gate: Gate) -> Iterator[Running]:
    second = bases.find(f"second={tiny('sdxl', tmp_path / 'second')}")
    with serving(tmp_path / "data", warm, engine=HeldEngine(Residence(warm, [second]), gate)) as server:
        with Client(server.address) as client:
            for seed, name in enumerate(("one", "two")):
                write_kohya(tmp_path / name, random_factors("pocket", seed=seed, rank=2))
                client.check_in(tmp_path / name, name=name, triggers=[name])
        server.catalog.blobs = HeldBlobs(tmp_path / "data", gate)
        yield server
        gate.open()


@contextmanager
def reached(running: Running, end: str) -> Iterator[tuple[grpc.Channel, Callable[[], None]]]:
    """A channel, and what cuts it where that is how it ends."""
    with ExitStack() as opened:
        cut = opened.enter_context(wire(running.address)) if end == "disconnect" else None
        channel = opened.enter_context(grpc.insecure_channel(cut.address if cut else running.address))
        yield channel, cut.cut if cut else lambda: None


@pytest.mark.parametrize("end", ENDS)
def test_a_merge_that_nobody_waits_for_stops(end: str, running: Running, gate: Gate) -> None:
    gate.shut("loading")
    with reached(running, end) as (channel, cut):
        stub = compose_pb2_grpc.ComposeServiceStub(channel)
        stack = weighted({"one": 1.0, "two": 1.0})
        wanted = compose_pb2.MergeRequest(stack=stack, method=TIES, name="both")
        merging = stub.Merge.future(wanted, timeout=6 if end == "deadline" else None)
        assert gate.reached.wait(60)
        if end == "cancel":
            merging.cancel()
        elif end == "disconnect":
            cut()
        until(merging.done)
        assert merging.code() is CODES[end]
    with Client(running.address) as client:
        gate.open()
        other = client.merge({"two": 1.0}, name="other", method=method("svd", rank=1))  # once it is its turn
        assert other.created
        assert client.status().adapters.merges == 1  # of the other alone
        assert [asset.name for asset in client.list()] == ["one", "other", "two"]
        assert client.merge({"one": 1.0, "two": 1.0}, name="both", method=TIES).created
        assert client.remake("both").same


@pytest.mark.parametrize("asked", ["inspect", "tune", "auto"])
def test_an_inspection_that_nobody_waits_for_stops(
    asked: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, stopped = threading.Event(), threading.Event()

    def slow(stack: Sequence[Adapter], *, check: Callable[[], None]) -> Report:
        inside.set()
        try:
            until(lambda: check() is not None)
        except Cancelled:
            stopped.set()
            raise
        raise AssertionError("nobody said that it is not wanted")

    stack = weighted({"one": 1.0, "two": 1.0})
    with grpc.insecure_channel(running.address) as channel:
        compose = compose_pb2_grpc.ComposeServiceStub(channel)
        inspection = compose_pb2.InspectStackRequest(stack=stack)
        with monkeypatch.context() as patched:
            patched.setattr("server.inspection.interference", slow)
            patched.setattr("server.choosing.interference", slow)
            match asked:
                case "inspect":
                    call = compose.InspectStack.future(inspection)
                case "tune":
                    tuning = render_pb2.TuneRequest(stack=stack, pictures=1, steps=1)
                    call = render_pb2_grpc.RenderServiceStub(channel).Tune(tuning)
                case _:
                    merging = compose_pb2.MergeRequest(stack=stack, method=method("auto"), name="both")
                    call = compose.Merge.future(merging)
            assert inside.wait(60)
            call.cancel()
            assert stopped.wait(60)
        assert len(compose.InspectStack(inspection).adapters) == 2


@pytest.mark.parametrize("end", ENDS)
def test_a_base_that_nobody_waits_for_is_not_loaded(end: str, running: Running, gate: Gate) -> None:
    gate.shut("warming")
    settings = {"base": "second", "steps": 2, "seed": 1}
    with reached(running, end) as (channel, cut):
        stub = render_pb2_grpc.RenderServiceStub(channel)
        request = render_request("a star", **settings)
        rendering = Rendering(stub.Render(request, timeout=6 if end == "deadline" else None), running.address)
        reader = Reader(rendering, pause_at_pictures=False)
        assert gate.reached.wait(60)
        if end == "cancel":
            rendering.cancel()
        elif end == "disconnect":
            cut()
        reader.join(60)
        assert reader.error is not None
        assert reader.error.code is CODES[end]
    until(lambda: (now := running.queue.status().running) is None or now.callers == 0)
    gate.open()
    until(lambda: running.queue.status().running is None)
    assert [info.base.name for info in running.engine.loaded] == ["pocket"]
    with Client(running.address) as client:
        first, again = ([p.png for p in client.render("a star", **settings).pictures()] for _ in range(2))
        assert first == again
        assert [info.base.name for info in running.engine.loaded] == ["pocket", "second"]


def test_a_merge_stops_wherever_it_is_asked_and_the_next_gives_the_same_bytes(
    tmp_path: Path, warm: WarmPipeline, running: Running
) -> None:
    catalog = running.catalog
    refs = [("one", Weight(1.0)), ("two", Weight(0.5))]

    def bake(check: object) -> str:
        stacks = Stacks(catalog, Calibrations(catalog, served([warm.base])))
        stack = stacks.pin(refs, method="ties", parameters=Parameters(rank=4))
        try:
            version, _, _ = stacks.bake(
                stack,
                method="ties",
                parameters=Parameters(rank=4),
                name="baked",
                check_wanted=check,  # type: ignore[arg-type]
            )
        except Cancelled:
            assert len(stacks.merges) <= 1
            raise
        return version.digest

    class Patience:
        def __init__(self, calls: int) -> None:
            self.calls, self.most = 0, calls

        def __call__(self) -> None:
            self.calls += 1
            if self.calls == self.most:
                raise Cancelled("enough")

    everything = Patience(0)
    digest = bake(everything)
    assert everything.calls > 20
    for calls in {1, 2, everything.calls // 2, everything.calls - 1, everything.calls}:
        with pytest.raises(Cancelled):
            bake(Patience(calls))
    assert len(catalog.history("baked")) == 1
    assert bake(Patience(0)) == digest


def test_a_merge_that_waits_for_another_goes_when_nobody_wants_it(
    warm: WarmPipeline, running: Running
) -> None:
    catalog = running.catalog
    stacks = Stacks(catalog, Calibrations(catalog, served([warm.base])))
    stack = stacks.pin([("one", Weight(1.0)), ("two", Weight(0.5))], method="svd", parameters=Parameters())
    inside, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def long() -> None:
        inside.set()
        assert go_on.wait(60)

    def gone() -> None:
        ended.set()
        raise Cancelled("enough")

    first = threading.Thread(target=lambda: stacks.merges.merge(stack, "pocket", "svd", Parameters(), long))
    first.start()
    assert inside.wait(60)
    with pytest.raises(Cancelled):
        stacks.merges.merge(stack, "pocket", "tsv", Parameters(), gone)
    assert ended.is_set()
    go_on.set()
    first.join(60)
    assert len(stacks.merges) == 1


def test_who_waits_for_the_same_merge_is_given_it(warm: WarmPipeline, running: Running) -> None:
    catalog = running.catalog
    stacks = Stacks(catalog, Calibrations(catalog, served([warm.base])))
    stack = stacks.pin([("one", Weight(1.0)), ("two", Weight(0.5))], method="svd", parameters=Parameters())
    inside, waits, go_on = threading.Event(), threading.Event(), threading.Event()

    def long() -> None:
        inside.set()
        assert go_on.wait(60)

    def merge(check: Callable[[], None]) -> Merged:
        return stacks.merges.merge(stack, "pocket", "svd", Parameters(), check)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(merge, long)
        assert inside.wait(60)
        second = threads.submit(merge, waits.set)
        assert waits.wait(60)
        go_on.set()
        assert first.result(60) is second.result(60)


def test_renders_that_wait_for_a_merge_hold_up_none_that_do_not(running: Running, gate: Gate) -> None:
    with Client(running.address) as client, Client(running.address, timeout=30) as other:
        gate.shut("loading")
        first = client.render("a star", stack={"one": 1.0, "two": 1.0}, method=TIES, steps=2)
        second = client.render("a star", stack={"one": 1.0, "two": 0.5}, method=TIES, steps=2)
        readers = [Reader(rendering, pause_at_pictures=False) for rendering in (first, second)]
        assert gate.reached.wait(60)
        until(lambda: len(running.queue.status().waiting) == 2)
        assert len(list(other.render("a star", steps=2).pictures())) == 1
        gate.open()
        for reader in readers:
            reader.join(60)
            assert reader.error is None
    assert running.queue.status().done == 3
