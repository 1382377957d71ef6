"""What a check-in leaves to be done when nobody waits for one: the digests of bodies, and of the tensors of
large files (`registry.bodies`).
"""

import sqlite3
import threading

from registry.catalog import Catalog
from server.uploads import Uploads

PAUSE_SECONDS = 0.05


class Afterwards:
    """A thread that reads new files again between check-ins; after the next start it goes on where it was."""

    def __init__(self, catalog: Catalog, uploads: Uploads) -> None:
        self._catalog, self._uploads = catalog, uploads
        self._changed, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="afterwards", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._changed.set()
        self._thread.start()

    def stop(self) -> None:
        """Ends, within a piece of a file."""
        self._stopping.set()
        self._changed.set()
        self._thread.join()

    def _work(self) -> None:
        with self._catalog.listening(self._changed.set):
            while not self._stopping.is_set():
                self._changed.wait()
                self._changed.clear()
                try:
                    for digest in self._catalog.bodies.missing():
                        self._catalog.bodies.find(digest, self._give_way)
                except sqlite3.Error:
                    continue  # a full disk: after the next change, then
                except _Stopped:
                    return

    def _give_way(self) -> None:
        while self._uploads.busy and not self._stopping.wait(PAUSE_SECONDS):
            pass
        if self._stopping.is_set():
            raise _Stopped


class _Stopped(Exception):
    pass
