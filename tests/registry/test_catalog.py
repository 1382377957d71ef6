"""Versions are immutable and numbered, aliases move by compare-and-set, nothing is half there."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry.catalog import Catalog
from registry.errors import Conflict, InvalidName, Locked, NotFound
from registry.records import Version


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "data")
    yield opened
    opened.close()


def add(catalog: Catalog, data: bytes, name: str = "hero", **more: object) -> tuple[Version, bool]:
    with catalog.blobs.upload() as upload:
        upload.write(data)
        return catalog.add(upload, name=name, **{"kind": "lora", "facts": {"rank": 4}, **more})  # type: ignore[arg-type]


def test_versions_count_from_one_and_every_reference_finds_them(catalog: Catalog) -> None:
    first, created = add(catalog, b"one", alias="stable")
    second, _ = add(catalog, b"two")
    assert created
    assert (first.ref, second.ref) == ("hero:1", "hero:2")
    assert catalog.resolve("hero").ref == "hero:2"
    assert catalog.resolve("hero:1").digest == first.digest
    assert catalog.resolve("hero@stable").ref == "hero:1"
    assert catalog.resolve(second.digest).ref == "hero:2"
    assert catalog.resolve("hero:1").aliases == ("stable",)
    assert [v.number for v in catalog.history("hero")] == [2, 1]
    assert b"".join(catalog.blobs.chunks(first.digest)) == b"one"


def test_the_same_bytes_and_card_are_the_same_version_another_card_is_a_new_one(catalog: Catalog) -> None:
    add(catalog, b"one", card=b"# Hero")
    again, created = add(catalog, b"one", card=b"# Hero")
    assert (again.ref, created) == ("hero:1", False)
    other, created = add(catalog, b"one", card=b"# Hero!")
    assert (other.ref, created) == ("hero:2", True)
    assert catalog.card(again) == b"# Hero"
    assert [v.ref for v in catalog.with_digest(again.digest)] == ["hero:1", "hero:2"]


def test_idempotent_checkin(catalog: Catalog) -> None:
    first, _ = add(catalog, b"one", request_id="r1")
    again, created = add(catalog, b"one", request_id="r1")
    assert (again.ref, created) == (first.ref, False)
    with pytest.raises(Conflict):
        add(catalog, b"one", name="other", request_id="r1")
    with pytest.raises(Conflict, match="of other bytes"):
        add(catalog, b"two", request_id="r1")
    assert [v.ref for v in catalog.newest()] == ["hero:1"]


def test_two_writers_one_wins(catalog: Catalog) -> None:
    for data in (b"one", b"two", b"three"):
        add(catalog, data)
    assert catalog.set_alias("hero", "stable", 1, expected=0)[1] == 0

    def move(number: int) -> str:
        try:
            return catalog.set_alias("hero", "stable", number, expected=1)[0].ref
        except Conflict as conflict:
            return str(conflict)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(move, (2, 3)))
    winner = catalog.resolve("hero@stable").ref
    assert winner in answers
    assert sum("as you thought" in answer for answer in answers) == 1


def test_concurrent_check_ins_leave_no_gap(catalog: Catalog) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add(catalog, b"%d" % i), range(40)))
    assert [v.number for v in catalog.history("hero")] == list(range(40, 0, -1))


def test_what_is_not_there_is_said_with_where_to_look(catalog: Catalog) -> None:
    add(catalog, b"one")
    for ref in ("nobody", "hero:2", "hero@stable", "sha256:" + "0" * 64):
        with pytest.raises(NotFound, match="atelier"):
            catalog.resolve(ref)
    with pytest.raises(NotFound):
        catalog.set_alias("hero", "stable", 7)


def test_a_refused_check_in_leaves_no_row(catalog: Catalog) -> None:
    add(catalog, b"one")
    with pytest.raises(InvalidName):
        add(catalog, b"two", name="../x")
    with pytest.raises(InvalidName):
        add(catalog, b"two", alias="no spaces")
    with pytest.raises(Conflict, match="another name"):
        add(catalog, b"two", kind="textual_inversion")
    assert [v.ref for v in catalog.newest()] == ["hero:1"]
    assert len(catalog.history("hero")) == 1


def test_assets_are_listed_by_name_in_pages(catalog: Catalog) -> None:
    for name in ("c", "a", "b"):
        add(catalog, b"one", name=name)
        add(catalog, b"two", name=name)
    assert [v.ref for v in catalog.newest(limit=2)] == ["a:2", "b:2"]
    assert [v.ref for v in catalog.newest(after="b")] == ["c:2"]


def test_everything_is_there_after_a_restart_and_the_database_is_sound(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    version, _ = add(catalog, b"one", card=b"card", alias="stable", recipe={"method": "svd"})
    catalog.close()
    again = Catalog(tmp_path)
    assert again.resolve("hero@stable") == version
    again.close()
    connection = sqlite3.connect(tmp_path / "catalog.db")
    assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_single_owner(catalog: Catalog, tmp_path: Path) -> None:
    script = "import sys, pathlib; from registry.catalog import Catalog; Catalog(pathlib.Path(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "data"], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "in use by another process" in result.stderr
    with pytest.raises(Locked):
        Catalog(tmp_path / "data")
