"""`atelier serve` as a process: one per catalog, one per port, and nothing acknowledged is lost whatever ends
it.
"""

import itertools
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atelier.client import AtelierError, Client
from atelier.v1 import catalog_pb2, catalog_pb2_grpc, jobs_pb2
from compose import bases
from compose.residence import needs
from registry.catalog import Catalog
from server.main import main as server_main
from tests.adapters import random_factors, write_kohya
from tests.scorers import tiny_scorer

COMMAND = [sys.executable, "-m", "atelier.cli", "serve"]


@contextmanager
def process(
    data: Path, listen: str = "127.0.0.1:0", *more: str, **environment: str
) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """A server process and its address. It logs no calls: nobody reads that while it runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    quiet = () if "--log-level" in more or "--log-format" in more else ("--log-level", "warning")
    command = [*COMMAND, "--data", str(data), "--listen", listen, *more, *quiet]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line.startswith("listening on "), started.communicate()
        yield started, line.split()[-1]
    finally:
        started.kill()
        started.communicate()


def refused(data: Path, listen: str, *more: str) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, "--data", str(data), "--listen", listen, *more], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_one_server_a_catalog_and_one_a_port(tmp_path: Path) -> None:
    with process(tmp_path / "data") as (_, address):
        code, told = refused(tmp_path / "data", "127.0.0.1:0")
        assert (code, "is in use by another process" in told) == (5, True)
        code, told = refused(tmp_path / "other", address)
        assert (code, f"cannot listen on {address}" in told) == (6, True)
        with Client(address, timeout=30) as client:
            assert [b.name for b in client.bases()] == ["pocket"]


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    told = "import sys, server.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told]).returncode == 0
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    assert (shown.returncode, "--keep-jobs DAYS" in shown.stdout) == (0, True)


def test_a_base_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    code, told = refused(tmp_path / "data", "127.0.0.1:0", "--scorer", str(tmp_path))
    assert (code, f"{tmp_path} is no scorer: " in told, told.count("\n")) == (4, True, 1)
    code, told = refused(tmp_path / "data", "127.0.0.1:0", "--base", "nowhere")
    assert (code, "'nowhere' is no base" in told) == (4, True)


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("data", ("--device", "toaster"), "the device 'toaster' cannot be used"),
        ("data", ("--device", "cuda:99"), "the device 'cuda:99' cannot be used; there is cpu"),
        ("data", ("--threads", "1000"), "--threads 1000 is not within 0 and"),
        ("data", ("--base", "{}/empty"), "is no base"),
        ("data", ("--base", "{}/torn"), "config.json cannot be read"),
        ("data", ("--base", "{}/headless"), "vae/config.json cannot be read"),
        ("data", ("--memory", "0.001"), "pocket needs about 42 MB"),
        ("data", ("--adapter-memory", "-1"), "--adapter-memory -1.0 is no number of GB above 0"),
        ("data", ("--keep-jobs", "-1"), "--keep-jobs -1.0 is not within"),
        ("data", ("--share", "ann=0"), "--share ann=0 is no CLIENT=N with an N from 0.01 to 100"),
        ("data", ("--share", "ann"), "--share ann is no CLIENT=N"),
        ("data", ("--fp8", "dreams"), "--fp8 dreams names no base; there are pocket"),
        ("data", ("--hub", "http://"), "http://"),
        ("data", ("--listen", "127.0.0.1"), "--listen 127.0.0.1 is no HOST:PORT"),
        ("data", ("--listen", "127.0.0.1:99999"), "--listen 127.0.0.1:99999 is no HOST:PORT"),
        ("data", ("--listen", "::1:0"), "write 127.0.0.1:7431, or [::1]:7431"),
        ("broken", (), "catalog.db is damaged"),
        ("file", (), "cannot use"),
    ],
)
def test_what_cannot_be_used_is_told(
    data: str,
    more: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: every new one loads torch first."""
    for name, config in (("torn", "{"), ("headless", '{"cross_attention_dim": 768}')):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        (tmp_path / name / "unet/config.json").write_text(config)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/catalog.db").write_text("no database at all, but long enough to be looked at" * 100)
    (tmp_path / "file").write_text("")
    told = [option.format(tmp_path) for option in more]
    monkeypatch.setattr(
        sys, "argv", ["server", "--data", str(tmp_path / data), "--listen", "127.0.0.1:0", *told]
    )
    assert server_main() == (5 if data == "broken" else 4)
    assert message in capsys.readouterr().err


def test_a_table_that_is_damaged_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Catalog(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "catalog.db")) as database:
        jobs = "select rootpage from sqlite_master where tbl_name = 'jobs' and rootpage > 0"
        pages = [page for (page,) in database.execute(jobs)]
        (size,) = database.execute("pragma page_size").fetchone()
    with (tmp_path / "catalog.db").open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * size)
            file.write(b"\xff" * size)
    monkeypatch.setattr(sys, "argv", ["server", "--data", str(tmp_path), "--listen", "127.0.0.1:0"])
    assert server_main() == 5
    assert capsys.readouterr().err.endswith("malformed); restore it from a backup\n")


def test_sigterm_lets_the_running_render_finish_and_says_so_to_health(tmp_path: Path) -> None:
    with process(tmp_path / "data") as (server, address), Client(address) as client:
        events = iter(client.render("a star", steps=150, count=3))
        while not next(events).HasField("step"):
            pass
        server.send_signal(signal.SIGTERM)
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            end = time.monotonic() + 10
            while health.Check(health_pb2.HealthCheckRequest()).status == serving:
                assert time.monotonic() < end
        with pytest.raises(AtelierError, match="shutting down") as caught:
            list(client.render("a star", steps=1))
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert [event for event in events if event.HasField("summary")]
        assert server.wait(30) == 0


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=1))
    with process(tmp_path / "data") as (server, address), Client(address) as client:
        client.check_in(tmp_path / "a", name="hero", alias="stable")
        merged = client.merge({"hero": 0.5}, name="half").version
        server.kill()
        server.wait()
    with process(tmp_path / "data") as (_, address), Client(address) as client:
        assert [v.name for v in client.list()] == ["half", "hero"]
        kept = client.get("half").version
        kept.ClearField("body_digest")  # read meanwhile, perhaps
        assert kept == merged
        client.download("hero@stable", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_survive_whatever_ends_the_server(tmp_path: Path, end: signal.Signals) -> None:
    size = {"width": 64, "height": 64, "seed": 5}
    with ExitStack() as opened:
        server, address = opened.enter_context(process(tmp_path / "data"))
        client = opened.enter_context(Client(address, timeout=120))
        long = client.create_job("a star", count=60, steps=40, **size)
        short = client.create_job("a red star", count=2, steps=2, **size)
        watching = client.watch_job(long.name)
        seen = list(itertools.takewhile(lambda event: not event.HasField("image"), watching))
        server.send_signal(end)
        if end is signal.SIGTERM:
            client.cancel_job(long.name)  # or it would have its 30 seconds
        server.wait(60)
        opened.enter_context(process(tmp_path / "data", address))
        if end is signal.SIGKILL:
            watching = client.watch_job(long.name, 3)  # after the first picture, which is there
            seen += itertools.takewhile(lambda event: event.sequence < 7, watching)
            told = [(e.sequence, e.WhichOneof("event")) for e in seen]
            assert [(n, what) for n, what in told if what in {"state", "image"}] == [
                (1, "state"), (2, "state"), (4, "state"), (5, "state"), (6, "image"),
            ]  # fmt: skip
            assert [image.image for image in client.get_job(long.name).images][:2] == [0, 1]
            client.cancel_job(long.name)
        watching.close()
        list(client.watch_job(short.name))
        job = client.get_job(short.name)
        assert job.state == jobs_pb2.JOB_STATE_DONE
        rendered = client.render("a red star", count=2, steps=2, **size).pictures()
        assert [client.job_image(job.name, i) for i in range(2)] == [picture.png for picture in rendered]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_a_job_that_meets_a_full_disk_ends_when_there_is_room_and_the_next_is_done(tmp_path: Path) -> None:
    with process(tmp_path / "data") as (server, address), Client(address, timeout=60) as client:
        job = client.create_job("a star", count=60, steps=10)
        for event in client.watch_job(job.name):
            if event.HasField("image"):
                break
        before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, before[1]))
        assert server.stderr is not None
        line = next(line for line in server.stderr if "cannot be kept" in line)
        assert f"that the job {job.name} is failed cannot be kept" in line
        assert client.get_job(job.name).state == jobs_pb2.JOB_STATE_RUNNING
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)
        *_, last = client.watch_job(job.name)
        assert last.state == jobs_pb2.JOB_STATE_FAILED
        found = client.get_job(job.name)
        assert (found.error_code, found.error) == (
            "RESOURCE_EXHAUSTED",
            "the server's disk is full; nothing was stored",
        )
        assert client.job_image(job.name, 0)
        after = client.create_job("a star", count=1, steps=2)
        *_, last = client.watch_job(after.name)
        assert last.state == jobs_pb2.JOB_STATE_DONE


def test_a_full_disk_at_the_start_is_told_as_such_and_a_later_start_goes_on(tmp_path: Path) -> None:
    with process(tmp_path / "data") as (server, address), Client(address, timeout=60) as client:
        job = client.create_job("a star", count=2, steps=100)
        next(event for event in client.watch_job(job.name) if event.HasField("step"))
        server.kill()
    limited = "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); os.execv(sys.argv[1], sys.argv[1:])"
    command = [*COMMAND, "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, "-c", f"import os, resource, sys; {limited}", *command],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (6, 1), done.stderr
    assert "catalog.db cannot be used (disk I/O error); see to its disk" in done.stderr
    with process(tmp_path / "data") as (_, address), Client(address, timeout=60) as client:
        *_, last = client.watch_job(job.name)
        assert last.state == jobs_pb2.JOB_STATE_DONE


def test_a_watcher_is_let_go_when_the_server_stops_and_goes_on_with_the_next(tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=4))
    with process(tmp_path / "data") as (server, address), Client(address) as client:
        client.check_in(tmp_path / "a", name="hero")
        with grpc.insecure_channel(address) as channel:
            stub = catalog_pb2_grpc.CatalogServiceStub(channel)
            raw, watching = stub.WatchEvents(catalog_pb2.WatchEventsRequest()), client.watch()
            assert (next(raw).seq, next(watching).seq) == (1, 1)
            server.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError, match="shutting down; watch on from event 1") as caught:
                next(raw)  # told so, not cut off
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert server.wait(30) == 0
        with process(tmp_path / "data", address) as _, Client(address, timeout=60) as other:
            other.set_alias("hero", "stable", 1)
            event = next(watching)
            assert (event.seq, event.action) == (2, "alias")
            watching.close()


def test_a_server_is_told_how_to_score_to_store_and_to_share(tmp_path: Path) -> None:
    scorer = tiny_scorer(tmp_path / "scorer")
    more = ("--scorer", str(scorer), "--fp8", "pocket", "--share", "ann=2", "--memory", "1")
    with process(tmp_path / "data", "127.0.0.1:0", *more) as (_, address), Client(address) as client:
        (base,) = client.bases()
        assert (base.name, base.dtype) == ("pocket", "float8_e4m3fn")
        memory = client.status().memory
        parts = {part.name: part.size_bytes for part in memory.parts}
        assert (memory.budget_bytes, set(parts)) == (10**9, {"bases", "golden", "scorer"})
        assert parts["scorer"] < parts["bases"]
        assert len(list(client.render("a star", steps=1).pictures())) == 1


def test_a_base_that_does_not_fit_beside_the_scorer_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    scorer = tiny_scorer(tmp_path / "scorer")
    gigabytes = needs(bases.find("pocket"), torch.device("cpu")) / 1e9 + 1e-6
    code, told = refused(
        tmp_path / "data", "127.0.0.1:0", "--scorer", str(scorer), "--memory", f"{gigabytes:.9f}"
    )
    assert code == 4
    assert (
        "pocket needs about 42 MB with its golden weights, the budget is 42 MB, of which the scorer" in told
    )
