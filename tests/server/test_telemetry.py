"""Metrics as Prometheus scrapes them, of real renders over a real socket."""

import asyncio
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from atelier.client import AtelierError, Client, control, method
from compose.guiding import attached
from compose.render import Settings
from compose.warm import WarmPipeline, warm_up
from server.calls import Call, working_for
from server.engine import InProcessEngine, Work
from server.job import Ask, Caller
from server.observer import _code
from server.scheduler import Scheduler
from server.serving import SERVICES
from server.stacks import Composition
from server.telemetry import Telemetry
from server.watched import Watched
from tests.companions import tiny_control
from tests.conftest import begun, serving

PHASES = ("compose", "queue", "patch", "embed", "denoise", "decode", "encode", "send")


def scrape(address: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_render_is_measured_from_the_stack_to_the_last_byte(
    warm: WarmPipeline, lora: Path, tmp_path: Path
) -> None:
    telemetry = Telemetry()
    with (
        serving(tmp_path / "data", warm, telemetry=telemetry) as running,
        telemetry.serve("127.0.0.1:0") as address,
        Client(running.address) as client,
    ):
        client.check_in(lora, name="hero", base="pocket")
        for _ in range(2):
            list(
                client.render(
                    "a star",
                    stack={"hero": 0.5},
                    method=method("svd"),
                    steps=3,
                    count=2,
                    preview_every=1,
                )
            )
        seen = scrape(address)
        assert seen["atelier_requests_total", "OK", "Render"] == 2
        assert seen["atelier_requests_total", "OK", "CheckIn"] == 1
        assert seen["atelier_renders_total", "done"] == 2
        pictures = {"denoise": 4, "decode": 4, "encode": 4}
        for phase in PHASES:
            assert seen["atelier_phase_seconds_count", phase] == pictures.get(phase, 2), phase
        assert seen["atelier_step_seconds_count",] == 12
        assert 0 < seen["atelier_step_seconds_sum",] <= seen["atelier_phase_seconds_sum", "denoise"]
        assert seen["atelier_cache_requests_total", "merges", "hit"] == 1
        assert seen["atelier_cache_requests_total", "merges", "miss"] == 1
        assert seen["atelier_cache_requests_total", "shelf", "miss"] == 1
        assert seen["atelier_resident_adapters",] == 1
        assert seen["atelier_resident_adapter_bytes",] > 10_000
        assert seen["atelier_merges_kept",] == 1
        assert seen["atelier_warm_bases",] == 1
        assert seen["atelier_resident_memory_bytes",] > 100e6
        assert (seen["atelier_queue_length",], seen["atelier_jobs_running",]) == (0, 0)


def test_a_cancelled_render_is_counted_with_the_phase_it_was_in(warm: WarmPipeline, tmp_path: Path) -> None:
    telemetry = Telemetry()
    with (
        serving(tmp_path / "data", warm, telemetry=telemetry) as running,
        telemetry.serve("127.0.0.1:0") as address,
        Client(running.address) as client,
    ):
        long = {"steps": 150, "count": 64}
        with (
            begun(client.render("a star", **long), "step"),
            begun(client.render("a planet", **long), "queued"),
        ):
            assert scrape(address)["atelier_queue_length",] == 1
            assert scrape(address)["atelier_jobs_running",] == 1
        until(lambda: scrape(address).get(("atelier_renders_total", "cancelled")) == 2)
        seen = scrape(address)
        assert seen["atelier_requests_total", "CANCELLED", "Render"] == 2
        assert seen["atelier_cancellations_total", "queue"] == 1
        running_in = [seen.get(("atelier_cancellations_total", phase), 0) for phase in ("denoise", "decode")]
        assert sum(running_in) == 1
        assert ("atelier_renders_total", "failed") not in seen


def test_a_guided_render_that_is_cancelled_is_counted_in_the_phase_after_its_guide(
    warm: WarmPipeline, tmp_path: Path
) -> None:
    telemetry = Telemetry()
    net = tiny_control(warm, tmp_path / "edges")
    steered = warm_up(*attached([warm.base], controls=[f"pocket:edges={net}"]))
    with (
        serving(tmp_path / "data", steered, telemetry=telemetry) as running,
        telemetry.serve("127.0.0.1:0") as address,
        Client(running.address) as client,
    ):
        (start,) = client.render("a star", steps=2).pictures()
        steered_by = {"controls": [control("edges", start.png)]}
        with begun(client.render("a", steps=150, count=64, **steered_by), "step"):
            pass
        until(lambda: scrape(address).get(("atelier_renders_total", "cancelled")) == 1)
        seen = scrape(address)
        assert seen["atelier_phase_seconds_count", "guide"] >= 1
        running_in = [seen.get(("atelier_cancellations_total", phase), 0) for phase in ("denoise", "decode")]
        assert sum(running_in) == 1
        assert [p.phase for p in client.status().phases][2:6] == ["patch", "embed", "guide", "denoise"]


def test_a_refused_a_late_and_an_unknown_call_are_counted_as_such(warm: WarmPipeline, tmp_path: Path) -> None:
    telemetry = Telemetry()
    with (
        serving(tmp_path / "data", warm, capacity=0, telemetry=telemetry) as running,
        telemetry.serve("127.0.0.1:0") as address,
        Client(running.address) as client,
    ):
        with pytest.raises(AtelierError, match="which is the limit"):
            list(client.render("a star", steps=1))
        with grpc.insecure_channel(running.address) as channel:
            made_up = channel.unary_unary("/atelier.v1.RenderService/a_word_of_mine")
            with pytest.raises(grpc.RpcError):
                made_up(b"")
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        seen = scrape(address)
        assert seen["atelier_requests_total", "RESOURCE_EXHAUSTED", "Render"] == 1
        assert seen["atelier_renders_total", "refused"] == 1
        assert seen["atelier_requests_total", "UNIMPLEMENTED", "unknown"] == 1
        assert seen["atelier_requests_total", "OK", "Check"] == 1
        assert not any("a_word_of_mine" in part for key in seen for part in key)


def test_metrics_need_an_address_that_is_one_and_is_free() -> None:
    telemetry = Telemetry()
    for wrong in ("9464", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:99999"):
        with pytest.raises(OSError, match=r"is no HOST:PORT; write --metrics"), telemetry.serve(wrong):
            pass
    with telemetry.serve("127.0.0.1:0") as address:
        with pytest.raises(OSError, match=f"cannot serve metrics on {address}"), Telemetry().serve(address):
            pass
        assert scrape(address) == scrape(address)


async def test_work_that_outlives_its_call_is_measured_as_a_job(warm: WarmPipeline) -> None:
    telemetry = Telemetry()
    queue = Scheduler(Watched(InProcessEngine(warm), telemetry))
    asked = Call(telemetry, "CreateJob")
    with working_for(asked):
        work = Work(Settings(prompt="a star", steps=2, width=64, height=64), Composition({}, (), key=()))
    asked.finish(grpc.StatusCode.OK)
    with queue.admit(Ask(what="a star", load=lambda _: work), Caller("ann")) as ticket:
        async for _ in ticket.events():
            pass
    await asyncio.to_thread(queue.close, 60.0)
    with telemetry.serve("127.0.0.1:0") as address:
        seen = await asyncio.to_thread(scrape, address)
    assert seen["atelier_requests_total", "OK", "CreateJob"] == 1
    assert seen["atelier_requests_total", "OK", "job"] == 1
    assert seen["atelier_renders_total", "done"] == 1
    assert seen["atelier_phase_seconds_count", "denoise"] == 1


def test_bytes_that_are_no_message_are_refused_by_every_method_and_counted(
    warm: WarmPipeline, tmp_path: Path
) -> None:
    telemetry = Telemetry()
    methods = [m for service in SERVICES for m in Default().FindServiceByName(service).methods]
    with (
        serving(tmp_path / "data", warm, telemetry=telemetry) as running,
        grpc.insecure_channel(running.address) as channel,
        telemetry.serve("127.0.0.1:0") as address,
    ):
        for rpc in methods:
            sends = "stream" if rpc.client_streaming else "unary"
            answers = "stream" if rpc.server_streaming else "unary"
            call = getattr(channel, f"{sends}_{answers}")(f"/{rpc.containing_service.full_name}/{rpc.name}")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter([b"\xff"]) if rpc.client_streaming else b"\xff", timeout=30))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, rpc.full_name
            assert "is no message of the contract" in caught.value.details()
        told = [("atelier_requests_total", "INVALID_ARGUMENT", m.name) for m in methods]
        until(lambda: (seen := scrape(address)) and all(seen.get(one, 0) >= 1 for one in told))


def test_a_call_that_is_given_up_before_its_request_came_is_counted(
    warm: WarmPipeline, tmp_path: Path
) -> None:
    telemetry, over = Telemetry(), threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    with (
        serving(tmp_path / "data", warm, telemetry=telemetry) as running,
        grpc.insecure_channel(running.address) as channel,
        telemetry.serve("127.0.0.1:0") as address,
    ):
        call = channel.stream_unary("/atelier.v1.RenderService/ListBases")

        def counted() -> bool:
            with pytest.raises(grpc.RpcError):
                call(nothing(), timeout=0.2)
            return ("atelier_requests_total", "CANCELLED", "ListBases") in scrape(address)

        until(counted)
        over.set()


async def test_an_answer_to_who_has_just_gone_is_no_fault() -> None:
    ended, arrived = list[grpc.StatusCode](), asyncio.Event()

    async def late(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        arrived.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:  # the caller is gone, and what is answered is on its way
            with pytest.raises(grpc.aio.InternalError) as caught:
                await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such thing")
            ended.append(_code(context, caught.value))
            raise
        return request

    server = grpc.aio.server()
    handlers = {"Late": grpc.unary_unary_rpc_method_handler(late)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/test/Late")(b"", timeout=0.2)
        arrived.clear()
        call = channel.unary_unary("/test/Late")(b"")
        await arrived.wait()
        call.cancel()
        await asyncio.to_thread(until, lambda: len(ended) == 2)
    await server.stop(None)
    assert ended == [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED]


def test_a_call_ends_though_its_phases_change_on_other_threads() -> None:
    telemetry, calls, over = Telemetry(), [Call(None, "")], threading.Event()

    def work() -> None:
        while not over.is_set():
            calls[-1].begin("denoise")
            calls[-1].took("denoise", 0.0)

    worker, interval = threading.Thread(target=work), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    worker.start()
    try:
        for _ in range(20_000):
            calls[-1] = Call(telemetry, "Render")
            calls[-1].about(base="pocket")
            calls[-1].finish(grpc.StatusCode.OK)
            assert calls[-1].ended
    finally:
        sys.setswitchinterval(interval)
        over.set()
        worker.join()
