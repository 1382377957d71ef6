"""Backups in bad company: a collection, another backup, a full disk; and what a copy has besides versions."""

import resource
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from registry import keeping
from registry.blobs import BlobStore
from registry.catalog import Catalog
from registry.errors import Conflict, Damaged
from registry.records import Version

AT_ONCE = timedelta(0)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "data")
    yield opened
    opened.close()


def add(catalog: Catalog, data: bytes, name: str = "hero", card: bytes = b"") -> Version:
    with catalog.blobs.upload() as upload:
        upload.write(data)
        return catalog.add(upload, name=name, kind="lora", facts={}, card=card)[0]


def test_a_backup_goes_on_when_a_collection_takes_what_it_would_copy(
    catalog: Catalog, tmp_path: Path
) -> None:
    for number in range(5):
        add(catalog, b"%d" % number, f"n{number}")
    for number in range(1, 5):
        catalog.delete(f"n{number}")

    def collect(done: int, total: int) -> None:
        catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)

    report = keeping.backup(tmp_path / "data", tmp_path / "copy", collect)
    assert (report.sound, report.versions) == (True, 1)
    copy = Catalog(tmp_path / "copy")
    assert copy.events() == catalog.events()
    copy.close()


def test_of_two_backups_to_one_place_the_second_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, b"one")
    begun, go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        begun.set()
        go_on.wait(60)

    reports: list[keeping.Report] = []
    first = threading.Thread(
        target=lambda: reports.append(keeping.backup(tmp_path / "data", tmp_path / "copy", wait))
    )
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(Conflict, match="is in use by another process"):
            keeping.backup(tmp_path / "data", tmp_path / "copy")
    finally:
        go_on.set()
        first.join()
    assert [report.sound for report in reports] == [True]


def test_a_full_disk_where_the_copy_goes_is_no_damage_of_the_catalog(
    catalog: Catalog, tmp_path: Path
) -> None:
    add(catalog, b"one", card=b"x" * (200 << 10))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, before[1]))
    try:
        with pytest.raises(OSError, match="disk"):
            keeping.backup(tmp_path / "data", tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert keeping.backup(tmp_path / "data", tmp_path / "copy").sound


def test_a_damaged_database_is_told_as_damage(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, b"one")
    keeping.backup(tmp_path / "data", tmp_path / "copy")
    for damaged in (b"", b"no database at all", (tmp_path / "copy" / "catalog.db").read_bytes()[:5000]):
        (tmp_path / "copy" / "catalog.db").write_bytes(damaged)
        with pytest.raises(Damaged, match="restore it from a backup"):
            keeping.verify(tmp_path / "copy")


def test_a_damaged_database_does_not_take_the_place_of_a_sound_one(catalog: Catalog, tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    add(catalog, b"one")
    catalog.close()
    keeping.backup(data, copy)
    with closing(sqlite3.connect(data / "catalog.db")) as database:
        (index,) = database.execute("select rootpage from sqlite_master where name like '%tensor_digest'")
        (size,) = database.execute("pragma page_size").fetchone()
    with (data / "catalog.db").open("r+b") as file:  # the index as one of an empty table
        file.seek((index[0] - 1) * size)
        file.write(bytes([10, 0, 0, 0, 0, *size.to_bytes(2), 0]))
    with pytest.raises(Damaged, match=r"missing from index .* the backup in .*copy stays as it was"):
        keeping.backup(data, copy)
    assert keeping.verify(copy).sound
    assert keeping.backup(data, tmp_path / "rest").database


def test_a_file_that_the_disk_does_not_give_is_corrupt_and_the_others_are_read(
    catalog: Catalog, tmp_path: Path
) -> None:
    first, second = add(catalog, b"one"), add(catalog, b"two")
    for version in (first, second):
        catalog.blobs.path(version.digest).unlink()
        catalog.blobs.path(version.digest).mkdir()
    assert keeping.verify(tmp_path / "data").corrupt == tuple(
        f"{version.ref} ({version.digest})" for version in sorted((first, second), key=lambda v: v.digest)
    )


def test_a_backup_leaves_out_what_is_damaged_and_says_so_again_and_again(
    catalog: Catalog, tmp_path: Path
) -> None:
    data, copy, restored = (tmp_path / name for name in ("data", "copy", "restored"))
    old, good, lost, changed, unread = (
        add(catalog, name.encode(), name) for name in ("old", "good", "lost", "changed", "unread")
    )
    catalog.blobs.path(lost.digest).unlink()
    catalog.blobs.path(unread.digest).unlink()
    catalog.blobs.path(unread.digest).mkdir()
    path = catalog.blobs.path(changed.digest)
    path.chmod(0o644)
    path.write_bytes(b"chanced")
    names = {version.digest: f"{version.ref} ({version.digest})" for version in (lost, changed, unread)}
    report = keeping.backup(data, copy)
    wrong = {lost.digest: "missing", changed.digest: "corrupt", unread.digest: "corrupt"}
    assert report.missing == tuple(f"{names[digest]}, {wrong[digest]} in {data}" for digest in sorted(names))
    assert (report.versions, report.files, report.corrupt, report.sound) == (5, 2, (), False)
    assert keeping.verify(copy).missing == tuple(names[digest] for digest in sorted(names))
    report = keeping.restore(copy, restored)
    assert report.missing == tuple(f"{names[digest]}, missing in {copy}" for digest in sorted(names))
    again = Catalog(restored)
    assert again.newest() == catalog.newest()
    for version in (old, good):
        assert b"".join(again.blobs.chunks(version.digest)) == version.name.encode()
    again.close()
    add(catalog, b"lost", "lost")
    assert [name.split()[0] for name in sorted(keeping.backup(data, copy).missing)] == [
        "changed:1",
        "unread:1",
    ]


def test_what_an_earlier_backup_has_stays_in_it_when_it_is_damaged_here(
    catalog: Catalog, tmp_path: Path
) -> None:
    first = add(catalog, b"one")
    keeping.backup(tmp_path / "data", tmp_path / "copy")
    second = add(catalog, b"two")
    for version in (first, second):
        path = catalog.blobs.path(version.digest)
        path.chmod(0o644)
        path.write_bytes(b"none")
    report = keeping.backup(tmp_path / "data", tmp_path / "copy")
    assert report.missing == (f"{second.ref} ({second.digest}), corrupt in {tmp_path / 'data'}",)
    assert BlobStore.existing(tmp_path / "copy").verified(first.digest).read_bytes() == b"one"


def test_what_is_damaged_in_a_backup_and_whole_here_is_copied_anew(catalog: Catalog, tmp_path: Path) -> None:
    both, here = add(catalog, b"one"), add(catalog, b"two")
    keeping.backup(tmp_path / "data", tmp_path / "copy")
    copies = BlobStore.existing(tmp_path / "copy")
    for path in (copies.path(both.digest), copies.path(here.digest), catalog.blobs.path(both.digest)):
        path.chmod(0o644)
        path.write_bytes(b"none")
    report = keeping.backup(tmp_path / "data", tmp_path / "copy")
    assert (report.corrupt, report.missing) == ((f"{both.ref} ({both.digest})",), ())
    assert copies.verified(here.digest).read_bytes() == b"two"


def test_what_jobs_start_from_is_kept_and_counts_as_no_version(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, b"one")
    files = {"image": b"i", "mask": b"m", "control0": b"c", "reference0": b"r"}
    job = catalog.jobs.create({}, creator="ann", inputs=files)
    catalog.jobs.add_image(job.name, 0, b"png")
    report = keeping.backup(tmp_path / "data", tmp_path / "copy")
    assert (report.versions, report.files) == (1, 6)


def test_a_catalog_made_of_a_copy_wants_the_same_tokens(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, b"one")
    (tmp_path / "data" / "tokens").write_text(f"ann admin {'0' * 64}\n")
    keeping.backup(tmp_path / "data", tmp_path / "copy")
    keeping.restore(tmp_path / "copy", tmp_path / "restored")
    kept = tmp_path / "restored" / "tokens"
    assert kept.read_bytes() == (tmp_path / "data" / "tokens").read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o600
