"""Of one render for several: who joins is told what is finished, who leaves takes nothing from the others;
and a request that comes again under its id is given what the first came to.
"""

import threading
from collections.abc import Hashable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from atelier.client import AtelierError, Client
from atelier.v1 import compose_pb2, render_pb2, render_pb2_grpc
from compose.warm import WarmPipeline
from server import scheduler
from server.calibrations import Calibrations
from server.rendering import Renderings
from server.served import served
from server.stacks import Stacks
from server.telemetry import Telemetry
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving
from tests.gates import Gate, HeldBlobs, HeldEngine
from tests.server.test_cancellation import until

SMALL = {"seed": 1, "steps": 3, "width": 64, "height": 64, "count": 2}


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def running(tmp_path: Path, warm: WarmPipeline, gate: Gate) -> Iterator[Running]:
    with serving(tmp_path / "data", warm, engine=HeldEngine(warm, gate), capacity=2) as found:
        try:
            yield found
        finally:
            gate.open()


class Call(threading.Thread):
    """A client of its own that renders in the background."""

    def __init__(self, running: Running, *, timeout: float | None = None, **settings: object) -> None:
        super().__init__(daemon=True)
        self._client = Client(running.address, timeout=timeout)
        self.rendering = self._client.render("a red star", **{**SMALL, **settings})
        self.events: list[render_pb2.RenderResponse] = []
        self.error: AtelierError | None = None
        self.start()

    def run(self) -> None:
        try:
            for event in self.rendering:
                self.events.append(event)
        except AtelierError as error:
            self.error = error

    def pictures(self) -> list[bytes]:
        """Waits for the end; the PNGs."""
        self.join(60)
        assert self.error is None
        found: dict[int, bytes] = {}
        for event in self.events:
            if event.HasField("image"):
                found[event.image.image] = found.get(event.image.image, b"") + event.image.data
        return [found[image] for image in sorted(found)]


def callers(running: Running) -> int:
    now = running.queue.status()
    return sum(listed.callers for listed in (*now.waiting, *([now.running] if now.running else [])))


def test_who_joins_is_given_what_is_finished_and_what_comes(running: Running, gate: Gate) -> None:
    gate.shut("delivering")  # with the first of two pictures finished
    first = Call(running)
    assert gate.reached.wait(60)
    second = Call(running)
    until(lambda: callers(running) == 2)
    gate.open()
    assert len(first.pictures()) == 2
    assert first.pictures() == second.pictures()
    assert [e.WhichOneof("event") for e in second.events][:3] == ["queued", "started", "image"]
    steps = {(e.step.image, e.step.step) for e in second.events if e.HasField("step")}
    assert steps <= {(1, 1), (1, 2), (1, 3)}
    status = running.queue.status()
    assert (status.done, status.coalesced) == (1, 1)


def test_waiting_for_anothers_render_is_a_phase_of_its_own(
    tmp_path: Path, warm: WarmPipeline, gate: Gate
) -> None:
    telemetry = Telemetry()
    with serving(tmp_path / "data", warm, engine=HeldEngine(warm, gate), telemetry=telemetry) as running:
        gate.shut("denoising")
        first = Call(running)
        assert gate.reached.wait(60)
        second = Call(running)
        until(lambda: callers(running) == 2)
        gate.open()
        assert first.pictures() == second.pictures()
        told = telemetry.durations.percentiles()
    assert (told["queue"].count, told["shared"].count) == (2, 1)


def test_another_seed_stack_or_count_is_another_render(running: Running, gate: Gate) -> None:
    gate.shut("denoising")
    calls = [Call(running)]
    assert gate.reached.wait(60)
    calls += [Call(running, seed=2), Call(running, count=1)]
    until(lambda: callers(running) == 3)
    assert running.queue.status().coalesced == 0
    gate.open()
    assert len({call.pictures()[0] for call in calls}) == 2


@pytest.mark.parametrize("who", [0, 1])
def test_one_of_two_who_leaves_takes_nothing_from_the_other(running: Running, gate: Gate, who: int) -> None:
    gate.shut("denoising")
    calls = [Call(running)]
    assert gate.reached.wait(60)
    calls.append(Call(running))
    until(lambda: callers(running) == 2)
    calls.pop(who).rendering.cancel()
    until(lambda: callers(running) == 1)
    gate.open()
    assert len(calls[0].pictures()) == 2
    assert running.queue.status().cancelled == 0


def test_each_caller_has_a_deadline_of_its_own(running: Running, gate: Gate) -> None:
    gate.shut("denoising")
    patient = Call(running)
    assert gate.reached.wait(60)
    hurried = Call(running, timeout=1)
    hurried.join(60)
    assert hurried.error is not None
    assert hurried.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    gate.open()
    assert len(patient.pictures()) == 2


def test_a_drain_finishes_a_job_that_somebody_waits_for_on_the_line(running: Running, gate: Gate) -> None:
    gate.shut("denoising")
    other = Call(running, seed=2)
    assert gate.reached.wait(60)
    with Client(running.address, timeout=60) as client:
        client.create_job("a red star", **SMALL)
        until(lambda: callers(running) == 2)
        accepted = Call(running)
        until(lambda: callers(running) == 3)
        stopping = threading.Thread(target=running.stop, args=(30.0,))
        stopping.start()
        until(lambda: running.queue.status().draining)
        gate.open()
        assert (len(accepted.pictures()), len(other.pictures())) == (2, 2)
    stopping.join(60)


def test_one_caller_more_than_share_a_render_begins_another(
    running: Running, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "SHARERS", 2)
    gate.shut("denoising")
    calls = [Call(running)]
    assert gate.reached.wait(60)
    for number in (2, 3):
        calls.append(Call(running))
        until(lambda wanted=number: callers(running) == wanted)  # type: ignore[misc]
    assert [listed.callers for listed in running.queue.status().waiting] == [1]
    gate.open()
    assert calls[0].pictures() == calls[1].pictures() == calls[2].pictures()


def test_when_all_have_left_the_render_ends_and_the_next_is_a_new_one(running: Running, gate: Gate) -> None:
    gate.shut("denoising")
    calls = [Call(running)]
    assert gate.reached.wait(60)
    calls.append(Call(running))
    until(lambda: callers(running) == 2)
    for call in calls:
        call.rendering.cancel()
    until(lambda: callers(running) == 0)
    again = Call(running)
    until(lambda: callers(running) == 1)
    gate.open()
    assert len(again.pictures()) == 2
    status = running.queue.status()
    assert (status.done, status.cancelled, status.coalesced) == (1, 1, 1)


def test_a_request_that_comes_again_joins_the_first_though_its_seed_was_chosen_here(
    running: Running, gate: Gate
) -> None:
    gate.shut("denoising")
    first = Call(running, seed=None, request_id="one")
    assert gate.reached.wait(60)
    second = Call(running, seed=None, request_id="one")
    until(lambda: callers(running) == 2)
    gate.open()
    assert first.pictures() == second.pictures()


def test_a_request_that_comes_again_afterwards_is_answered_from_what_was_kept(running: Running) -> None:
    first = Call(running, seed=None, request_id="one")
    pictures = first.pictures()
    again = Call(running, seed=None, request_id="one")
    assert again.pictures() == pictures
    status = running.queue.status()
    assert (status.done, status.coalesced) == (1, 1)
    assert [e.WhichOneof("event") for e in again.events] == ["queued", "started", "image", "image", "summary"]
    assert Call(running, seed=None, request_id="two").pictures() != pictures


def test_an_id_that_was_another_requests_is_refused(running: Running) -> None:
    Call(running, request_id="one").pictures()
    other = Call(running, request_id="one", steps=2)
    other.join(60)
    assert other.error is not None
    assert other.error.code is grpc.StatusCode.ABORTED
    assert "request id 'one' was used for another request; choose a new one" in str(other.error)


def test_callers_without_a_name_share_by_an_id_only_what_is_the_same(running: Running) -> None:
    """They are one client, and nobody is given what somebody else asked for."""
    asked = render_pb2.RenderRequest(
        prompt="a red star", steps=1, width=64, height=64, request_id="mine"
    )  # the seed is chosen by the server
    other = render_pb2.RenderRequest(prompt="a blue moon", steps=1, width=64, height=64, request_id="mine")

    def pictures(request: render_pb2.RenderRequest, *metadata: tuple[str, str]) -> bytes:
        with grpc.insecure_channel(running.address) as channel:
            events = render_pb2_grpc.RenderServiceStub(channel).Render(request, metadata=metadata)
            return b"".join(event.image.data for event in events)

    first = pictures(asked)
    assert pictures(asked) == first
    with pytest.raises(grpc.RpcError, match="was used for another request; choose a new one") as caught:
        pictures(other)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert pictures(other, ("atelier-user", "ann")) not in {b"", first}
    assert pictures(asked, ("atelier-user", "bob")) not in {b"", first}
    assert pictures(asked) == first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"request_id": "x" * 65}, "is not of up to 64 printable characters"),
        ({"request_id": "a\nb"}, "is not of up to 64 printable characters"),
        ({"priority": 11}, "priority 11 is not within -10 and 10"),
        ({"priority": -(2**31)}, "priority -2147483648 is not within -10 and 10"),
    ],
)
def test_ids_and_priorities_out_of_range_are_refused(
    client: Client, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(AtelierError, match=message) as caught:
        list(client.render("a star", **wrong))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_full_queue_refuses_before_a_stack_is_loaded(running: Running, gate: Gate, tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=2))
    with Client(running.address) as client:
        client.check_in(tmp_path / "a", name="hero")
    gate.shut("denoising")
    calls = [Call(running)]
    assert gate.reached.wait(60)
    calls += [Call(running, seed=seed) for seed in (2, 3)]
    until(lambda: len(running.queue.status().waiting) == 2)
    loads = Gate()
    loads.shut("loading")
    running.catalog.blobs = HeldBlobs(tmp_path / "data", loads)
    refused = Call(running, stack={"hero": 1.0})
    refused.join(60)
    assert refused.error is not None
    assert refused.error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not loads.reached.is_set()
    loads.open()
    joined = Call(running, seed=2)  # what waits already needs no other place
    until(lambda: callers(running) == 4)
    gate.open()
    assert joined.pictures() == calls[1].pictures()


def test_a_deadline_that_will_be_missed_is_refused_at_once(running: Running) -> None:
    Call(running, steps=5).pictures()  # nothing is known before something was measured
    late = Call(running, steps=150, count=64, timeout=20.0)
    late.join(60)
    assert late.error is not None
    assert late.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "the render takes about" in str(late.error)
    assert "(9600 steps of" in str(late.error)
    status = running.queue.status()
    assert (status.refused, status.cancelled, status.done) == (1, 0, 1)


def test_only_renders_of_one_kind_tell_how_fast_the_next_is(running: Running, tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=2))
    with Client(running.address) as client:
        client.check_in(tmp_path / "a", name="hero")
    stacks = Stacks(running.catalog, Calibrations(running.catalog, served([running.engine.info.base])))
    renderings = Renderings(stacks, running.queue, running.engine.infos)

    def kind(adapters: int = 1, **more: Any) -> Hashable:
        stack = [compose_pb2.WeightedRef(ref="hero", weight=0.5)] * adapters
        request = render_pb2.RenderRequest(prompt="a star", stack=stack, **more)
        effort = renderings._ask(renderings.order(request)).effort
        assert effort
        return effort.kind

    composite = compose_pb2.Method(name="composite")
    late = [render_pb2.Schedule(phases=[render_pb2.Phase(start=0.5, end=1.0)])]
    assert kind() == kind(3) == kind(seed=7) == kind(count=3) == kind(batch=16)
    assert kind(2, method=composite) != kind(3, method=composite)
    assert kind(batch=4, count=4) == kind(batch=16, count=4) != kind(batch=16, count=16)
    assert kind(schedules=late) != kind()


def test_a_tune_keeps_its_place_while_the_queue_is_full(running: Running, gate: Gate, tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=2))
    with Client(running.address) as client:
        client.check_in(tmp_path / "a", name="hero", triggers=["zig"])
        gate.shut("denoising")
        calls = [Call(running)]
        assert gate.reached.wait(60)
        found: list[render_pb2.TuneSummary] = []
        tuning = threading.Thread(
            target=lambda: found.append(client.tune({"hero": 1.0}, pictures=1, steps=1)), daemon=True
        )
        tuning.start()
        until(lambda: len(running.queue.status().waiting) == 1)
        calls.append(Call(running, seed=2))
        until(lambda: len(running.queue.status().waiting) == 2)
        full = Call(running, seed=3)
        full.join(60)
        assert full.error is not None
        assert full.error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.open()
        tuning.join(60)
        assert found[0].best.stack[0].ref == "hero:1"
        for call in calls:
            call.pictures()


def test_an_adapter_that_is_deleted_while_its_render_waits_is_told(
    running: Running, gate: Gate, tmp_path: Path
) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=2))
    loads = Gate()
    with Client(running.address) as client:
        client.check_in(tmp_path / "a", name="hero")
        running.catalog.blobs = HeldBlobs(tmp_path / "data", loads)
        loads.shut("loading")
        render = Call(running, stack={"hero": 1.0})
        assert loads.reached.wait(60)
        client.delete("hero:1")
        running.catalog.collect_garbage(retention=timedelta(0), grace=timedelta(0))
        loads.open()
        render.join(60)
        assert render.error is not None
        assert render.error.code is grpc.StatusCode.NOT_FOUND
        assert "hero:1 was deleted" in str(render.error)
        assert len(Call(running).pictures()) == 2
