"""Pictures until they are read: in memory as long as all of them together have room there, else in files.

Who reads slowly, or not at all, thus costs no memory, and nothing is dropped. Files are written by a thread
of their own, those of the oldest pictures first, and go with their picture; what a killed server leaves in
`tmp/` goes at the next start (`registry.blobs`). Beyond LIMIT bytes, or when the disk does not take them,
nobody new is let in (`server.scheduler`).
"""

import itertools
import logging
import os
import tempfile
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MEMORY, LIMIT = 512 << 20, 4 << 30
"""Bytes in memory, and in all, with what jobs hold for callers who ask for the same (`server.job`)."""
Bytes = NDArray[np.uint8]
log = logging.getLogger("atelier")


class Spooled:
    """An array, of a picture or the bytes of a PNG, wherever it is."""

    def __init__(self, data: Bytes) -> None:
        self.nbytes, self._shape = data.nbytes, data.shape
        self._data: Bytes | None = data
        self._path = Path()

    def array(self) -> Bytes:
        """All of it. Raises OSError."""
        data = self._data
        return np.fromfile(self._path, np.uint8).reshape(self._shape) if data is None else data

    def part(self, start: int, stop: int) -> bytes:
        """Some of its bytes. Raises OSError."""
        if (data := self._data) is not None:
            return data.reshape(-1)[start:stop].tobytes()
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def __bytes__(self) -> bytes:
        return self.part(0, self.nbytes)

    def write(self, path: Path) -> None:
        """Goes into a file, and out of memory. Raises OSError."""
        assert self._data is not None
        self._data.tofile(path)
        self._path, self._data = path, None  # in this order: whoever reads finds one or the other


class Spool:
    """Counts what is there, and writes what is too much. Safe to use from several threads."""

    def __init__(self, directory: Path | None = None, *, memory: int = MEMORY, limit: int = LIMIT) -> None:
        self._directory, self._memory, self._limit = directory, memory, limit
        self._mutex, self._keys = threading.Lock(), itertools.count()
        self._inside: OrderedDict[int, weakref.ref[Spooled]] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._inside_bytes = self._bytes = 0
        self._gone: deque[int] = deque()  # wherever Python collects garbage, also while the mutex is held
        self._writer, self._writing = ThreadPoolExecutor(1, "spool"), False

    def put(self, data: Bytes) -> Spooled:
        """Keeps it as long as somebody holds what is returned. Never waits for the disk."""
        spooled = Spooled(data)
        with self._mutex:
            self._settle()
            key = next(self._keys)
            self._inside[key], self._sizes[key] = weakref.ref(spooled), spooled.nbytes
            self._inside_bytes += spooled.nbytes
            self._bytes += spooled.nbytes
            weakref.finalize(spooled, self._gone.append, key)
            if self._inside_bytes > self._memory and not self._writing:
                self._writing = True
                self._writer.submit(self._write)
        return spooled

    def held(self) -> tuple[int, int]:
        """Bytes in memory, and in all."""
        with self._mutex:
            self._settle()
            return self._inside_bytes, self._bytes

    def full(self) -> bool:
        """Whether nothing more should come."""
        inside, everywhere = self.held()
        return everywhere > self._limit or inside > 2 * self._memory

    def _settle(self) -> None:
        while self._gone:
            key = self._gone.popleft()
            size = self._sizes.pop(key)
            self._bytes -= size
            if self._inside.pop(key, None):
                self._inside_bytes -= size

    def _write(self) -> None:
        while oldest := self._too_much():
            key, spooled = oldest
            try:
                descriptor, name = tempfile.mkstemp(dir=self._directory)
                os.close(descriptor)
                gone = weakref.finalize(spooled, Path(name).unlink, missing_ok=True)
                try:
                    spooled.write(Path(name))
                except OSError:
                    gone()
                    raise
            except OSError as error:
                log.error("pictures that wait to be read stay in memory: %s", error)
                self._writing = False  # the next that comes tries again
                return
            with self._mutex:
                del self._inside[key]
                self._inside_bytes -= spooled.nbytes

    def _too_much(self) -> tuple[int, Spooled] | None:
        """The oldest in memory, where there is too much of them."""
        with self._mutex:
            self._settle()
            alive = ((key, spooled) for key, ref in self._inside.items() if (spooled := ref()))
            found = next(alive, None) if self._inside_bytes > self._memory else None
            self._writing = found is not None
            return found
