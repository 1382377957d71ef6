"""A disk that fails while the server runs: what SQLite says of it reaches callers as a status and a line they
can act on, and what comes once the disk is well again is done.
"""

import logging
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest

from atelier.client import AtelierError, Client
from atelier.v1 import jobs_pb2
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving


def read_anew(server: Running) -> None:
    """Every thread opens the database again, as those of a server that has just started do."""
    server.catalog._db._writer.execute("pragma wal_checkpoint(truncate)")
    server.catalog._db._writer.execute("pragma shrink_memory")
    server.catalog._db._local = threading.local()


@contextmanager
def full(server: Running) -> Iterator[None]:
    """No page more, which is how SQLite meets ENOSPC."""
    writer = server.catalog._db._writer
    (pages,) = writer.execute("pragma page_count").fetchone()
    writer.execute(f"pragma max_page_count={pages}")
    yield
    writer.execute("pragma max_page_count=1000000")


@contextmanager
def failing(server: Running) -> Iterator[None]:
    """The operating system refuses every write to the database's log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(server: Running) -> Iterator[None]:
    server.catalog._db._writer.execute("pragma query_only=on")
    yield
    server.catalog._db._writer.execute("pragma query_only=off")


@contextmanager
def gone(server: Running) -> Iterator[None]:
    read_anew(server)
    path = server.catalog._db._path
    path.rename(path.with_suffix(".away"))
    yield
    path.with_suffix(".away").rename(path)


@contextmanager
def overwritten(server: Running) -> Iterator[None]:
    path = server.catalog._db._path
    read_anew(server)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (len(whole) - 4096))
    yield
    with path.open("r+b") as file:
        file.write(whole)
    read_anew(server)


@pytest.fixture
def alone(tmp_path: Path, warm: WarmPipeline) -> Iterator[tuple[Running, Client]]:
    """A server whose disk may fail, with an adapter on it."""
    write_kohya(tmp_path / "hero", random_factors("pocket", seed=1, rank=4))
    with serving(tmp_path / "data", warm) as running, Client(running.address, timeout=60) as client:
        client.check_in(tmp_path / "hero", name="hero")
        yield running, client


def reads(client: Client) -> object:
    return client.history("hero")


def writes(client: Client) -> object:
    for number in range(1000):  # until a page more is needed
        client.set_alias("hero", f"alias-{number}", 1)
    return None


def keeps_a_job(client: Client) -> object:
    return client.create_job("a star", steps=1, seed=1)


UNAVAILABLE = grpc.StatusCode.UNAVAILABLE, "the catalog cannot be read or written now"


@pytest.mark.parametrize(
    ("harm", "call", "code", "message"),
    [
        (full, writes, grpc.StatusCode.RESOURCE_EXHAUSTED, "the server's disk is full; nothing was stored"),
        (failing, keeps_a_job, *UNAVAILABLE),
        (read_only, writes, *UNAVAILABLE),
        (gone, reads, *UNAVAILABLE),
        (overwritten, reads, grpc.StatusCode.DATA_LOSS, "the catalog's database is damaged"),
        (overwritten, keeps_a_job, grpc.StatusCode.DATA_LOSS, "restore a backup"),
    ],
)
def test_what_the_database_meets_is_told_with_what_to_do(
    alone: tuple[Running, Client],
    harm: Callable[[Running], AbstractContextManager[None]],
    call: Callable[[Client], object],
    code: grpc.StatusCode,
    message: str,
) -> None:
    server, client = alone
    with harm(server):
        with pytest.raises(AtelierError, match=message) as caught:
            call(client)
        assert caught.value.code is code
    client.set_alias("hero", "well-again", 1)
    assert "well-again" in client.history("hero")[0].aliases


def test_a_job_whose_disk_fails_says_so_once_that_can_be_kept(
    alone: tuple[Running, Client], caplog: pytest.LogCaptureFixture
) -> None:
    server, client = alone
    told = threading.Event()

    def hears(record: logging.LogRecord) -> bool:
        if "cannot be kept" in record.getMessage():
            told.set()
        return True

    caplog.handler.addFilter(hears)
    job = client.create_job("a star", steps=50, seed=1)
    watching = client.watch_job(job.name)
    next(event for event in watching if event.HasField("step"))
    with read_only(server):
        assert told.wait(60)
    *_, last = watching
    assert last.state == jobs_pb2.JOB_STATE_FAILED
    found = client.get_job(job.name)
    assert found.error_code == "UNAVAILABLE"
    assert "read or written now (attempt to write a readonly database)" in found.error
