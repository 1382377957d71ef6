"""The content-addressed store: `blobs/sha256/ab/cdef…` (read-only), uploads in `tmp/`.

Durable write, in order, as restic's local backend does it: write a temporary file in the same file system,
fsync it, rename it into place, fsync the directory. Invariant: a file under `blobs/` is complete and its name
is its sha256.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from registry.errors import Damaged

CHUNK = 1 << 20


class Upload:
    """Bytes on their way in. As a context manager it leaves nothing behind unless `commit` was called."""

    def __init__(self, store: "BlobStore") -> None:
        self._store = store
        self._hash = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(dir=store.incoming)
        self._file = os.fdopen(descriptor, "wb")
        self.path = Path(name)
        self.size = 0

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def finish(self) -> str:
        """Flushes what was written, so that `path` can be read; the digest of it, `sha256:<hex>`."""
        self._file.flush()
        return f"sha256:{self._hash.hexdigest()}"

    def commit(self) -> str:
        """Makes the bytes a durable blob; its digest."""
        digest = self.finish()
        target = self._store.path(digest)
        os.fsync(self._file.fileno())
        self._file.close()
        for directory in (target.parent.parent, target.parent):
            if not directory.exists():
                directory.mkdir(exist_ok=True)
                fsync_directory(directory.parent)
        self.path.chmod(0o444)
        os.replace(self.path, target)
        fsync_directory(target.parent)
        return digest

    def __enter__(self) -> "Upload":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:  # closing flushes, and a full disk fails there
            self.path.unlink(missing_ok=True)


class BlobStore:
    """Files named by what they contain."""

    def __init__(self, root: Path, *, owned: bool = True) -> None:
        self._blobs = root / "blobs" / "sha256"
        self.incoming = root / "tmp"
        if not owned:
            return
        self._blobs.mkdir(parents=True, exist_ok=True)
        self.incoming.mkdir(exist_ok=True)
        for directory in (self._blobs.parent, root, root.parent):
            fsync_directory(directory)
        for left_over in self.incoming.iterdir():  # of a process that died: nobody else owns this directory
            left_over.unlink()

    @classmethod
    def existing(cls, root: Path) -> "BlobStore":
        """A store to read from, whoever owns it; nothing in it is touched."""
        return cls(root, owned=False)

    def upload(self) -> Upload:
        """A new upload."""
        return Upload(self)

    def path(self, digest: str) -> Path:
        """Where the blob `sha256:<hex>` is, or would be."""
        hex_digits = digest.removeprefix("sha256:")
        return self._blobs / hex_digits[:2] / hex_digits[2:]

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every blob's digest, with what the file system says of it."""
        for directory in sorted(self._blobs.iterdir()) if self._blobs.is_dir() else ():
            for path in sorted(directory.iterdir()):
                yield f"sha256:{directory.name}{path.name}", path.stat()

    def remove(self, digest: str) -> None:
        """Takes a blob away for good."""
        self.path(digest).unlink(missing_ok=True)

    def chunks(self, digest: str) -> Iterator[bytes]:
        """The blob's bytes in pieces of 1 MiB; raises Damaged at the end if they are not its own."""
        path, seen = self.path(digest), hashlib.sha256()
        try:
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    seen.update(data)
                    yield data
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
