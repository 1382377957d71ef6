"""Deleting, purging, verifying, backing up: nothing goes that somebody may still want, and damage is told."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from registry import keeping
from registry.catalog import Catalog
from registry.errors import Conflict, InvalidFile, InvalidName, NotFound
from registry.finding import Query
from registry.records import Version

NEVER, AT_ONCE = timedelta(days=365), timedelta(0)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "data")
    yield opened
    opened.close()


def add(catalog: Catalog, data: bytes, name: str = "hero", **more: object) -> Version:
    with catalog.blobs.upload() as upload:
        upload.write(data)
        return catalog.add(upload, name=name, kind="lora", facts={"rank": 4}, **more)[0]  # type: ignore[arg-type]


def refs(catalog: Catalog) -> list[str]:
    return [version.ref for version in catalog.newest()]


def test_a_deleted_version_is_hidden_and_comes_back_whole(catalog: Catalog) -> None:
    first, second = add(catalog, b"one"), add(catalog, b"two")
    assert catalog.delete("hero").ref == second.ref
    assert catalog.resolve("hero") == first
    for ref in ("hero:2", second.digest):
        with pytest.raises(NotFound):
            catalog.resolve(ref)
    with pytest.raises(NotFound, match="`atelier undelete hero:2` brings it back"):
        catalog.resolve("hero:2")
    assert [bool(v.deleted_at) for v in catalog.history("hero")] == [True, False]
    assert catalog.undelete("hero:2") == second
    assert refs(catalog) == ["hero:2"]


def test_the_number_of_a_deleted_version_is_never_given_again(catalog: Catalog) -> None:
    add(catalog, b"one")
    catalog.delete("hero:1")
    assert refs(catalog) == []
    assert add(catalog, b"two").ref == "hero:2"


def test_the_same_bytes_checked_in_again_bring_a_deleted_version_back(catalog: Catalog) -> None:
    first = add(catalog, b"one")
    catalog.delete("hero:1")
    catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    assert not catalog.blobs.path(first.digest).exists()
    assert add(catalog, b"one") == first
    assert b"".join(catalog.blobs.chunks(first.digest)) == b"one"


def test_what_an_alias_names_is_not_deleted(catalog: Catalog) -> None:
    add(catalog, b"one", alias="stable")
    with pytest.raises(Conflict, match="hero@stable names hero:1; move the alias first"):
        catalog.delete("hero:1")
    assert refs(catalog) == ["hero:1"]


def test_undeletes_that_cannot_be(catalog: Catalog) -> None:
    add(catalog, b"one")
    with pytest.raises(InvalidName, match="say which, hero:3"):
        catalog.undelete("hero")
    with pytest.raises(Conflict, match="is not deleted"):
        catalog.undelete("hero:1")
    with pytest.raises(NotFound):
        catalog.undelete("hero:7")
    catalog.delete("hero:1")
    catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    with pytest.raises(Conflict, match="are purged; check the file in again"):
        catalog.undelete("hero:1")


def test_garbage_is_what_was_deleted_long_ago_and_what_nobody_names(catalog: Catalog) -> None:
    kept, deleted = add(catalog, b"kept"), add(catalog, b"gone", name="villain")
    add(catalog, b"kept", name="twin")  # the same bytes under a name that is deleted
    catalog.delete("villain:1")
    catalog.delete("twin:1")
    with catalog.blobs.upload() as upload:
        upload.write(b"nobody's")
        orphan = upload.commit()
    nothing = catalog.collect_garbage(retention=NEVER, grace=NEVER)
    assert (nothing.versions, nothing.orphans, nothing.size_bytes) == ((), (), 0)
    told = catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE, dry_run=True)
    assert (told.versions, told.orphans) == (("twin:1", "villain:1"), (orphan,))
    assert catalog.blobs.path(deleted.digest).exists()
    assert catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE) == told
    assert [digest for digest, _ in catalog.blobs.files()] == [kept.digest]
    assert catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE).size_bytes == 0


def test_every_change_is_an_event_in_order(catalog: Catalog) -> None:
    add(catalog, b"one", alias="stable", actor="ann")
    add(catalog, b"one", actor="ann")  # changes nothing
    add(catalog, b"two", actor="bob")
    catalog.set_alias("hero", "stable", 2, actor="bob")
    catalog.delete("hero:1", actor="cy")
    catalog.undelete("hero:1", actor="cy")
    with pytest.raises(Conflict):
        catalog.delete("hero:2", actor="cy")
    told = catalog.events()
    assert [event.seq for event in told] == list(range(1, 7))
    assert [(event.actor, event.action, event.number) for event in told] == [
        ("ann", "checkin", 1),
        ("ann", "alias", 1),
        ("bob", "checkin", 2),
        ("bob", "alias", 2),
        ("cy", "delete", 1),
        ("cy", "undelete", 1),
    ]
    assert catalog.events(since=4) == told[4:]


def test_verify_tells_missing_corrupt_and_orphaned_apart(catalog: Catalog, tmp_path: Path) -> None:
    good, lost, changed = (add(catalog, data, name=data.decode()) for data in (b"good", b"lost", b"changed"))
    with catalog.blobs.upload() as upload:
        upload.write(b"nobody's")
        orphan = upload.commit()
    assert keeping.verify(tmp_path / "data").sound  # an orphan loses nobody anything
    catalog.blobs.path(lost.digest).unlink()
    path = catalog.blobs.path(changed.digest)
    path.chmod(0o644)
    path.write_bytes(b"chanced")
    report = keeping.verify(tmp_path / "data")
    assert report.missing == (f"lost:1 ({lost.digest})",)
    assert report.corrupt == (f"changed:1 ({changed.digest})",)
    assert report.orphans == (orphan,)
    assert (report.versions, report.sound) == (3, False)
    assert good.digest not in "".join(report.missing + report.corrupt)


def test_a_backup_taken_while_serving_restores_to_the_same_catalog(catalog: Catalog, tmp_path: Path) -> None:
    for number in range(20):
        add(catalog, b"%d" % number, alias="stable")
    stop = threading.Event()

    def busy() -> None:
        number = 20
        while not stop.is_set():
            add(catalog, b"%d" % number)
            number += 1

    writer = threading.Thread(target=busy)
    writer.start()
    try:
        time.sleep(0.05)
        report = keeping.backup(tmp_path / "data", tmp_path / "copy")
    finally:
        stop.set()
        writer.join()
    assert report.sound
    assert report.versions >= 20
    assert keeping.backup(tmp_path / "data", tmp_path / "copy").versions == len(catalog.history("hero"))
    keeping.restore(tmp_path / "copy", tmp_path / "restored")
    restored = Catalog(tmp_path / "restored")
    try:
        assert restored.history("hero") == catalog.history("hero")
        assert restored.events() == catalog.events()
        assert b"".join(restored.blobs.chunks(restored.resolve("hero:7").digest)) == b"6"
        assert add(restored, b"new").number == len(catalog.history("hero")) + 1
    finally:
        restored.close()


def test_backups_and_restores_that_would_overwrite_something(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, b"one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for target in ("mine", "data"):
        with pytest.raises(Conflict):
            keeping.backup(tmp_path / "data", tmp_path / target)
    other = Catalog(tmp_path / "other")
    add(other, b"another hero")
    with pytest.raises(Conflict, match="is in use by another process"):
        keeping.backup(tmp_path / "data", tmp_path / "other")
    other.close()
    with pytest.raises(Conflict, match="holds hero:1, which is not in this catalog"):
        keeping.backup(tmp_path / "data", tmp_path / "other")
    assert keeping.verify(tmp_path / "other").sound
    with pytest.raises(Conflict, match="holds a catalog already"):
        keeping.restore(tmp_path / "data", tmp_path / "data")
    with pytest.raises(NotFound, match="there is no catalog"):
        keeping.restore(tmp_path / "mine", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_a_merge_was_made_of_stays_as_long_as_the_merge(catalog: Catalog) -> None:
    parent, other = add(catalog, b"one", "parent"), add(catalog, b"two", "other")
    recipe = {"method": "svd", "parents": [{"ref": v.ref, "digest": v.digest} for v in (parent, other)]}
    for name in ("merge", "second"):
        add(catalog, b"both", name, recipe=recipe)
    with catalog.blobs.upload() as upload:
        upload.write(b"picture")
        catalog.add_preview("parent", upload, width=1, height=1)
    catalog.delete("parent")  # a merge has bytes of its own: nobody is kept from it
    for dry_run in (True, False):
        went = catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE, dry_run=dry_run)
        assert (went.versions, went.orphans, went.size_bytes) == ((), (), 0)
        assert went.held == (("parent:1", "merge:1"),)
    assert catalog.undelete("parent:1") == parent
    assert len(catalog.previews(parent)) == 1
    catalog.delete("parent")
    catalog.delete("merge")
    assert catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE).held == (("parent:1", "second:1"),)
    catalog.delete("second")
    within = catalog.collect_garbage(retention=NEVER, grace=AT_ONCE)  # both could still come back
    assert (within.versions, within.held) == ((), ())
    went = catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    assert (went.versions, went.held) == (("parent:1", "second:1"), ())
    assert not catalog.blobs.path(parent.digest).exists()
    assert catalog.resolve("other") == other


def test_of_what_a_merge_was_made_of_one_that_is_there_will_do(catalog: Catalog) -> None:
    first = add(catalog, b"one", "first")
    recipe = {"parents": [{"ref": first.ref, "digest": first.digest}]}
    add(catalog, b"merged", "merge", recipe=recipe)
    add(catalog, b"one", "twin")
    catalog.delete("first")
    went = catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    assert (went.versions, went.held) == (("first:1",), ())
    assert catalog.blobs.path(first.digest).exists()
    catalog.delete("twin")
    assert catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE).held == (("twin:1", "merge:1"),)


def test_a_merge_of_its_own_bytes_holds_nobody_for_ever(catalog: Catalog) -> None:
    one = add(catalog, b"one", "one")
    add(catalog, b"one", "same", recipe={"parents": [{"ref": one.ref, "digest": one.digest}]})
    catalog.delete("one")
    catalog.delete("same")
    went = catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    assert (went.versions, went.held) == (("one:1", "same:1"), ())


def test_a_stack_is_made_and_brought_back_only_of_what_is_there(catalog: Catalog) -> None:
    def save() -> Version:
        with catalog.blobs.upload() as upload:
            upload.write(b"hero and the other")
            facts = {"members": [hero.digest, other.digest]}
            return catalog.add(upload, name="look", kind="stack", facts=facts)[0]

    hero, other = add(catalog, b"one"), add(catalog, b"two", name="other")
    catalog.delete("hero")  # after the stack was put together, before it is kept
    with pytest.raises(Conflict, match="hero:1, which the stack is made of, is deleted; `atelier undelete"):
        save()
    assert refs(catalog) == ["other:1"]
    catalog.undelete("hero:1")
    look = save()
    for ref in ("look", "hero"):
        catalog.delete(ref)
    with pytest.raises(Conflict, match="hero:1, which the stack is made of, is deleted"):
        catalog.undelete("look:1")
    catalog.undelete("hero:1")
    assert catalog.undelete("look:1") == look
    catalog.delete("look")
    catalog.delete("hero")
    add(catalog, b"one", name="twin")
    assert catalog.undelete("look:1") == look


def test_what_is_purged_already_is_held_by_no_merge(catalog: Catalog) -> None:
    parent = add(catalog, b"one", "parent")
    catalog.delete("parent")
    catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    add(catalog, b"merged", "merge", recipe={"parents": [{"ref": parent.ref, "digest": parent.digest}]})
    went = catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    assert (went.versions, went.held) == ((), ())


def test_what_is_purged_already_holds_nothing(catalog: Catalog) -> None:
    parent = add(catalog, b"one", "parent")
    add(catalog, b"merged", "merge", recipe={"parents": [{"ref": parent.ref, "digest": parent.digest}]})
    catalog.delete("merge")
    catalog.collect_garbage(retention=AT_ONCE, grace=AT_ONCE)
    catalog.delete("parent")
    with catalog.database.write():
        catalog.database.tables.execute("update versions set deleted_at = '2020-01-01' where name = 'parent'")
    went = catalog.collect_garbage(retention=NEVER, grace=AT_ONCE)
    assert (went.versions, went.held) == (("parent:1",), ())


def test_a_directory_of_the_first_schema_opens_with_all_it_has(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "data")
    first = add(catalog, b"one", alias="stable")
    catalog.close()
    with sqlite3.connect(tmp_path / "data" / "catalog.db") as old:  # as m001 alone left it
        old.execute("drop view stored")
        later = ("cards", "previews", "projections", "needs", "search", "heads", "events", "hub_links")
        for table in (*later, "jobs", "job_events", "job_images", "job_inputs"):
            old.execute(f"drop table {table}")
        for index in ("tensor_digest", "tensor_sample_size_bytes", "no_body"):
            old.execute(f"drop index idx_versions_{index}")
        for column in ("body_digest", "tensor_digest", "tensor_sample", "deleted_at", "purged_at"):
            old.execute(f"alter table versions drop column {column}")
        old.execute("delete from _sqlite_migrations where name not like 'm001%'")
    old.close()
    assert keeping.verify(tmp_path / "data").sound
    opened = Catalog(tmp_path / "data")
    assert opened.resolve("hero@stable") == first
    assert opened.newest(query=Query(text="her", labels=[("kind", "lora")])) == [first]
    assert os.path.exists(opened.blobs.path(first.digest))
    opened.close()


def test_a_directory_of_a_later_release_is_left_alone(tmp_path: Path) -> None:
    Catalog(tmp_path / "data").close()
    with closing(sqlite3.connect(tmp_path / "data" / "catalog.db")) as later:
        later.execute("update _sqlite_migrations set name = 'm999_later' where name like 'm010%'")
        later.commit()
    with pytest.raises(InvalidFile, match="written by a later release of Atelier"):
        Catalog(tmp_path / "data")
    with closing(sqlite3.connect(tmp_path / "data" / "catalog.db")) as same:
        assert ("m999_later",) in same.execute("select name from _sqlite_migrations").fetchall()
