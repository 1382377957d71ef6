"""Jobs over gRPC: they outlive who asked and the server, end as they are told to, and make the same pictures
as any render.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client, control, reference
from atelier.v1 import jobs_pb2, jobs_pb2_grpc, render_pb2
from compose.guiding import attached
from compose.warm import WarmPipeline, warm_up
from registry.catalog import Catalog
from server import runner
from server.auth import Tokens
from tests.adapters import random_factors, write_kohya
from tests.companions import tiny_adapter, tiny_control, tiny_encoder
from tests.conftest import Running, serving
from tests.gates import Gate, HeldBlobs, HeldEngine
from tests.server.test_cancellation import until

SMALL = {"steps": 3, "width": 64, "height": 64, "count": 2}
DONE, CANCELLED, QUEUED = jobs_pb2.JOB_STATE_DONE, jobs_pb2.JOB_STATE_CANCELLED, jobs_pb2.JOB_STATE_QUEUED
RUNNING, FAILED = jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_FAILED


@pytest.fixture
def gate() -> Gate:
    return Gate()


@contextmanager
def holding(data: Path, warm: WarmPipeline, gate: Gate, tokens: Tokens | None = None) -> Iterator[Running]:
    """A server whose renders pass a gate, which is open when it stops."""
    with serving(data, warm, engine=HeldEngine(warm, gate), tokens=tokens) as running:
        try:
            yield running
        finally:
            gate.open()


@pytest.fixture
def running(tmp_path: Path, warm: WarmPipeline, gate: Gate) -> Iterator[Running]:
    with holding(tmp_path / "data", warm, gate) as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address, timeout=60) as opened:
        yield opened


def check_in(client: Client, folder: Path, name: str, seed: int, **more: object) -> None:
    write_kohya(folder / name, random_factors("pocket", seed=seed, rank=2))
    client.check_in(folder / name, name=name, **more)


def kept(events: list[jobs_pb2.JobEvent]) -> list[tuple[int, object]]:
    """Those that are told to everybody: number, and state or picture."""
    return [
        (e.sequence, e.state if e.HasField("state") else e.image.image)
        for e in events
        if e.WhichOneof("event") in {"state", "image"}
    ]


def ended(client: Client, job: jobs_pb2.Job) -> jobs_pb2.Job:
    """The job, when it is over."""
    list(client.watch_job(job.name))
    return client.get_job(job.name)


def images(client: Client, job: jobs_pb2.Job) -> list[bytes]:
    return [client.job_image(job.name, image) for image in range(job.count)]


def test_a_job_makes_the_pictures_of_a_render_and_tells_all_that_happens(
    client: Client, tmp_path: Path
) -> None:
    check_in(client, tmp_path, "hero", 1, triggers=["zig"])
    asked = {"stack": {"hero": 0.8}, "seed": 7, **SMALL}
    job = client.create_job("a {hero} star", preview_every=2, **asked)
    events = list(client.watch_job(job.name))
    assert kept(events) == [(1, QUEUED), (2, RUNNING), (3, 0), (4, 1), (5, DONE)]
    over = client.get_job(job.name)
    assert (over.state, over.count, over.sequence, over.creator) == (DONE, 2, 5, job.creator)
    assert json.loads(over.manifest_json)["prompt"] == "a zig star"
    assert over.seconds["denoise"] > 0
    assert over.expire_time.ToDatetime() - over.end_time.ToDatetime() == timedelta(days=7)
    rendered = [picture.png for picture in client.render("a {hero} star", **asked).pictures()]
    assert images(client, over) == rendered


def test_watching_goes_on_after_any_event_without_a_gap_or_a_repeat(client: Client) -> None:
    job = client.create_job("a star", **SMALL)
    whole = kept(list(client.watch_job(job.name)))
    for after in range(6):
        assert kept(list(client.watch_job(job.name, after))) == whole[after:]


def test_who_comes_late_is_told_what_happened_and_then_what_happens(client: Client, gate: Gate) -> None:
    gate.shut("delivering")
    job = client.create_job("a star", **SMALL)
    assert gate.reached.wait(60)
    watching = client.watch_job(job.name)
    first = [next(watching) for _ in range(3)]
    assert kept(first) == [(1, QUEUED), (2, RUNNING), (3, 0)]
    gate.open()
    assert kept(list(watching)) == [(4, 1), (5, DONE)]


def test_what_it_depends_on_is_decided_when_it_is_made(client: Client, gate: Gate, tmp_path: Path) -> None:
    check_in(client, tmp_path, "hero", 1, alias="stable")
    gate.shut("denoising")
    before = client.create_job("a star", **SMALL)
    assert gate.reached.wait(60)
    job = client.create_job("a star", stack={"hero@stable": 1.0}, **SMALL)
    check_in(client, tmp_path, "hero", 2)
    client.set_alias("hero", "stable", 2)
    gate.open()
    ended(client, before)
    over = ended(client, job)
    told = json.loads(over.manifest_json)
    assert told["stack"][0]["ref"] == "hero:1"
    asked = {"stack": {"hero:1": 1.0}, "seed": told["seed"], **SMALL}
    assert images(client, over) == [p.png for p in client.render("a star", **asked).pictures()]


def test_a_running_job_is_called_off_within_a_step_and_its_finished_pictures_stay(
    client: Client, gate: Gate, running: Running
) -> None:
    gate.shut("delivering")
    job = client.create_job("a star", **{**SMALL, "count": 64, "steps": 20})
    assert gate.reached.wait(60)
    until(lambda: len(client.get_job(job.name).images) == 1)
    assert client.cancel_job(job.name).state == CANCELLED
    until(lambda: (now := running.queue.status().running) is not None and now.callers == 0)
    gate.open()
    until(lambda: running.queue.status().running is None)
    assert gate.steps <= 1
    over = client.get_job(job.name)
    assert (over.state, [i.image for i in over.images], over.HasField("expire_time")) == (
        CANCELLED,
        [0],
        True,
    )
    assert client.job_image(job.name, 0).startswith(b"\x89PNG")
    assert client.cancel_job(job.name) == over
    assert ended(client, client.create_job("a star", **SMALL)).state == DONE


def test_jobs_that_wait_are_called_off_or_forgotten_and_never_run(
    client: Client, gate: Gate, running: Running
) -> None:
    gate.shut("denoising")
    jobs = [client.create_job("a star", **SMALL) for _ in range(5)]
    assert gate.reached.wait(60)
    until(lambda: len(running.queue.status().waiting) == 1)  # two of one creator are fed
    client.cancel_job(jobs[1].name)
    client.cancel_job(jobs[3].name)
    client.delete_job(jobs[2].name)
    gate.open()
    assert [ended(client, jobs[i]).state for i in (0, 1, 3, 4)] == [DONE, CANCELLED, CANCELLED, DONE]
    assert running.queue.status().done == 2
    with pytest.raises(AtelierError, match="there is no job") as caught:
        client.get_job(jobs[2].name)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_many_jobs_of_one_stand_in_nobodys_way(
    client: Client, gate: Gate, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.shut("denoising")
    jobs = [client.create_job("a star", **SMALL) for _ in range(6)]
    assert gate.reached.wait(60)
    monkeypatch.setenv("ATELIER_USER", "tom")
    rendering = iter(client.render("a star", **SMALL))
    assert next(rendering).queued.position == 1
    gate.open()
    assert any(event.HasField("summary") for event in rendering)
    assert client.get_job(jobs[-1].name).state == QUEUED
    assert [ended(client, job).state for job in jobs] == [DONE] * 6


def test_of_a_creators_jobs_the_more_urgent_goes_first(client: Client, gate: Gate) -> None:
    gate.shut("denoising")
    jobs = [client.create_job("a star", priority=priority, **SMALL) for priority in (0, 0, -1, 5)]
    assert gate.reached.wait(60)
    gate.open()
    over = [ended(client, job) for job in jobs]
    ends = sorted(range(4), key=lambda i: over[i].end_time.ToNanoseconds())
    assert (ends[0], ends[-1]) == (0, 2)  # two are fed at once; the third may come in between two pictures


def test_the_same_request_again_is_the_same_job(client: Client) -> None:
    job = client.create_job("a star", request_id="one", **SMALL)
    assert client.create_job("a star", request_id="one", **SMALL).name == job.name
    over = ended(client, job)
    assert client.create_job("a star", request_id="one", **SMALL) == over
    with pytest.raises(AtelierError, match="request id 'one' was used for another job") as caught:
        client.create_job("a moon", request_id="one", **SMALL)
    assert caught.value.code is grpc.StatusCode.ABORTED
    assert [found.name for found in client.jobs()] == [job.name]


def test_a_job_that_the_end_of_the_server_cuts_short_renders_what_it_lacks(
    tmp_path: Path, warm: WarmPipeline, gate: Gate
) -> None:
    with holding(tmp_path / "data", warm, gate) as running, Client(running.address, timeout=60) as client:
        gate.shut("delivering")
        cut = client.create_job("a star", seed=3, **{**SMALL, "count": 3})
        waits = client.create_job("a moon", seed=3, **SMALL)
        assert gate.reached.wait(60)
        until(lambda: len(client.get_job(cut.name).images) == 1)
        watching = client.watch_job(cut.name)
        assert kept([next(watching) for _ in range(3)]) == [(1, QUEUED), (2, RUNNING), (3, 0)]
        watching.close()
        stopping = threading.Thread(target=running.stop, args=(0.0,))
        stopping.start()
        until(lambda: running.queue.status().draining and running.queue.status().waiting == ())
        gate.open()
        stopping.join(60)
    second = Gate()
    with holding(tmp_path / "data", warm, second) as running, Client(running.address, timeout=60) as client:
        over = [ended(client, job) for job in (cut, waits)]
        assert [job.state for job in over] == [DONE, DONE]
        assert second.steps == 2 * 3 + 2 * 3
        assert kept(list(client.watch_job(cut.name)))[3:] == [
            (4, QUEUED), (5, RUNNING), (6, 1), (7, 2), (8, DONE),
        ]  # fmt: skip
        rendered = client.render("a star", seed=3, **{**SMALL, "count": 3}).pictures()
        assert images(client, over[0]) == [picture.png for picture in rendered]


def test_a_job_whose_adapter_is_purged_while_it_waits_fails_and_says_why(
    client: Client, running: Running, tmp_path: Path
) -> None:
    check_in(client, tmp_path, "hero", 1)
    loads = Gate()
    running.catalog.blobs = HeldBlobs(tmp_path / "data", loads)
    loads.shut("loading")
    job = client.create_job("a star", stack={"hero": 1.0}, **SMALL)
    assert loads.reached.wait(60)
    client.delete("hero:1")
    running.catalog.collect_garbage(retention=timedelta(0), grace=timedelta(0))
    loads.open()
    over = ended(client, job)
    assert (over.state, over.error_code) == (FAILED, "NOT_FOUND")
    assert "hero:1 was deleted" in over.error
    assert ended(client, client.create_job("a star", **SMALL)).state == DONE


def test_garbage_is_no_picture_of_a_job_that_is_there(client: Client) -> None:
    kept_job, gone = (ended(client, client.create_job("a star", **SMALL)) for _ in range(2))
    client.delete_job(gone.name)
    went = client.collect_garbage(retention=timedelta(0), grace=timedelta(0))
    assert sorted(went.orphans) == sorted(image.digest for image in gone.images)
    assert all(png.startswith(b"\x89PNG") for png in images(client, kept_job))


def test_bad_requests_are_refused_and_make_no_job(client: Client) -> None:
    job = ended(client, client.create_job("a star", **SMALL))
    invalid, unknown = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(client.address) as channel:
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        for call, code in (
            (lambda: client.create_job("a star", steps=0), invalid),
            (lambda: client.create_job("a star", stack={"nobody": 1.0}), unknown),
            (lambda: client.create_job("a {hero}"), invalid),
            (lambda: client.create_job("a star", priority=99), invalid),
            (lambda: client.create_job("a star", request_id="x" * 65), invalid),
            (lambda: client.create_job("a star", base="sdxl"), invalid),
            (lambda: client.create_job("a star at (12:30)"), invalid),
            (lambda: client.create_job("a star", negative_prompt="(a ring:1.2.3)"), invalid),
            (lambda: client.create_job("a star", scheduler="LCMScheduler", steps=60), invalid),
            (lambda: client.get_job(""), unknown),
            (lambda: client.get_job("../../x"), unknown),
            (lambda: client.cancel_job("none"), unknown),
            (lambda: client.delete_job("none"), unknown),
            (lambda: list(client.watch_job("none")), unknown),
            (lambda: list(client.watch_job(job.name, 6)), invalid),
            (lambda: list(client.watch_job(job.name, -1)), invalid),
            (lambda: client.job_image(job.name, 2), unknown),
            (lambda: client.job_image(job.name, -1), unknown),
            (lambda: stub.ListJobs(jobs_pb2.ListJobsRequest(page_size=-1)), invalid),
            (lambda: stub.ListJobs(jobs_pb2.ListJobsRequest(page_size=1001)), invalid),
            (lambda: stub.ListJobs(jobs_pb2.ListJobsRequest(page_token="x")), invalid),
            (lambda: stub.ListJobs(jobs_pb2.ListJobsRequest(page_token="9" * 30)), invalid),
            (lambda: stub.ListJobs(jobs_pb2.ListJobsRequest(state=77)), invalid),
            (lambda: stub.CreateJob(jobs_pb2.CreateJobRequest(request=render_pb2.RenderRequest(
                prompt="a", request_id="x"))), invalid),
        ):  # fmt: skip
            with pytest.raises((AtelierError, grpc.RpcError)) as caught:
                call()
            found = caught.value.code
            assert (found if isinstance(found, grpc.StatusCode) else found()) is code, caught.value
    assert [found.name for found in client.jobs()] == [job.name]


def test_pages_of_jobs_go_through_all_of_them(client: Client, running: Running) -> None:
    made = [running.catalog.jobs.create({"manifest": "{}", "count": 1}, creator="x") for _ in range(250)]
    running.catalog.jobs.change(made[3].name, "done")
    assert [job.name for job in client.jobs()] == [job.name for job in made[::-1]]
    assert [job.name for job in client.jobs(state="done", creator="x")] == [made[3].name]
    assert list(client.jobs(creator="nobody")) == []


def test_only_its_creator_or_an_admin_ends_a_job(
    tmp_path: Path, warm: WarmPipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    tokens = Tokens(tmp_path / "data")
    told = {name: tokens.add(name, role) for name, role in
            [("mia", "reader"), ("tom", "writer"), ("ada", "admin")]}  # fmt: skip
    with holding(tmp_path / "data", warm, gate, tokens) as running, Client(running.address) as client:
        gate.shut("denoising")
        monkeypatch.setenv("ATELIER_TOKEN", told["mia"])
        jobs = [client.create_job("a star", **SMALL) for _ in range(3)]
        assert jobs[0].creator == "mia"
        monkeypatch.setenv("ATELIER_TOKEN", told["tom"])
        assert client.get_job(jobs[0].name).creator == "mia"
        for end in (client.cancel_job, client.delete_job):
            with pytest.raises(AtelierError, match="is mia's; only they, or an admin, can end it") as caught:
                end(jobs[0].name)
            assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
        monkeypatch.setenv("ATELIER_TOKEN", told["ada"])
        assert client.cancel_job(jobs[2].name).state == CANCELLED
        monkeypatch.setenv("ATELIER_TOKEN", told["mia"])
        assert client.cancel_job(jobs[1].name).state == CANCELLED
        gate.open()
        assert ended(client, jobs[0]).state == DONE


async def test_the_async_client_does_the_same(running: Running) -> None:
    async with AsyncClient(running.address, timeout=60) as atelier:
        job = await atelier.create_job("a star", seed=1, request_id="aio", **SMALL)
        events = [event async for event in atelier.watch_job(job.name)]
        assert kept(events) == [(1, QUEUED), (2, RUNNING), (3, 0), (4, 1), (5, DONE)]
        over = await atelier.get_job(job.name)
        assert [found async for found in atelier.jobs(state="done")] == [over]
        rendered = await atelier.render("a star", seed=1, **SMALL)
        assert [await atelier.job_image(job.name, image) for image in range(2)] == rendered
        assert await atelier.cancel_job(job.name) == over
        await atelier.delete_job(job.name)
        assert [found async for found in atelier.jobs()] == []


def test_a_job_that_starts_from_a_picture_keeps_it_and_a_batch_that_was_cut_is_made_whole(
    tmp_path: Path, warm: WarmPipeline, gate: Gate
) -> None:
    asked = {"seed": 3, "steps": 4, "width": 64, "height": 64, "count": 5, "batch": 2, "strength": 0.5}
    with holding(tmp_path / "data", warm, gate) as running, Client(running.address, timeout=60) as client:
        (start,) = client.render("a star", seed=1, steps=2, width=64, height=64).pictures()
        images_of = {"image": start.png, "mask": start.png}
        whole = [p.png for p in client.render("a moon", **images_of, **asked).pictures()]
        gate.shut("delivering")
        job = client.create_job("a moon", **images_of, **asked)
        assert gate.reached.wait(60)
        until(lambda: len(client.get_job(job.name).images) == 1)  # half of the first batch
        stopping = threading.Thread(target=running.stop, args=(0.0,))
        stopping.start()
        until(lambda: (now := running.queue.status().running) is not None and now.callers == 0)
        gate.open()
        stopping.join(60)
    with holding(tmp_path / "data", warm, Gate()) as running, Client(running.address, timeout=60) as client:
        over = ended(client, job)
        assert over.state == DONE
        assert images(client, over) == whole
        assert kept(list(client.watch_job(job.name)))[5:] == [(6, 1), (7, 2), (8, 3), (9, 4), (10, DONE)]
        client.collect_garbage(retention=timedelta(0), grace=timedelta(0))
        assert len(running.catalog.jobs.inputs(job.name)) == 2
        client.delete_job(job.name)
        client.collect_garbage(retention=timedelta(0), grace=timedelta(0))
        assert list(running.catalog.blobs.files()) == []


def test_more_jobs_than_are_kept_waiting_are_refused(
    client: Client, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "UNDONE_LIMIT", 3)
    gate.shut("denoising")
    jobs = [client.create_job("a star", request_id=f"star {n}", **SMALL) for n in range(3)]
    with pytest.raises(AtelierError, match="3 jobs are not done yet, which is the limit") as caught:
        client.create_job("a star", **SMALL)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.create_job("a star", request_id="star 1", **SMALL).name == jobs[1].name
    gate.open()
    assert [ended(client, job).state for job in jobs] == [DONE] * 3


def test_a_job_for_a_base_that_is_not_here_waits(tmp_path: Path, warm: WarmPipeline) -> None:
    catalog = Catalog(tmp_path / "data")
    order = {"manifest": json.dumps({"base": {"name": "elsewhere"}, "prompt": "", "steps": 1}), "count": 1}
    job = catalog.jobs.create(order, creator="")
    catalog.close()
    with serving(tmp_path / "data", warm) as running, Client(running.address, timeout=60) as client:
        assert ended(client, client.create_job("a star", **SMALL)).state == DONE
        assert client.get_job(job.name).state == QUEUED
        assert client.cancel_job(job.name).state == CANCELLED


def test_a_job_waits_for_what_steers_it_as_for_its_base(
    tmp_path: Path, warm: WarmPipeline, gate: Gate
) -> None:
    told = {
        "controls": [f"pocket:edges={tiny_control(warm, tmp_path / 'edges')}"],
        "references": [f"pocket:style={tiny_adapter(warm, tmp_path / 'style' / 'it.safetensors')}"],
    }
    tiny_encoder(tmp_path / "style" / "image_encoder")
    steered = {what: warm_up(*attached([warm.base], **{what: told[what]})) for what in told}
    both, data = warm_up(*attached([warm.base], **told)), tmp_path / "data"
    with holding(data, both, gate) as running, Client(running.address, timeout=60) as client:
        (start,) = client.render("a star", seed=1, steps=2, width=64, height=64).pictures()
        gate.shut("denoising")
        controlled = client.create_job("a star", controls=[control("edges", start.png)], **SMALL)
        resembling = client.create_job("a star", references=[reference("style", start.png)], **SMALL)
        assert gate.reached.wait(60)
        stopping = threading.Thread(target=running.stop, args=(0.0,))
        stopping.start()
        until(lambda: running.queue.status().draining and running.queue.status().waiting == ())
        gate.open()
        stopping.join(60)
    with serving(data, steered["references"]) as running, Client(running.address, timeout=60) as client:
        assert ended(client, resembling).state == DONE
        assert client.get_job(controlled.name).state == QUEUED
    with serving(data, steered["controls"]) as running, Client(running.address, timeout=60) as client:
        assert ended(client, controlled).state == DONE


def test_a_full_disk_ends_the_jobs_that_are_fed_and_lets_others_wait_for_room(
    client: Client, gate: Gate, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.05)
    gate.shut("delivering")
    first, second, third, last = [client.create_job("a star", **SMALL) for _ in range(4)]
    assert gate.reached.wait(60)
    until(lambda: len(running.queue.status().waiting) == 1)  # two of one creator are fed
    with monkeypatch.context() as full:
        full.setattr(running.catalog.blobs, "spare", 1 << 60)
        gate.open()
        for over in (ended(client, first), ended(client, second)):
            assert (over.state, over.error_code) == (FAILED, "RESOURCE_EXHAUSTED")
        with pytest.raises(AtelierError, match="the server's disk is full; nothing was stored"):
            client.create_job("a star", **SMALL)
        until(lambda: not running.queue.status().waiting and not running.queue.status().running)
        assert [client.get_job(job.name).state for job in (third, last)] == [QUEUED, QUEUED]
        assert client.cancel_job(third.name).state == CANCELLED  # there is room for that
        client.delete_job(first.name)
    assert ended(client, last).state == DONE
