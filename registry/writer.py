"""The connection that writes, in rows of dictionaries: what `sqlite_utils` offers for that asks SQLite for
the table's columns and keys before each row, 0.02 to 0.07 ms where the row itself takes 0.002, and a check-in
writes a dozen.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Literal


class Writer:
    """Statements of one connection; transactions are its owner's."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def query(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
        """The rows."""
        cursor = self._connection.execute(sql, parameters)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def execute(self, sql: str, *parameters: object) -> None:
        """A statement without rows."""
        self._connection.execute(sql, parameters)

    def insert(
        self, table: str, row: Mapping[str, object], *, clash: Literal["abort", "ignore"] = "abort"
    ) -> None:
        """A new row; with `clash="ignore"` nothing when it is there."""
        marks = ", ".join("?" * len(row))
        self.execute(f"insert or {clash} into {table} ({', '.join(row)}) values ({marks})", *row.values())

    def upsert(self, table: str, row: Mapping[str, object], *, key: Sequence[str]) -> None:
        """A row, or other values of the one with this key, which stays where it is."""
        marks, keys = ", ".join("?" * len(row)), ", ".join(key)
        change = ", ".join(f"{name} = excluded.{name}" for name in row if name not in key)
        self.execute(
            f"insert into {table} ({', '.join(row)}) values ({marks}) on conflict ({keys})"
            f" do update set {change}",
            *row.values(),
        )
