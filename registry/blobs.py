"""The content-addressed store: `blobs/sha256/ab/cdef…` (read-only), uploads in `tmp/`.

Durable write, in order, as restic's local backend does it: write a temporary file in the same file system,
fsync it, rename it into place, fsync the directory. Invariant: a file under `blobs/` is complete and its name
is its sha256. An upload with a session may be cut and go on: what arrived is parked in `tmp/`, for a day.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from registry.errors import Conflict, Damaged
from registry.intake import Bytes

CHUNK = 1 << 20
SYNC, SMALL = 64 << 20, 4 << 20
"""Bytes of a large file between one fsync and the next while it comes in; a small one has but one."""
PARKED, PARKED_SECONDS, PARKED_LIMIT = "parked-", 86_400.0, 64
"""Cut uploads wait this long to be resumed, and this many of them: the oldest goes first."""
SPARE_BYTES = 256 << 20
"""Left free on the disk: the database must be able to grow, or nothing could even be deleted."""
_REST = re.compile(r"[0-9a-f]{62}")


class Upload:
    """Bytes on their way in. As a context manager it leaves nothing behind unless `commit` was called, or
    `park` and the upload has a session.
    """

    def __init__(self, store: "BlobStore", session: str = "", offset: int = 0) -> None:
        self._store, self._session, self._parked = store, session, False
        self._hash, self.size = hashlib.sha256(), 0
        self._synced, self._syncing = 0, Future[None]()
        self._syncing.set_result(None)
        self._syncer: ThreadPoolExecutor | None = None
        if session:
            self.path = store.parked(session)
            if self.path.exists():
                self.path.chmod(0o644)  # of a process that died between `chmod` and `replace`
                if offset:
                    self._rehash()
            if self.size != offset:
                raise Conflict(
                    f"{self.size} bytes of this upload are here, not {offset}; go on from there",
                    field="offset",
                )
            self._file = self.path.open("ab" if offset else "wb")
        else:
            descriptor, name = tempfile.mkstemp(dir=store.incoming)
            self._file, self.path = os.fdopen(descriptor, "wb"), Path(name)

    def _rehash(self) -> None:
        with self.path.open("rb") as file:
            while data := file.read(CHUNK):
                self._hash.update(data)
                self.size += len(data)

    def park(self) -> None:
        """Leaves what has arrived for the same session to go on with."""
        self._parked = bool(self._session)

    def write(self, data: Bytes) -> None:
        """Appends bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        if self.size - self._synced >= SYNC and self._syncing.done():
            self.settle()

    def settle(self) -> None:
        """Begins to make durable what was written, while something else is done with it; `commit` waits for
        that, and raises what it met.
        """
        self._syncing.result()
        if self.size - self._synced >= SMALL:
            self._file.flush()
            self._synced, self._syncer = self.size, self._syncer or ThreadPoolExecutor(1, "sync")
            self._syncing = self._syncer.submit(os.fsync, self._file.fileno())

    def finish(self) -> str:
        """Flushes what was written, so that `path` can be read; the digest of it, `sha256:<hex>`."""
        self._file.flush()
        return f"sha256:{self._hash.hexdigest()}"

    def commit(self) -> str:
        """Makes the bytes a durable blob; its digest. Raises OSError, also when the disk is nearly full."""
        digest = self.finish()
        self._store.check_room()
        target = self._store.path(digest)
        self._syncing.result()  # an error that one fsync has told, the next does not tell again
        os.fsync(self._file.fileno())
        self._file.close()
        self._store.make_directory(target.parent)
        self.path.chmod(0o444)
        os.replace(self.path, target)
        fsync_directory(target.parent)
        return digest

    def __enter__(self) -> "Upload":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = False
        try:
            if self._syncer:
                self._syncer.shutdown()
            self._file.close()
            kept = self._parked
        finally:  # closing flushes, and a full disk fails there
            if not kept:
                self.path.unlink(missing_ok=True)
            self._store.release(self._session)


class BlobStore:
    """Files named by what they contain, on a disk of which `spare` bytes are left for others."""

    def __init__(self, root: Path, *, owned: bool = True, spare: int = SPARE_BYTES) -> None:
        self._blobs = root / "blobs" / "sha256"
        self.incoming, self.spare = root / "tmp", spare
        self._sessions, self._guard = set[str](), threading.Lock()
        if not owned:
            return
        self._blobs.mkdir(parents=True, exist_ok=True)
        self.incoming.mkdir(exist_ok=True)
        for directory in (self._blobs.parent, root, root.parent):
            fsync_directory(directory)
        for left_over in self.incoming.iterdir():  # of a process that died: nobody else owns this directory
            if not left_over.name.startswith(PARKED):
                left_over.unlink()
        self._sweep()

    @classmethod
    def existing(cls, root: Path) -> "BlobStore":
        """A store to read from, whoever owns it; nothing in it is touched."""
        return cls(root, owned=False)

    def room(self) -> int:
        """Bytes that may still come in; below 0 when more are there already."""
        return shutil.disk_usage(self.incoming).free - self.spare

    def check_room(self) -> None:
        """Raises OSError as a full disk does when it nearly is one."""
        if self.room() < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_directory(self, directory: Path) -> None:
        """Makes a directory for blobs, durably before anybody puts one into it."""
        with self._guard:
            if not directory.exists():
                directory.mkdir()
                fsync_directory(directory.parent)

    def upload(self, session: str = "", offset: int = 0) -> Upload:
        """A new upload; with a session (a name its caller chose) one that `offset` bytes of may be here.

        Raises Conflict when another number of bytes is here, or the session is being written to now.
        """
        if not session:
            return Upload(self)
        with self._guard:
            if session in self._sessions:
                raise Conflict(
                    "this upload is still being written to by another call; wait for that, or choose another "
                    "request_id",
                    field="request_id",
                )
            self._sessions.add(session)
            self._sweep()
        try:
            return Upload(self, session, offset)
        except BaseException:
            self.release(session)
            raise

    def release(self, session: str) -> None:
        """The session is not being written to any more."""
        with self._guard:
            self._sessions.discard(session)

    def parked(self, session: str) -> Path:
        """Where the bytes of a session are, or would be; never named by what the caller chose."""
        return self.incoming / f"{PARKED}{hashlib.sha256(session.encode()).hexdigest()[:40]}"

    def parked_bytes(self, session: str) -> int:
        """How many bytes of a session are here."""
        path = self.parked(session)
        return path.stat().st_size if path.exists() else 0

    def _sweep(self) -> None:
        """Takes away parked uploads that are too old, or too many."""
        live = {self.parked(session) for session in self._sessions}
        parked = [path for path in self.incoming.glob(f"{PARKED}*") if path not in live]
        ages = sorted((time.time() - path.stat().st_mtime, path) for path in parked)
        for place, (age, path) in enumerate(ages):
            if place >= PARKED_LIMIT or age > PARKED_SECONDS:
                path.unlink()

    def path(self, digest: str) -> Path:
        """Where the blob `sha256:<hex>` is, or would be."""
        hex_digits = digest.removeprefix("sha256:")
        return self._blobs / hex_digits[:2] / hex_digits[2:]

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every blob's digest, with what the file system says of it; not what other programs left there, nor
        what goes meanwhile.
        """
        for directory in sorted(self._blobs.glob("[0-9a-f][0-9a-f]")):
            for path in sorted(directory.iterdir()):
                if not _REST.fullmatch(path.name):
                    continue
                try:
                    info = path.stat()
                except FileNotFoundError:
                    continue
                yield f"sha256:{directory.name}{path.name}", info

    def check_kept(self, digest: str) -> None:
        """To be asked before a row names a blob, alone. Raises Conflict: a collection without grace came
        between.
        """
        if not self.path(digest).exists():
            raise Conflict("the file was collected as garbage while it came in; send it again")

    def remove(self, digest: str) -> None:
        """Takes a blob away for good."""
        self.path(digest).unlink(missing_ok=True)

    def chunks(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """The blob's bytes from `offset` on, in pieces of up to 1 MiB; all of it is read, and Damaged raised
        at the end if the bytes are not its own.
        """
        path, seen, skip = self.path(digest), hashlib.sha256(), offset
        try:
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    seen.update(data)
                    if skip < len(data):
                        yield data[skip:]
                    skip = max(0, skip - len(data))
        except FileNotFoundError:
            raise Damaged(
                f"the file {digest} is missing from the catalog; restore it from a backup"
            ) from None
        if f"sha256:{seen.hexdigest()}" != digest:
            raise Damaged(f"the file {digest} was changed on disk; restore it from a backup")

    def verified(self, digest: str) -> Path:
        """The blob's path, after reading all of it; raises Damaged if the bytes are not its own."""
        for _ in self.chunks(digest):
            pass
        return self.path(digest)


def fsync_directory(directory: Path) -> None:
    """Makes renames and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
