"""Body digests: nobody waits for them, and a server that was stopped goes on where it was."""

import hashlib
import threading
from pathlib import Path

import pytest

from atelier import views
from atelier.client import Client
from compose.warm import WarmPipeline
from registry.bodies import MISSING
from registry.catalog import Catalog
from tests.adapters import random_factors, write_kohya
from tests.conftest import serving
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
