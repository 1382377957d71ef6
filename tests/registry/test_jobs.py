"""Jobs in the catalog's directory: events without a gap, states that end, pictures that are kept as long as
their job and no longer.
"""

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from registry import keeping
from registry.catalog import Catalog
from registry.errors import Conflict, NotFound
from registry.jobs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job

ORDER = {"manifest": "{}", "count": 2}
NONE = timedelta(0)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "data")
    yield opened
    opened.close()


def details(catalog: Catalog, job: Job, after: int = 0) -> list[tuple[int, object]]:
    return [
        (event.sequence, event.detail.get("state", event.detail.get("image")))
        for event in catalog.jobs.events(job.name, after)
    ]


def test_what_happens_to_a_job_is_numbered_without_a_gap(catalog: Catalog) -> None:
    job = catalog.jobs.create(ORDER, creator="mia", priority=3)
    other = catalog.jobs.create(ORDER, creator="mia")
    catalog.jobs.change(job.name, RUNNING)
    catalog.jobs.add_image(job.name, 0, b"first")
    catalog.jobs.add_image(job.name, 0, b"first")  # by a server that was told to do it again
    catalog.jobs.change(other.name, RUNNING)
    catalog.jobs.add_image(job.name, 1, b"second")
    ended = catalog.jobs.change(job.name, DONE, told={"warnings": ["long"]}, keep=timedelta(days=1))
    assert details(catalog, job) == [(1, QUEUED), (2, RUNNING), (3, 0), (4, 1), (5, DONE)]
    assert details(catalog, job, after=3) == [(4, 1), (5, DONE)]
    assert (ended.sequence, ended.priority, ended.order, ended.told) == (5, 3, ORDER, {"warnings": ["long"]})
    assert ended.ended_at is not None
    assert ended.expires_at == ended.ended_at + timedelta(days=1)
    assert [catalog.blobs.path(i.digest).read_bytes() for i in ended.images] == [b"first", b"second"]


@pytest.mark.parametrize("state", [DONE, FAILED, CANCELLED])
def test_what_is_over_stays_as_it_is(catalog: Catalog, state: str) -> None:
    job = catalog.jobs.create(ORDER, creator="")
    over = catalog.jobs.change(job.name, state, keep=timedelta(days=1))
    for other in (QUEUED, RUNNING, DONE, FAILED, CANCELLED):
        assert catalog.jobs.change(job.name, other) == over
    with pytest.raises(Conflict, match=f"is {state}"):
        catalog.jobs.add_image(job.name, 0, b"late")
    assert catalog.jobs.unfinished() == []


def test_what_ran_when_the_process_died_is_queued_again_with_its_pictures(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "data")
    done, ran, waits = (catalog.jobs.create(ORDER, creator="mia") for _ in range(3))
    catalog.jobs.change(done.name, DONE)
    catalog.jobs.change(ran.name, RUNNING)
    catalog.jobs.add_image(ran.name, 0, b"first")
    catalog.close()
    catalog = Catalog(tmp_path / "data")
    again = catalog.jobs.unfinished()
    assert [job.name for job in again] == [ran.name, waits.name]
    assert [image.image for image in again[0].images] == [0]
    assert details(catalog, ran) == [(1, QUEUED), (2, RUNNING), (3, 0), (4, QUEUED)]
    catalog.close()


def test_the_same_request_of_the_same_creator_is_the_same_job(catalog: Catalog) -> None:
    job = catalog.jobs.create(ORDER, creator="mia", request_id="one", fingerprint="x")
    assert catalog.jobs.create(ORDER, creator="mia", request_id="one", fingerprint="x") == job
    assert catalog.jobs.create(ORDER, creator="tom", request_id="one", fingerprint="x") != job
    assert catalog.jobs.create(ORDER, creator="mia", fingerprint="x") != job
    with pytest.raises(Conflict, match=f"request id 'one' was used for another job, {job.name}"):
        catalog.jobs.create(ORDER, creator="mia", request_id="one", fingerprint="y")


def test_jobs_are_listed_by_state_and_creator_newest_first(catalog: Catalog) -> None:
    made = [catalog.jobs.create(ORDER, creator=creator) for creator in ("mia", "tom", "mia")]
    catalog.jobs.change(made[0].name, DONE)
    names = [job.name for job in made]
    assert [job.name for job in catalog.jobs.newest()] == names[::-1]
    assert [job.name for job in catalog.jobs.newest(creator="mia")] == [names[2], names[0]]
    assert [job.name for job in catalog.jobs.newest(state=QUEUED, creator="mia")] == [names[2]]
    (first,) = catalog.jobs.newest(limit=1)
    assert [job.name for job in catalog.jobs.newest(below=first.number)] == names[1::-1]


def old(catalog: Catalog, digest: str) -> None:
    """Makes a file look a day old."""
    path = catalog.blobs.path(digest)
    os.utime(path, (time.time() - 86400,) * 2)


def test_a_collection_takes_no_picture_of_a_job_that_is_there_and_all_of_one_that_is_not(
    catalog: Catalog,
) -> None:
    kept, gone = (catalog.jobs.create(ORDER, creator="") for _ in range(2))
    stays, shared, goes = b"stays", b"shared", b"goes"
    for number, (job, data) in enumerate([(kept, stays), (kept, shared), (gone, shared), (gone, goes)]):
        catalog.jobs.add_image(job.name, number % 2, data)
    catalog.jobs.delete(gone.name)
    with pytest.raises(NotFound, match="there is no job"):
        catalog.jobs.get(gone.name)
    went = catalog.collect_garbage(retention=NONE, grace=NONE)
    assert len(went.orphans) == 1
    files = {catalog.blobs.path(digest).read_bytes() for digest, _ in catalog.blobs.files()}
    assert files == {stays, shared}


def test_a_collection_without_grace_takes_nothing_of_a_job_that_is_just_made(catalog: Catalog) -> None:
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            catalog.collect_garbage(retention=NONE, grace=NONE)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for number in range(100):
            job = catalog.jobs.create(ORDER, creator="", inputs={"image": b"from %d" % number})
            image = catalog.jobs.add_image(job.name, 0, b"picture %d" % number)
            assert catalog.jobs.inputs(job.name) == {"image": b"from %d" % number}
            assert catalog.blobs.path(image.digest).read_bytes() == b"picture %d" % number
    finally:
        stop.set()
        collector.join()


def test_a_job_is_forgotten_when_its_time_has_come_with_its_pictures(catalog: Catalog) -> None:
    lives, dies, waits = (catalog.jobs.create(ORDER, creator="") for _ in range(3))
    for job, data in ((lives, b"both"), (dies, b"both"), (dies, b"own")):
        digest = catalog.jobs.add_image(job.name, len(catalog.jobs.get(job.name).images), data).digest
        old(catalog, digest)
    catalog.jobs.change(lives.name, DONE, keep=timedelta(days=1))
    catalog.jobs.change(dies.name, DONE, keep=NONE)
    assert catalog.jobs.expire() == [dies.name]
    assert [job.name for job in catalog.jobs.newest()] == [waits.name, lives.name]
    assert [catalog.blobs.path(d).read_bytes() for d, _ in catalog.blobs.files()] == [b"both"]
    assert catalog.jobs.expire() == []


def test_a_backup_has_the_jobs_and_their_pictures(catalog: Catalog, tmp_path: Path) -> None:
    job = catalog.jobs.create(ORDER, creator="")
    image = catalog.jobs.add_image(job.name, 0, b"picture")
    report = keeping.backup(tmp_path / "data", tmp_path / "copy")
    assert (report.sound, report.versions, report.orphans) == (True, 0, ())
    catalog.blobs.path(image.digest).chmod(0o644)
    catalog.blobs.path(image.digest).write_bytes(b"x")
    told = keeping.verify(tmp_path / "data").corrupt
    assert told == (f"picture of job {job.name}:0 ({image.digest})",)
    copy = Catalog(tmp_path / "copy")
    assert copy.jobs.get(job.name).images == (image,)
    assert copy.blobs.path(image.digest).read_bytes() == b"picture"
    copy.close()
