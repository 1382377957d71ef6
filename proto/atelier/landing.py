"""Where a download arrives: `.NAME.<12 hex digits>.part` beside its place, and there only when it is whole.

What a cut download left is gone on from. One download at a time holds it.
"""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from atelier.messages import CHUNK, AtelierError, Progress
from atelier.v1 import catalog_pb2


class Landing:
    """Opens the partial file and reads what is there already. Raises AtelierError when another download holds
    it, OSError.
    """

    def __init__(self, version: catalog_pb2.Version, path: Path, *, progress: Progress | None = None) -> None:
        self._version, self._path, self._progress = version, path, progress
        self._part = path.with_name(f".{path.name}.{version.digest.removeprefix('sha256:')[:12]}.part")
        self._seen = hashlib.sha256()
        self._file = self._part.open("a+b")
        try:
            self._alone()
            if self._file.tell() > version.size_bytes:
                self._file.truncate(0)
            self._file.seek(0)
            while data := self._file.read(CHUNK):
                self._seen.update(data)
        except BaseException:
            self._file.close()
            raise

    def _alone(self) -> None:
        if fcntl:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AtelierError(
                    grpc.StatusCode.ABORTED, f"{self._path} is being downloaded already; wait for that"
                ) from None

    def request(self) -> catalog_pb2.DownloadRequest:
        """What asks for the rest."""
        ref = f"{self._version.name}:{self._version.number}"
        return catalog_pb2.DownloadRequest(ref=ref, offset=self._file.tell())

    def write(self, answer: catalog_pb2.DownloadResponse) -> None:
        """The next piece, when the answer has one."""
        if answer.HasField("version"):
            return
        chunk = answer.chunk  # every reading of it is a copy
        self._file.write(chunk)
        self._seen.update(chunk)
        if self._progress:
            self._progress(self._file.tell(), self._version.size_bytes)

    def finish(self) -> None:
        """Puts the whole file in its place. Raises AtelierError when it is not what it should be."""
        self._file.flush()
        if f"sha256:{self._seen.hexdigest()}" != self._version.digest:
            self._part.unlink()
            ref = f"{self._version.name}:{self._version.number}"
            raise AtelierError(grpc.StatusCode.DATA_LOSS, f"{ref} arrived damaged; download it again")
        if not fcntl:  # Windows moves no open file
            self._file.close()
        self._part.replace(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
