"""The Nth call to the file system fails, for every N: state as before, nothing left over, and it works the
next time.
"""

import errno
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from registry import blobs, keeping
from registry.catalog import Catalog


class Failing:
    """A system call of which the `nth` fails as on a full disk."""

    def __init__(self, call: Callable[..., Any], nth: int) -> None:
        self.call, self.left = call, nth

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.call(*arguments, **more)


def add(catalog: Catalog, data: bytes) -> None:
    with catalog.blobs.upload() as upload:
        upload.write(data)
        catalog.add(upload, name="hero", kind="lora", facts={}, alias="stable")


@pytest.mark.parametrize("call", ["fsync", "replace", "open", "mkdir", "chmod"])
def test_fail_nth_syscall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    catalog = Catalog(tmp_path / "data")
    add(catalog, b"first")
    failures = 0
    for nth in range(1, 50):
        before = [(v.ref, v.digest, v.aliases) for v in catalog.history("hero")]
        with monkeypatch.context() as patched:
            failing = Failing(getattr(os, call), nth)
            patched.setattr(os, call, failing)
            try:
                add(catalog, b"data %d" % nth)
            except OSError:
                failures += 1
        if failing.left > 0:  # it was not called so often: every call has failed once
            break
        after = [(v.ref, v.digest, v.aliases) for v in catalog.history("hero")]
        assert after == before
        assert list(catalog.blobs.incoming.iterdir()) == []
        add(catalog, b"data %d" % nth)
        assert len(catalog.history("hero")) == len(before) + 1
    assert failing.left > 0
    assert failures >= {"fsync": 3, "replace": 1, "open": 1, "mkdir": 1, "chmod": 1}[call]
    catalog.close()
    report = keeping.verify(tmp_path / "data")
    assert report.sound


def test_a_collection_that_is_cut_leaves_nothing_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, at_once = Catalog(tmp_path / "data"), timedelta(0)
    for data in (b"first", b"second", b"third"):
        add(catalog, data)
    catalog.delete("hero:1")
    catalog.delete("hero:2")
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", Failing(os.unlink, 2))
        with pytest.raises(OSError, match="No space left"):
            catalog.collect_garbage(retention=at_once, grace=at_once)
    report = keeping.verify(tmp_path / "data")
    assert (report.sound, report.versions, len(report.orphans)) == (True, 1, 1)
    assert catalog.collect_garbage(retention=at_once, grace=at_once).orphans == report.orphans
    assert keeping.backup(tmp_path / "data", tmp_path / "copy").files == 1
    catalog.close()


@pytest.mark.parametrize("nth", range(1, 12))
def test_an_fsync_that_fails_while_a_large_file_comes_in_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Linux tells an error of the disk to one fsync only: the last would find nothing wrong."""
    catalog = Catalog(tmp_path / "data")
    monkeypatch.setattr(blobs, "SYNC", 1 << 16)
    monkeypatch.setattr(blobs, "SMALL", 1 << 14)
    piece, failing = b"x" * (1 << 15), Failing(os.fsync, nth)

    def bring() -> None:
        with catalog.blobs.upload() as upload:
            for _ in range(17):  # the rest is for `settle`
                upload.write(piece)
                upload._syncing.exception()  # waits: so many fsyncs each time
            upload.settle()
            catalog.add(upload, name="hero", kind="lora", facts={})

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="No space left"):
            bring()
    assert failing.left <= 0
    assert list(catalog.blobs.incoming.iterdir()) == []
    assert catalog.newest() == []
    bring()
    assert keeping.verify(tmp_path / "data").sound
    catalog.close()
