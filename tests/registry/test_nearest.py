"""What is near a version is found in memory as it would be among the rows, whatever was added, deleted,
brought back, purged, given up or read after a restart.
"""

import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from registry.catalog import Catalog
from registry.errors import RegistryError
from registry.nearest import Nearby, Projection
from registry.records import Version

WIDTH = 8


def vector(*numbers: float) -> bytes:
    return np.array(numbers, np.float32).tobytes()


def add(
    catalog: Catalog, name: str, projection: Projection | None, data: bytes = b"", **more: str
) -> Version:
    with catalog.blobs.upload() as upload:
        upload.write(data or name.encode())
        return catalog.add(upload, name=name, kind="lora", facts={}, projection=projection, **more)[0]  # type: ignore[arg-type]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "data")
    yield opened
    opened.close()


def test_near_in_memory_is_near_among_the_rows(tmp_path: Path) -> None:
    rng, catalog = random.Random(4), Catalog(tmp_path / "data")
    there: dict[str, tuple[str, list[float]]] = {}  # by reference, what is kept with it
    gone: dict[str, tuple[str, list[float]]] = {}

    def wanted(ref: str) -> list[tuple[str, float]]:
        space, own = there[ref]
        cosines = [
            (other, float(np.dot(own, v) / np.linalg.norm(own) / np.linalg.norm(v)))
            for other, (of, v) in there.items()
            if other != ref and of == space and any(v) and any(own)
        ]
        return sorted(((o, c) for o, c in cosines if c >= 0.1), key=lambda pair: -pair[1])[:5]

    compared = 0
    for turn in range(400):
        action = rng.random()
        if action < 0.6 or len(there) < 3:
            space, own = rng.choice(["a", "b"]), [rng.uniform(-1, 1) for _ in range(WIDTH)]
            if rng.random() < 0.1:
                own = [0.0] * WIDTH
            found = add(catalog, rng.choice("xyz"), Projection(space, vector(*own)), b"%d" % turn)
            there[found.ref] = space, own
        elif action < 0.75:
            ref = rng.choice(list(there))
            catalog.delete(ref)
            gone[ref] = there.pop(ref)
        elif action < 0.9 and gone:
            ref = rng.choice(list(gone))
            catalog.undelete(ref)
            there[ref] = gone.pop(ref)
        elif action < 0.93:
            catalog.collect_garbage(retention=timedelta(), grace=timedelta())
            gone.clear()
        elif action < 0.96:
            ref = rng.choice(list(there))
            there[ref] = (there[ref][0], [rng.uniform(-1, 1) for _ in range(WIDTH)])
            catalog.project(catalog.resolve(ref), Projection(there[ref][0], vector(*there[ref][1])))
        else:
            catalog.close()
            catalog = Catalog(tmp_path / "data")
        ref = rng.choice(list(there))
        near = catalog.nearest(catalog.resolve(ref), at_least=0.1, limit=5)
        assert [version.ref for version, _ in near] == [other for other, _ in wanted(ref)]
        assert [cosine for _, cosine in near] == pytest.approx([c for _, c in wanted(ref)], abs=1e-5)
        compared += len(near)
    assert compared > 400
    catalog.close()


def test_a_check_in_that_is_given_up_is_near_nothing(catalog: Catalog, tmp_path: Path) -> None:
    first = add(catalog, "first", Projection("a", vector(1, 0)))
    add(catalog, "third", Projection("a", vector(1, 0.5)))
    assert len(catalog.nearest(first, at_least=0.5, limit=9)) == 1
    with closing(sqlite3.connect(tmp_path / "data" / "catalog.db")) as other:
        other.execute("create trigger full before insert on requests begin select raise(abort, 'full'); end")
    with pytest.raises(sqlite3.IntegrityError, match="full"):
        add(catalog, "second", Projection("a", vector(1, 0)), request_id="r")
    catalog.set_alias("first", "stable", 1)  # the next that is committed
    assert [version.ref for version, _ in catalog.nearest(first, at_least=0.5, limit=1)] == ["third:1"]


@pytest.mark.parametrize("bad", [b"", vector(0, 0), vector(np.nan, 1), vector(np.inf, 1), vector(1, 2, 3)])
def test_a_vector_that_cannot_be_compared_is_near_nothing(catalog: Catalog, bad: bytes) -> None:
    first, other = (
        add(catalog, "first", Projection("a", vector(1, 0))),
        add(catalog, "b", Projection("a", bad)),
    )
    assert catalog.nearest(first, at_least=-1, limit=9) == catalog.nearest(other, at_least=-1, limit=9) == []


def test_check_ins_while_another_reads_all_are_all_found(tmp_path: Path) -> None:
    catalog, stop = Catalog(tmp_path / "data"), threading.Event()
    first = add(catalog, "n", Projection("a", vector(1, 0)))

    def work(number: int) -> None:
        for turn in range(30):
            try:
                add(catalog, "n", Projection("a", vector(1, 0)), b"%d %d" % (number, turn))
                catalog.nearest(first, at_least=0.9, limit=9)
            except RegistryError:
                stop.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not stop.is_set()
    near = catalog.nearest(first, at_least=0.9, limit=1000)
    assert sorted(version.number for version, _ in near) == list(range(2, 122))
    catalog.close()


def test_what_is_told_while_all_is_read_counts_once() -> None:
    loaded = [(1, "a", vector(1, 0)), (2, "a", vector(1, 0.1))]
    nearby = Nearby(lambda: loaded)
    nearby.add(2, Projection("a", vector(1, 0.1)))
    nearby.remove(7)
    assert [near.version for near in nearby.nearest(1, at_least=0, limit=9)] == [2]
    nearby.add(2, Projection("a", vector(0, 1)))
    nearby.add(2, Projection("a", vector(0, 1)))
    assert [(n.version, n.cosine) for n in nearby.nearest(1, at_least=0, limit=9)] == [(2, 0.0)]


def test_thousands_are_held_and_go_one_by_one() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5000, WIDTH)).astype(np.float32)
    nearby = Nearby(list)
    nearby.nearest(0, at_least=0, limit=1)
    for row, own in enumerate(vectors):
        nearby.add(row, Projection("a", own.tobytes()))
    left = sorted(rng.choice(5000, 700, replace=False).tolist())
    for row in sorted(set(range(5000)) - set(left), key=lambda row: row * 7919 % 5003):
        nearby.remove(row)
    units = vectors[left] / np.linalg.norm(vectors[left], axis=1, keepdims=True)
    order = np.argsort(-(units @ units[0]), kind="stable")[1:11]
    assert [near.version for near in nearby.nearest(left[0], at_least=-1, limit=10)] == [
        left[i] for i in order
    ]
