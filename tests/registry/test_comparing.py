"""Who holds the same tensors is known in time, though the digests of large files' tensors come later."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.bodies import MAY_HOLD_THE_SAME
from registry.catalog import Catalog
from registry.digests import SAMPLE, Digests, DigestStream
from registry.headers import read_header
from registry.records import Version


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "data")
    yield catalog
    catalog.close()


def file_of(values: bytes, **metadata: str) -> bytes:
    entry = {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}
    text = json.dumps({"__metadata__": metadata, "a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + values


def add(catalog: Catalog, data: bytes, name: str, *, whole: bool = False) -> Version:
    stream = DigestStream(whole=whole)
    with catalog.blobs.upload() as upload:
        upload.write(data)
        upload.finish()
        stream.update(data)
        digests = stream.finish(read_header(upload.path))
        return catalog.add(upload, name=name, kind="lora", facts={}, digests=digests)[0]


def tensors(catalog: Catalog, name: str) -> str:
    return catalog.resolve(name).digests.tensors


VALUES = bytes(range(200))


def sample(path: Path, data: bytes) -> Digests:
    path.write_bytes(data)
    stream = DigestStream(whole=False)
    for start in range(0, len(data), 7):
        stream.update(data[start : start + 7])
    return stream.finish(read_header(path))


def test_a_sample_is_of_how_tensors_begin_and_of_no_header(tmp_path: Path) -> None:
    one, end = sample(tmp_path / "a", file_of(VALUES)), VALUES[:SAMPLE] + VALUES[SAMPLE:][::-1]
    assert one.tensors == ""
    assert one == sample(tmp_path / "a", file_of(VALUES, a="b")) == sample(tmp_path / "a", file_of(end))
    for other in (b"x" + VALUES[1:], VALUES[: SAMPLE - 1] + b"x" + VALUES[SAMPLE:], VALUES[:-4]):
        assert sample(tmp_path / "a", file_of(other)) != one


def test_the_first_of_its_kind_is_left_for_later(catalog: Catalog) -> None:
    one = add(catalog, file_of(VALUES), "one")
    other = add(catalog, file_of(VALUES[::-1]), "other")
    assert catalog.bodies.compare(one) == catalog.bodies.compare(other) == tensors(catalog, "one") == ""
    catalog.bodies.find(one.digest)
    assert (
        tensors(catalog, "one") == add(catalog, file_of(VALUES, a="b"), "whole", whole=True).digests.tensors
    )


def test_both_are_read_at_once_where_they_may_be_the_same(catalog: Catalog) -> None:
    add(catalog, file_of(VALUES), "one")
    second = add(catalog, file_of(VALUES, title="another header"), "two")
    found = catalog.bodies.compare(second)
    assert [version.ref for version in catalog.with_tensors(found)] == ["one:1", "two:1"]
    alike = add(catalog, file_of(VALUES[:-1] + b"x"), "three")  # begins the same way
    assert catalog.bodies.compare(alike) not in {"", found}


def test_a_version_of_an_earlier_release_is_compared_by_its_size(catalog: Catalog) -> None:
    add(catalog, file_of(VALUES), "old", whole=True)
    with catalog.database.write():
        catalog.database.tables.execute("update versions set tensor_sample = ''")
    same = add(catalog, file_of(VALUES, title="another header"), "same")
    assert catalog.bodies.compare(same) == tensors(catalog, "old")
    catalog.delete("old")
    assert catalog.bodies.compare(add(catalog, file_of(VALUES[::-1]), "alone")) == ""


def test_a_file_that_is_gone_is_compared_with_nothing(catalog: Catalog) -> None:
    one = add(catalog, file_of(VALUES), "one")
    two = add(catalog, file_of(VALUES, title="another header"), "two")
    catalog.blobs.path(one.digest).unlink()
    assert catalog.bodies.compare(two) == tensors(catalog, "two") != ""
    assert tensors(catalog, "one") == ""


def test_the_search_for_them_looks_at_no_other_version(catalog: Catalog) -> None:
    plan = catalog.database.query(f"explain query plan {MAY_HOLD_THE_SAME}", *("a", 1) * 2, 1, 1)
    told = [row["detail"] for row in plan if "versions_tensor_sample" in row["detail"]]
    assert [detail.partition("(")[2] for detail in told] == [
        "tensor_sample=?)",
        "tensor_sample=? AND size_bytes>? AND size_bytes<?)",
    ]
    assert not [row for row in plan if row["detail"].startswith("SCAN")]
