"""Files on their way: cut and gone on with, within limits, nothing left over from what was refused."""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from atelier.aio import AsyncClient
from atelier.channels import stubs
from atelier.client import AtelierError, Client
from atelier.messages import CHUNK, check_in_parts
from atelier.v1 import catalog_pb2, catalog_pb2_grpc
from compose.warm import WarmPipeline
from registry.blobs import PARKED_LIMIT, BlobStore
from registry.errors import Conflict
from server import uploads
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving

PARTS = Iterator[catalog_pb2.CheckInRequest]


class Proxy:
    """Between a client and a server; cuts the first `cuts` connections after so many bytes one way, once
    `ready` has returned.
    """

    def __init__(
        self,
        address: str,
        *,
        upstream: int = 0,
        downstream: int = 0,
        cuts: int = 1,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        self._ready = ready
        host, port = address.rsplit(":", 1)
        self._target = (host, int(port))
        self._limits, self._cuts = (upstream or 1 << 62, downstream or 1 << 62), cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections, self.upstream, self._open = 0, 0, list[socket.socket]()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._open += [client, server]
            self.connections += 1
            limits = self._limits if self.connections <= self._cuts else (1 << 62, 1 << 62)
            for a, b, limit in ((client, server, limits[0]), (server, client, limits[1])):
                threading.Thread(target=self._pipe, args=(a, b, limit, a is client), daemon=True).start()

    def _pipe(self, a: socket.socket, b: socket.socket, limit: int, up: bool) -> None:
        with suppress(OSError):
            while limit > 0 and (data := a.recv(min(65536, limit))):
                b.sendall(data)
                limit -= len(data)
                self.upstream += len(data) if up else 0
            if limit <= 0:
                self._ready()
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for end in self._open:
            end.close()


@contextmanager
def cut(address: str, *, ready: Callable[[], object] = lambda: None, **limits: int) -> Iterator[Proxy]:
    proxy = Proxy(address, ready=ready, **limits)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A LoRA of several chunks."""
    path = tmp_path / "large.safetensors"
    write_kohya(path, random_factors("pocket", seed=int(time.time_ns() % 1_000_000_007), rank=80))
    assert path.stat().st_size > 3 * CHUNK
    return path


def header(path: Path, name: str, **more: object) -> catalog_pb2.CheckInHeader:
    told = {"request_id": str(uuid.uuid4()), "size_bytes": path.stat().st_size} | more
    return catalog_pb2.CheckInHeader(name=name, **told)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def refused(call: Callable[[], object], code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert message in caught.value.details()
    assert caught.value.code() is code


def test_a_check_in_goes_on_where_it_was_cut(server: Running, client: Client, large: Path) -> None:
    seen: list[int] = []
    incoming = server.catalog.blobs.incoming

    def arrived() -> None:
        wait_for(lambda: any(path.stat().st_size >= CHUNK for path in incoming.iterdir()))

    limits = {"upstream": 2 * CHUNK + 5000}
    with cut(server.address, ready=arrived, **limits) as proxy, Client(proxy.address) as atelier:
        answer = atelier.check_in(large, name="cut", progress=lambda done, _: seen.append(done))
    assert proxy.connections == 2
    assert proxy.upstream < large.stat().st_size + 1.5 * CHUNK  # what had arrived was not sent again
    assert answer.created
    assert answer.version.size_bytes == large.stat().st_size
    assert client.get("cut").version.digest == answer.version.digest
    assert client.get("cut").declared.file_name == "large.safetensors"


def test_what_arrived_is_told_and_gone_on_from(server: Running, client: Client, large: Path) -> None:
    told, data = header(large, "offset"), large.read_bytes()
    gone = threading.Event()

    def half() -> PARTS:
        yield catalog_pb2.CheckInRequest(header=told)
        yield catalog_pb2.CheckInRequest(chunk=data[:CHUNK])
        gone.wait(10)

    asked = catalog_pb2.GetUploadRequest(request_id=told.request_id)
    with grpc.insecure_channel(server.address) as channel:
        stub = stubs(channel)["catalog"]
        call = stub.CheckIn.future(half())
        wait_for(lambda: stub.GetUpload(asked).offset == CHUNK)
        with large.open("rb") as file:
            again = check_in_parts(file, told, None)
            refused(lambda: stub.CheckIn(again), grpc.StatusCode.ABORTED, "still being written to by another")
        call.cancel()
        gone.set()
        wait_for(lambda: not server.catalog.blobs._sessions)
        told.offset = 5
        with large.open("rb") as file:
            refused(
                lambda: stub.CheckIn(check_in_parts(file, told, None)),
                grpc.StatusCode.ABORTED,
                f"{CHUNK} bytes of this upload are here, not 5",
            )
        assert stub.GetUpload(asked).offset == CHUNK  # a wrong offset takes nothing away
        answer = client.check_in(large, name="offset", request_id=told.request_id)
        assert answer.created
        done = stub.GetUpload(asked)
    assert (done.offset, done.version.name) == (0, "offset")


async def test_the_async_client_goes_on_too(server: Running, large: Path) -> None:
    name = str(uuid.uuid4())
    with server.catalog.blobs.upload(name) as upload, large.open("rb") as file:
        upload.write(file.read(CHUNK))
        upload.park()
    async with AsyncClient(server.address) as atelier:
        answer = await atelier.check_in(large, name="cut-async", request_id=name)
    assert answer.created


def test_cuts_survive_a_restart_and_too_many_or_too_old_do_not(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    for number in range(PARKED_LIMIT + 3):
        with store.upload(f"id-{number}") as upload:
            upload.write(b"half")
            upload.park()
    again = BlobStore(tmp_path)
    assert len(list(again.incoming.iterdir())) == PARKED_LIMIT
    with again.upload("id-66", offset=4) as upload:
        upload.write(b" and half")
        digest = upload.commit()
    assert b"".join(again.chunks(digest)) == b"half and half"
    with pytest.raises(Conflict, match="0 bytes of this upload are here, not 4"):
        again.upload("id-66", offset=4)
    with again.upload("id-65") as upload:  # from the start again
        upload.write(b"other")
        assert upload.size == 5


# Threat 14: a huge, slow or endless upload.
def test_upload_limits(
    server: Running, large: Path, tmp_path: Path, warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "FILE_LIMIT", 2 * CHUNK)
    monkeypatch.setattr(uploads, "UPLOADS_LIMIT", 1)
    data, wait = large.read_bytes(), threading.Event()
    with grpc.insecure_channel(server.address) as channel:
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)

        def sent(*parts: bytes, **told: object) -> object:
            first = catalog_pb2.CheckInRequest(header=header(large, "limits", **told))
            chunks = (catalog_pb2.CheckInRequest(chunk=part) for part in parts)
            return stub.CheckIn(iter([first, *chunks]))

        bad, full = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
        refused(lambda: sent(data), bad, f"the limit is {2 * CHUNK}")
        refused(lambda: sent(*[data[:CHUNK]] * 3, size_bytes=0), bad, "the file is larger than")
        refused(lambda: sent(data[:10], size_bytes=9), bad, "the file is larger than 9 bytes")
        refused(lambda: sent(data[:10], size_bytes=11, request_id=""), bad, "has 11 bytes, 10 came")
        refused(lambda: sent(b"", size_bytes=-1), bad, "the file has -1 bytes")
        refused(lambda: sent(b"x", size_bytes=0, request_id="", offset=3), bad, "an offset goes with")
        monkeypatch.setattr(uploads, "CHUNK_LIMIT", 100)
        refused(lambda: sent(data[:101], size_bytes=0), bad, "a chunk has 101 bytes, the limit is 100")
        monkeypatch.setattr(server.catalog.blobs, "spare", 1 << 60)
        refused(lambda: sent(b"x", size_bytes=1), full, "the server's disk")
        refused(lambda: sent(b"x", triggers=["{x}"]), bad, "is no trigger")  # before any byte is looked at
        monkeypatch.setattr(server.catalog.blobs, "spare", 0)
        wrong = catalog_pb2.CheckInRequest(digest="sha256:" + "0" * 64)
        first = catalog_pb2.CheckInRequest(header=header(large, "limits", size_bytes=1))
        chunk = catalog_pb2.CheckInRequest(chunk=b"x")
        refused(lambda: stub.CheckIn(iter([first, chunk, wrong])), bad, "it was damaged on the way")
        refused(
            lambda: stub.CheckIn(iter([first, wrong, chunk])), bad, "only chunks may follow, then a digest"
        )
    assert list(server.catalog.blobs.incoming.iterdir()) == []

    def slow() -> PARTS:
        yield catalog_pb2.CheckInRequest(header=header(large, "slow", size_bytes=0, request_id="slow-one"))
        yield catalog_pb2.CheckInRequest(chunk=data[:100])
        wait.wait(20)

    monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.5)
    with serving(tmp_path / "data", warm) as running, grpc.insecure_channel(running.address) as channel:
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)
        call = stub.CheckIn.future(slow())
        wait_for(lambda: any(running.catalog.blobs.incoming.iterdir()))
        other = catalog_pb2.CheckInRequest(header=header(large, "second", size_bytes=1))
        refused(lambda: stub.CheckIn(iter([other])), full, "1 check-ins are under way")
        refused(call.result, grpc.StatusCode.DEADLINE_EXCEEDED, "go on from byte 100")
        asked = catalog_pb2.GetUploadRequest(request_id="slow-one")
        assert stub.GetUpload(asked).offset == 100
        wait.set()


def test_a_download_goes_on_where_it_was_cut(server: Running, client: Client, large: Path) -> None:
    client.check_in(large, name="down")
    out = large.with_name("down.safetensors")
    with cut(server.address, downstream=2 * CHUNK) as proxy, Client(proxy.address) as atelier:
        atelier.download("down", out)
    assert proxy.connections == 2
    assert out.read_bytes() == large.read_bytes()
    assert [path.name for path in large.parent.glob(".*")] == []


def test_a_download_that_gave_up_is_gone_on_with_by_the_next(
    server: Running, client: Client, large: Path
) -> None:
    digest = client.check_in(large, name="down-again").version.digest
    out, data = large.with_name("again.safetensors"), large.read_bytes()
    part = large.with_name(f".again.safetensors.{digest[7:19]}.part")
    part.write_bytes(data[:CHUNK])
    first: list[int] = []
    client.download("down-again", out, progress=lambda done, _: first.append(done))
    assert first[0] > CHUNK
    assert out.read_bytes() == data
    part.write_bytes(b"x" * CHUNK)  # of something else: never trusted
    with pytest.raises(AtelierError, match="arrived damaged; download it again"):
        client.download("down-again", out)
    assert not part.exists()
    client.download("down-again", out)
    assert out.read_bytes() == data


def test_an_offset_beyond_the_file_is_refused(server: Running, client: Client, lora: Path) -> None:
    client.check_in(lora, name="beyond")
    with grpc.insecure_channel(server.address) as channel:
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)
        asked = catalog_pb2.DownloadRequest(ref="beyond", offset=1 << 40)
        refused(lambda: list(stub.Download(asked)), grpc.StatusCode.INVALID_ARGUMENT, "is not within the")


def test_a_call_cut_while_its_version_is_made_harms_nothing(
    server: Running, client: Client, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that makes the version goes on; the retry of the same id must not get at its file."""
    told, real = header(large, "cut-late"), os.fsync
    slow = threading.Event()

    def fsync(descriptor: int) -> None:
        if not slow.is_set():
            slow.set()
            time.sleep(1.0)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with grpc.insecure_channel(server.address) as channel, large.open("rb") as file:
        stub = stubs(channel)["catalog"]
        call = stub.CheckIn.future(check_in_parts(file, told, None))
        assert slow.wait(20)
        call.cancel()
        answer = client.check_in(large, name="cut-late", request_id=str(uuid.uuid4()))
        short = catalog_pb2.CheckInRequest(chunk=b"x" * 5000)
        with pytest.raises(grpc.RpcError) as caught:
            stub.CheckIn(iter([catalog_pb2.CheckInRequest(header=told), short]))
        assert caught.value.code() in {grpc.StatusCode.ABORTED, grpc.StatusCode.INVALID_ARGUMENT}
    wait_for(lambda: not server.catalog.blobs._sessions)
    assert server.catalog.blobs.verified(answer.version.digest)
    (version,) = client.history("cut-late")
    assert version.digest == answer.version.digest


def test_two_downloads_of_one_file_do_not_mix(server: Running, client: Client, large: Path) -> None:
    digest = client.check_in(large, name="twice").version.digest
    out = large.with_name("twice.safetensors")
    part = large.with_name(f".twice.safetensors.{digest[7:19]}.part")
    with part.open("a+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(AtelierError, match="is being downloaded already") as caught:
            client.download("twice", out)
    assert caught.value.code is grpc.StatusCode.ABORTED
    part.write_bytes(b"x" * (large.stat().st_size + 1))  # too long to be of it
    client.download("twice", out)
    assert out.read_bytes() == large.read_bytes()
