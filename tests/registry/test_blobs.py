"""The store: what is committed stays, what is not leaves nothing."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from registry.blobs import BlobStore
from registry.errors import Damaged


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_committed_upload_is_read_back_under_its_digest(store: BlobStore, tmp_path: Path) -> None:
    with store.upload() as upload:
        upload.write(b"abc")
        upload.write(b"def")
        digest = upload.commit()
    assert digest == "sha256:" + hashlib.sha256(b"abcdef").hexdigest()
    assert b"".join(store.chunks(digest)) == b"abcdef"
    assert files(tmp_path) == [store.path(digest)]


def test_an_abandoned_upload_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    with store.upload() as upload:
        upload.write(b"abc")
    assert files(tmp_path) == []


def test_what_a_dead_process_left_is_swept_at_the_next_start(store: BlobStore, tmp_path: Path) -> None:
    (store.incoming / "left-over").write_bytes(b"abc")
    BlobStore(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_nothing(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with store.upload() as upload:
        upload.write(b"abc")
        with pytest.raises(OSError, match="No space"):
            upload.commit()
    assert files(tmp_path) == []


def test_a_changed_or_missing_blob_is_reported(store: BlobStore) -> None:
    with store.upload() as upload:
        upload.write(b"abc")
        digest = upload.commit()
    store.path(digest).chmod(0o644)
    store.path(digest).write_bytes(b"abd")
    with pytest.raises(Damaged, match="changed"):
        list(store.chunks(digest))
    store.path(digest).unlink()
    with pytest.raises(Damaged, match="missing"):
        list(store.chunks(digest))


def test_a_disk_that_fills_while_the_file_is_closed_leaves_nothing(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = store.upload()
    upload.write(b"abc")
    close = upload._file.close

    class Full:
        def close(self) -> None:
            close()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(upload, "_file", Full())
    with pytest.raises(OSError, match="No space left"), upload:
        pass
    assert files(tmp_path) == []


def test_files_are_blobs_alone_whatever_comes_and_goes(store: BlobStore) -> None:
    digests, many = [], (b"%d" % number for number in range(5000))
    for data in [data for data in many if hashlib.sha256(data).hexdigest().startswith("00")][:3]:
        with store.upload() as upload:
            upload.write(data)
            digests.append(upload.commit())
    first, gone, last = sorted(digests)
    shelf = store.path(first).parent
    (shelf.parent / ".DS_Store").write_bytes(b"of another program")
    (shelf / "._resource").write_bytes(b"of another program")
    files = store.files()
    assert next(files)[0] == first
    store.remove(gone)
    assert [digest for digest, _ in files] == [last]
