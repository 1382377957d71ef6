"""Places are in the order of names, whatever names come and go in whatever order, and each finds its own."""

import random
import sqlite3
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.places import END, place
from registry.writer import Writer

NAMES = st.lists(st.text(alphabet="ab.", min_size=1, max_size=12), unique=True, max_size=40)


class Shelf:
    """The two tables as the schema has them, and names put there; counts the rows that were moved."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("create table heads (place integer primary key, name text unique)")
        self.connection.execute("create virtual table search using fts5(words)")
        self.moved = 0
        self.connection.set_trace_callback(self.count)
        self.db = Writer(self.connection)

    def count(self, statement: str) -> None:
        self.moved += statement.startswith("update heads")

    def put(self, name: str) -> None:
        found = place(self.db, name)
        self.db.insert("heads", {"place": found, "name": name})
        self.db.insert("search", {"rowid": found, "words": f"every n{name.encode().hex()}"})

    def take(self, name: str) -> None:
        (row,) = self.db.query("select place from heads where name = ?", name)
        self.db.execute("delete from heads where place = ?", row["place"])
        self.db.execute("delete from search where rowid = ?", row["place"])

    def check(self, names: set[str]) -> None:
        rows = self.db.query("select place, name from heads order by place")
        assert [row["name"] for row in rows] == sorted(names)
        assert all(0 < row["place"] < END for row in rows)
        found = self.db.query("select rowid as place from search where search match 'every' order by rowid")
        assert [row["place"] for row in found] == [row["place"] for row in rows]
        for row in rows:
            match = f'"n{row["name"].encode().hex()}"'
            (own,) = self.db.query("select rowid as place from search where search match ?", match)
            assert own["place"] == row["place"]


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    found = Shelf()
    yield found
    found.connection.close()


@settings(max_examples=200, deadline=None)
@given(coming=NAMES, going=st.sets(st.integers(0, 39)))
def test_any_names_in_any_order(coming: list[str], going: set[int]) -> None:
    shelf, there = Shelf(), set[str]()
    for number, name in enumerate(coming):
        shelf.put(name)
        there.add(name)
        if number in going:
            gone = min(there)
            shelf.take(gone)
            there.remove(gone)
    shelf.check(there)
    shelf.connection.close()


ORDERS: dict[str, Callable[[list[str]], list[str]]] = {
    "upwards": lambda names: names,
    "downwards": lambda names: names[::-1],
    "to the middle": lambda names: [
        name for pair in zip(names, names[:10:-1], strict=False) for name in pair
    ],
    "shuffled": lambda names: random.Random(3).sample(names, len(names)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("between", [True, False])
def test_long_runs_into_one_gap_move_few_others(shelf: Shelf, order: str, between: bool) -> None:
    there = {"a", "z"} if between else set()
    for name in sorted(there):
        shelf.put(name)
    for name in dict.fromkeys(ORDERS[order]([f"m-{number:05}" for number in range(1500)])):
        shelf.put(name)
        there.add(name)
    shelf.check(there)
    assert shelf.moved < 10 * len(there)
    if order == "shuffled" or (not between and order != "to the middle"):
        assert shelf.moved == 0
    elif between:
        assert shelf.moved > 0  # or this has tested nothing
