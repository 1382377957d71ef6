"""What the machine says of itself while it works, to both clients and on the screen."""

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client
from atelier.top import frame
from atelier.v1 import engine_pb2
from compose.warm import WarmPipeline
from server.telemetry import Telemetry
from tests.conftest import Running, begun, serving
from tests.server.test_telemetry import PHASES, until


def test_who_runs_and_who_waits_is_told(
    warm: WarmPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "data", warm, capacity=5) as running, Client(running.address) as client:
        assert not client.status().queue.running
        monkeypatch.setenv("ATELIER_USER", "ann")
        with begun(client.render("a star", steps=150, count=64), "step"):
            monkeypatch.setenv("ATELIER_USER", "bob")
            with begun(client.render("a planet", steps=150, count=64), "queued"):
                queue = client.status().queue
        list(client.render("a star", steps=2))
        (job,) = queue.running
        assert (job.client, job.kind, job.base, job.images, job.steps) == ("ann", "render", "pocket", 64, 150)
        assert job.phase in {"denoise", "decode"}
        assert job.step >= 1 or job.image >= 1
        assert len(job.request_id) == 32
        assert (queue.waiting, queue.capacity, [w.client for w in queue.jobs]) == (1, 5, ["bob"])
        assert "star" not in str(queue)
        until(lambda: not client.status().queue.running)
        status = client.status()
        assert dict(status.outcomes) == {"cancelled": 2, "done": 1}
        assert [p.phase for p in status.phases] == list(PHASES)
        assert all(0 <= p.p50 <= p.p95 <= p.p99 for p in status.phases)
        assert status.rates.renders > 0
        assert status.rates.steps > 0


def test_what_is_warm_and_held_is_told(server: Running, client: Client, lora: Path) -> None:
    version = client.check_in(lora, name="held", base="pocket").version
    list(client.render("a star", stack={"held": 0.5}, steps=1))
    status = client.status()
    (base,) = status.bases
    assert (base.name, base.device, base.dtype) == ("pocket", "cpu", "float32")
    assert base.size_bytes > 10e6
    newest = status.adapters.adapters[0]
    assert (newest.ref, newest.digest) == ("held:1", version.digest)
    assert status.adapters.count == len(status.adapters.adapters)
    assert status.adapters.size_bytes == sum(adapter.size_bytes for adapter in status.adapters.adapters)
    assert {cache.name for cache in status.caches} == {"shelf", "merges", "prepared"}
    assert status.memory.resident_bytes > 100e6
    assert {"atelier", "torch", "diffusers", "python"} <= set(status.versions)
    assert server.engine.loaded[0].size_bytes == base.size_bytes


async def test_the_status_is_told_again_and_again_to_both_clients(server: Running, client: Client) -> None:
    seen = [status.time.ToNanoseconds() for status in itertools.islice(client.watch_status(0.1), 3)]
    assert seen == sorted(set(seen))
    async with AsyncClient(server.address) as atelier:
        watching = atelier.watch_status(0.1)
        first, second = await anext(watching), await anext(watching)
        await watching.aclose()  # type: ignore[attr-defined]
        assert first.uptime_seconds < second.uptime_seconds
        assert (await atelier.status()).versions == client.status().versions
    for wrong in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(AtelierError, match=r"interval_seconds .* is not within 0.1 and 3600"):
            next(client.watch_status(wrong))


def test_a_server_that_stops_lets_go_of_who_watches(warm: WarmPipeline, tmp_path: Path) -> None:
    with serving(tmp_path / "data", warm, telemetry=Telemetry()) as running:
        client = Client(running.address)
        watching = client.watch_status(3600)
        next(watching)
    assert list(watching) == []  # ended, not cut off after the grace
    client.close()


def busy() -> engine_pb2.Status:
    """A server that has a lot to say."""
    status = engine_pb2.Status(uptime_seconds=93784, versions={"atelier": "0.1.0"})
    status.outcomes.update({"done": 120_000, "cancelled": 12_000, "deadline": 1000, "refused": 99})
    status.queue.waiting, status.queue.capacity, status.queue.coalesced = 64, 64, 12
    for number in range(64):
        status.queue.jobs.add(client=f"somebody with a long name {number}", kind="calibrate", callers=2)
    status.queue.running.add(
        client="\x1b[31m" * 20, kind="render", phase="denoise", images=64, image=63, steps=150, base="p" * 60
    )
    for name in (*PHASES, "guide"):
        status.phases.add(phase=name, count=512, p50=0.01, p95=1.5, p99=12.5)
    status.bases.add(name="pocket", device="cuda:0", dtype="float16", size_bytes=41_000_000)
    for number in range(50):
        status.adapters.adapters.add(ref=f"{'hero' * 20}-{number}:1", size_bytes=25_000_000)
    status.adapters.count = 50
    status.memory.budget_bytes = 40_000_000_000
    for name in ("bases", "golden", "beside", "adapters", "merges", "prepared", "scorer"):
        status.memory.parts.add(name=name, size_bytes=5_100_000_000)
    return status


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 40), (120, 24), (200, 60)])
def test_a_busy_screen_fits_and_says_what_it_leaves_out(width: int, height: int) -> None:
    console = Console(width=width, height=height, file=io.StringIO())
    with console.capture() as printed:
        console.print(frame(busy(), width=width, height=height))
    lines = printed.get().rstrip("\n").splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for wanted in (
        "waiting  64 of 64",
        "denoise",
        "pocket on cuda:0",
        "50 held",
        "more",
        "120000 done",
        "budget 35.7 GB of 40.0 GB",
    ):
        assert wanted in text
    assert "\x1b[31m" not in text


def test_an_idle_screen_says_so() -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as printed:
        console.print(frame(engine_pb2.Status(versions={"atelier": "0.1.0"}), width=80, height=24))
    assert "nothing" in printed.get()
    assert "waiting  0 of 0" in printed.get()
