"""Body digests: nobody waits for them, and a server that was stopped goes on where it was."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from atelier import views
from atelier.client import Client
from atelier.v1 import catalog_pb2, catalog_pb2_grpc
from compose.warm import WarmPipeline
from registry.bodies import MISSING
from registry.catalog import Catalog
from registry.digests import digests
from registry.headers import read_header
from server import catalog as catalog_service
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving
from tests.registry.test_catalog import add


def autov3(path: Path) -> str:
    data = path.read_bytes()
    return f"sha256:{hashlib.sha256(data[8 + int.from_bytes(data[:8], 'little') :]).hexdigest()}"


def known(client: Client, ref: str) -> str:
    """The body's digest, once the server knows it."""
    pause = threading.Event()
    for _ in range(600):
        if found := client.get(ref).version.body_digest:
            return found
        pause.wait(0.05)
    raise AssertionError("the server never read the body")


def test_a_version_is_given_its_body_s_digest_and_shows_it(client: Client, lora: Path) -> None:
    client.check_in(lora, name="body")
    assert known(client, "body") == autov3(lora)
    rows = dict(views._rows(client.get("body").version))
    assert rows["AutoV3"] == autov3(lora).removeprefix("sha256:")[:12]


def test_a_version_of_an_earlier_server_is_given_one_too(tmp_path: Path, warm: WarmPipeline) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=4))
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        client.check_in(tmp_path / "a", name="hero")
        known(client, "hero")
    catalog = Catalog(tmp_path / "data")
    with catalog.database.write():
        catalog.database.tables.execute("update versions set body_digest = ''")
    catalog.close()
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        assert known(client, "hero") == autov3(tmp_path / "a")


@contextmanager
def somebody_waits(server: Running) -> Iterator[None]:
    """For a check-in, so that nothing is read afterwards."""
    done = threading.Event()

    def parts() -> Iterator[catalog_pb2.CheckInRequest]:
        yield catalog_pb2.CheckInRequest(header=catalog_pb2.CheckInHeader(name="slow"))
        done.wait(60)

    with grpc.insecure_channel(server.address) as channel:
        call = catalog_pb2_grpc.CatalogServiceStub(channel).CheckIn.future(parts())
        while not any(server.catalog.blobs.incoming.iterdir()):
            done.wait(0.01)
        yield
        call.cancel()
        done.set()


def test_the_tensors_of_a_large_file_are_read_afterwards_unless_others_may_be_the_same(
    server: Running, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_service, "LARGE", 1)
    write_kohya(tmp_path / "a", random_factors("pocket", seed=77, rank=4))
    write_kohya(tmp_path / "b", random_factors("pocket", seed=77, rank=4), metadata={"ss_output_name": "b"})
    write_kohya(tmp_path / "c", random_factors("pocket", seed=78, rank=4))
    with somebody_waits(server):
        first = client.check_in(tmp_path / "a", name="large-a")
        assert first.version.tensor_digest == ""
        second = client.check_in(tmp_path / "b", name="large-b")
        assert list(second.same_tensors) == ["large-a:1"]
        assert second.version.tensor_digest == client.get("large-a").version.tensor_digest != ""
        alone = client.check_in(tmp_path / "c", name="large-c")
        assert (alone.version.tensor_digest, list(alone.same_tensors)) == ("", [])
    known(client, "large-c")
    stated = digests(tmp_path / "c", read_header(tmp_path / "c")).tensors
    assert client.get("large-c").version.tensor_digest == stated


def test_reading_a_body_gives_way_and_forgets_nothing(tmp_path: Path) -> None:
    catalog, data = Catalog(tmp_path), (4).to_bytes(8, "little") + b"head" + b"body" * 1000
    first, _ = add(catalog, data)
    add(catalog, data, name="twin")

    def stop() -> None:
        raise StopIteration

    with pytest.raises(StopIteration):
        catalog.bodies.find(first.digest, stop)
    assert catalog.bodies.missing() == [first.digest]
    found = catalog.bodies.find(first.digest)
    assert found == f"sha256:{hashlib.sha256(b'body' * 1000).hexdigest()}"
    assert [catalog.resolve(name).digests.body for name in ("hero", "twin")] == [found, found]
    assert catalog.bodies.missing() == []
    catalog.close()


def test_a_file_that_is_gone_is_left_to_verify(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    lost, _ = add(catalog, b"12345678 and so on")
    catalog.blobs.path(lost.digest).unlink()
    assert catalog.bodies.missing() == [lost.digest]
    assert catalog.bodies.find(lost.digest) == ""
    assert catalog.bodies.missing() == []
    add(catalog, b"12345678 and so on", name="again")
    assert catalog.bodies.missing() == [lost.digest]
    catalog.close()


def test_the_search_for_them_looks_at_no_other_version(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    (plan,) = catalog.database.query(
        f"explain query plan select distinct digest from versions where {MISSING}"
    )
    assert "idx_versions_no_body" in plan["detail"]
    catalog.close()
