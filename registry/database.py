"""The catalog's database: one connection that writes, readers that nobody waits for, an event for every
change.

One process owns a data directory (`lock`); within it one connection writes and checkpoints, since SQLite
before 3.51.3 can damage a WAL that two do (the WAL-reset bug). Each reading thread has a connection of its
own that cannot write and sees the last commit.
"""

import fcntl
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from registry.errors import Locked
from registry.records import now
from registry.schema import upgrade
from registry.writer import Writer


class CatalogDatabase:
    """Opens `root/catalog.db`, making it if need be. Raises Locked when another process has the directory,
    InvalidFile when a later release has written it.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._lock_file = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise Locked(f"{root} is in use by another process; stop it, or choose another --data") from None
        self._path = root / "catalog.db"
        self._mutex, self._local = threading.Lock(), threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._listeners: list[Callable[[], object]] = []
        self._writer = sqlite3.connect(self._path, timeout=30, check_same_thread=False)
        try:
            for pragma in ("journal_mode=wal", "synchronous=full", "foreign_keys=on", "trusted_schema=off"):
                self._writer.execute(f"pragma {pragma}")
            upgrade(Database(self._writer), self._path)
        except BaseException:  # it is no database, or a damaged one
            self.close()
            raise
        self.tables = Writer(self._writer)
        """To write with, within `write`."""
        self._then: list[Callable[[], object]] = []

    def close(self) -> None:
        """Gives the directory back."""
        for connection in (*self._readers, self._writer):
            connection.close()
        self._lock_file.close()

    @contextmanager
    def write(self) -> Iterator[None]:
        """A transaction, alone; then what `then` was told is done, and the listeners are called."""
        # BEGIN IMMEDIATE: sqlite-utils' atomic() defers, and a deferred transaction fails when it upgrades.
        with self._mutex:
            self._writer.execute("begin immediate")
            self._local.writing = True
            try:
                yield
                self._writer.commit()
                for work in self._then:
                    work()
            except BaseException:
                self._writer.rollback()
                raise
            finally:
                self._local.writing = False
                self._then.clear()
        for listener in tuple(self._listeners):
            listener()

    def then(self, work: Callable[[], object]) -> None:
        """Within `write`: to be done once it is committed, before the next begins; never when it is not."""
        self._then.append(work)

    def query(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
        """Rows as they are now; within `write`, with its own changes."""
        if getattr(self._local, "writing", False):
            return self.tables.query(sql, *parameters)
        return [dict(row) for row in self._reader().execute(sql, parameters)]

    def _reader(self) -> sqlite3.Connection:
        reader: sqlite3.Connection | None = getattr(self._local, "reader", None)
        if reader is None:
            uri = f"{self._path.absolute().as_uri()}?mode=ro"
            reader = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
            reader.row_factory = sqlite3.Row
            self._local.reader = reader
            self._readers.append(reader)
        return reader

    def event(self, actor: str, action: str, name: str, number: int, detail: dict[str, Any]) -> None:
        """Says what happened, within `write`; `seq` counts from 1 without a gap."""
        told = json.dumps(detail, sort_keys=True)
        row = {
            "at": now(),
            "actor": actor,
            "action": action,
            "name": name,
            "number": number,
            "detail": told,
        }
        self.tables.insert("events", row)

    @contextmanager
    def listening(self, listener: Callable[[], object]) -> Iterator[None]:
        """Within, calls `listener` after every change, on the thread that made it."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)
