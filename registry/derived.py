"""What was computed from a version and can be computed again: files in the data directory, in nobody's way.

    DATA/derived/<kind>/<hex of the version's file>-<hex of what else it depends on, 16 digits>

Not in the database, not in backups; a file goes when the version's bytes do. A file is whole or not there.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path


class Derived:
    """The derived files of a data directory."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / "derived"

    def read(self, kind: str, digest: str, *, of: str) -> bytes | None:
        """What was kept for a file's digest and what else it depends on; None for nothing."""
        try:
            return self._path(kind, digest, of).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, kind: str, digest: str, data: bytes, *, of: str) -> None:
        """Keeps it, in the place of what was kept before. Raises OSError."""
        path = self._path(kind, digest, of)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def keep_only(self, digests: Iterable[str]) -> None:
        """Forgets what was made from any other file, and what a crash left half written."""
        kept = {digest.removeprefix("sha256:") for digest in digests}
        for path in self._root.glob("*/*"):
            if path.name.split("-")[0] not in kept and not self._fresh(path):
                path.unlink(missing_ok=True)

    @staticmethod
    def _fresh(path: Path) -> bool:
        """Whether a file may be on its way still."""
        return path.name.startswith(".") and time.time() - path.stat().st_mtime < 3600

    def _path(self, kind: str, digest: str, of: str) -> Path:
        other = hashlib.sha256(of.encode()).hexdigest()[:16]
        return self._root / kind / f"{digest.removeprefix('sha256:')}-{other}"
