"""SIGKILL at any moment: what was acknowledged is there, whole, and what was not has left nothing half made.

This file is also the program that is killed. It is started once and forks a victim for every line it reads,
`["check_in", seed, root]` or `["back_up", root, target]`, so that its imports are paid once; the next line
lets it collect the victim. A victim says its process id, then what it has done, a line each.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from registry import keeping
from registry.blobs import PARKED
from registry.catalog import Catalog
from registry.errors import Conflict, NotFound
from registry.records import Event, Version

CYCLES = int(os.environ.get("ATELIER_KILL_CYCLES", "200"))
CYCLES_A_DIRECTORY = 20
BACKUPS = 20
NAMES = ("ann", "bob", "cy")
ALIASES = ("stable", "next")
THREADS = 4
LIFETIME = 60.0
"""Seconds after which a victim that nobody kills gives up."""


def say(*words: object) -> None:
    """One line, in one write: threads do not mix theirs, and a kill cuts none."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def check_in(seed: str, root: str) -> None:
    """Changes a catalog from several threads at once, until killed; says each that was acknowledged."""
    catalog = Catalog(Path(root))
    threads = [
        threading.Thread(
            target=stopping_all, args=(lambda n=n: change(catalog, random.Random(f"{seed} {n}"), n),)
        )
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def stopping_all(work: Callable[[], None]) -> None:
    """An error in one thread ends the process, so that the test hears of it."""
    try:
        work()
    except BaseException:
        try:
            traceback.print_exc()
            say("failed")
        finally:  # also when nobody listens any more
            os._exit(1)


def change(catalog: Catalog, rng: random.Random, slot: int) -> None:
    end = time.monotonic() + LIFETIME
    while time.monotonic() < end:
        name = rng.choice(NAMES)
        try:
            if rng.random() < 0.45:
                add(catalog, rng, name)
                continue
            if rng.random() < 0.3:
                go_on(catalog, rng, name, slot)
                continue
            number = rng.choice(catalog.history(name)).number
            work = rng.choice((point, delete, describe, show))
            work(catalog, rng, name, number)
        except (Conflict, NotFound):  # another thread was there first, or there is nothing yet
            continue


def point(catalog: Catalog, rng: random.Random, name: str, number: int) -> None:
    alias = rng.choice(ALIASES)
    catalog.set_alias(name, alias, number)
    say("alias", name, number, alias)


def delete(catalog: Catalog, rng: random.Random, name: str, number: int) -> None:
    catalog.delete(f"{name}:{number}")
    say("delete", name, number)
    if rng.random() < 0.7:
        catalog.undelete(f"{name}:{number}")
        say("undelete", name, number)


def describe(catalog: Catalog, rng: random.Random, name: str, number: int) -> None:
    card = f"another card {rng.random()}".encode()
    catalog.set_card(f"{name}:{number}", card, {})
    say("card", name, number, hashlib.sha256(card).hexdigest())


def show(catalog: Catalog, rng: random.Random, name: str, number: int) -> None:
    with catalog.blobs.upload() as upload:
        upload.write(rng.randbytes(rng.randrange(1, 64 << 10)))
        _, shown = catalog.add_preview(f"{name}:{number}", upload, width=1, height=1)
    say("preview", name, number, shown.digest)
    if rng.random() < 0.5:
        gone = rng.choice(catalog.previews(catalog.resolve(f"{name}:{number}")))
        catalog.remove_preview(f"{name}:{number}", gone.digest)
        say("preview", name, number, gone.digest, "removed")


def bytes_of(session: str) -> bytes:
    """What an upload brings that goes on from one victim to the next."""
    rng = random.Random(session)
    return rng.randbytes(rng.randrange(256 << 10, 1 << 20))


def go_on(catalog: Catalog, rng: random.Random, name: str, slot: int) -> None:
    """Brings more of the thread's upload, or begins the next; perhaps it is cut, as a network cuts it."""
    sessions = (f"session {slot} {number}" for number in itertools.count())
    session = next(session for session in sessions if not catalog.made_by(session))
    data, here, cut = bytes_of(session), catalog.blobs.parked_bytes(session), False
    with catalog.blobs.upload(session, here) as upload:
        while upload.size < len(data) and not cut:
            upload.write(data[upload.size : upload.size + (64 << 10)])
            time.sleep(0.001)
            cut = rng.random() < 0.1
        if cut:
            upload.park()
        else:
            version, _ = catalog.add(upload, name=name, kind="lora", facts={}, request_id=session)
            say("checkin", name, version.number, version.digest)
    say(*(("parked", session, upload.size) if cut else ("whole", session, here)))


def add(catalog: Catalog, rng: random.Random, name: str) -> None:
    size = rng.randrange(1 << 20, 1 << 21) if rng.random() < 0.15 else rng.randrange(1, 8 << 10)
    alias = rng.choice(ALIASES) if rng.random() < 0.3 else ""
    with catalog.blobs.upload() as upload:
        while upload.size < size:  # in pieces, as from the network
            upload.write(rng.randbytes(min(64 << 10, size - upload.size)))
            time.sleep(0.001)
        card = f"card {rng.random()}".encode()
        version, _ = catalog.add(upload, name=name, kind="lora", facts={}, card=card, alias=alias)
    say("checkin", name, version.number, version.digest)
    if alias:
        say("alias", name, version.number, alias)


def back_up(root: str, target: str) -> None:
    """Says how many files are done, and when all is."""
    keeping.backup(Path(root), Path(target), lambda done, total: say("files", done, total))
    say("done")


def main() -> None:
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        victim = os.fork()
        if not victim:
            say(os.getpid())
            stopping_all(lambda: {"check_in": check_in, "back_up": back_up}[task](*arguments))  # noqa: B023
            os._exit(0)
        sys.stdin.readline()  # until then its id is its own, dead or alive
        say("ended", os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]))


class Killer:
    """Starts victims and kills them; what each has said."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout

    def kill(self, task: list[str], *, lines: int, delay: float) -> tuple[list[list[str]], int]:
        """Lets a victim say so many lines, waits for `delay` seconds, kills it; all it said, and its exit
        code.
        """
        self._say(json.dumps(task))
        victim, said = int(self._out.readline()), list[list[str]]()
        while len(said) < lines and said[-1:] not in ([["done"]], [["failed"]]):
            said.append(self._out.readline().split())
        time.sleep(delay)
        os.kill(victim, signal.SIGKILL)
        self._say("collect")
        while (words := self._out.readline().split())[0] != "ended":
            said.append(words)
        return said, int(words[1])

    def _say(self, line: str) -> None:
        self._in.write(f"{line}\n")
        self._in.flush()


@contextmanager
def killing() -> Iterator[Killer]:
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        try:
            yield Killer(process)
        finally:
            process.kill()


def told(event: Event, digests: dict[str, str]) -> tuple[str, ...]:
    """What a victim says of a change when it is acknowledged."""
    more = {
        "checkin": (digests.get(f"{event.name}:{event.number}", ""),),
        "alias": (event.detail.get("alias"),),
        "card": (event.detail.get("digest"),),
        "preview": (event.detail.get("digest"), *(["removed"] if event.detail.get("removed") else [])),
    }
    return (event.action, event.name, str(event.number), *more.get(event.action, ()))


@dataclass
class Replayed:
    """What there is after some changes, by reference: versions, and whether each is deleted; the digests of
    the cards after the first, and of the previews; what aliases name.
    """

    deleted: dict[str, bool] = field(default_factory=dict)
    cards: dict[str, list[str]] = field(default_factory=dict)
    previews: dict[str, list[str]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)

    def change(self, event: Event) -> None:
        ref, digest = f"{event.name}:{event.number}", event.detail.get("digest", "")
        if event.action == "alias":
            self.aliases[event.name, event.detail["alias"]] = event.number
        elif event.action == "card":
            self.cards.setdefault(ref, []).append(digest)
        elif event.action == "preview" and event.detail.get("removed"):
            self.previews[ref].remove(digest)
            self.removed.add(digest)
        elif event.action == "preview":
            self.previews.setdefault(ref, []).append(digest)
        else:
            self.deleted[ref] = event.action == "delete"


def check(root: Path, acknowledged: Counter[tuple[str, ...]]) -> int:
    """Opens the catalog again and compares it with what was acknowledged, and with its own events; how many
    files no version names, and never did.
    """
    uploads = {words for words in acknowledged if words[0] in {"parked", "whole"}}
    changes = Counter({words: n for words, n in acknowledged.items() if words not in uploads})
    catalog, replayed = Catalog(root), Replayed()
    try:
        check_uploads(catalog, uploads)
        events = catalog.events(limit=1_000_000)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        for event in events:
            replayed.change(event)
        versions: list[Version] = []
        for name in sorted({event.name for event in events}):
            versions += (history := catalog.history(name))
            assert [version.number for version in history] == list(range(len(history), 0, -1))
        digests = {version.ref: version.digest for version in versions}
        assert changes - Counter(told(event, digests) for event in events) == Counter()
        assert {version.ref: bool(version.deleted_at) for version in versions} == replayed.deleted
        assert {(v.name, alias): v.number for v in versions for alias in v.aliases} == replayed.aliases
        for (name, alias), number in replayed.aliases.items():
            assert catalog.resolve(f"{name}@{alias}").number == number
        for version in versions:
            revisions = catalog.card_revisions(version)
            assert [r.number for r in revisions] == list(range(1, len(revisions) + 1))
            assert [r.digest for r in revisions[1:]] == replayed.cards.get(version.ref, [])
            assert catalog.card(version) == revisions[-1].card
            assert revisions[-1].digest == version.card_digest
            shown = [preview.digest for preview in catalog.previews(version)]
            assert shown == replayed.previews.get(version.ref, [])
    finally:
        catalog.close()
    report = keeping.verify(root)
    assert report.sound, report
    assert report.versions == len(versions)
    for digest in report.orphans:  # a file is whole before its name says so
        catalog.blobs.verified(digest)
    return len(set(report.orphans) - replayed.removed)


def check_uploads(catalog: Catalog, said: set[tuple[str, ...]]) -> None:
    """What was parked is there, an upload that became whole is a version, nothing else is left."""
    sessions = [f"session {slot} {number}" for slot in range(THREADS) for number in range(200)]
    parked = {path: session for session in sessions if (path := catalog.blobs.parked(session)).exists()}
    assert set(catalog.blobs.incoming.iterdir()) == set(parked)
    for path, session in parked.items():
        assert bytes_of(session).startswith(path.read_bytes())
    for what, *words, size in said:
        session, data = " ".join(words), bytes_of(" ".join(words))
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        version = catalog.made_by(session)
        if what == "whole":
            assert version is not None
        if version:
            assert version.digest == digest
        elif not catalog.blobs.path(digest).exists():  # killed between the file and its row
            assert catalog.blobs.parked_bytes(session) >= int(size)


@pytest.mark.timeout(max(300, 2 * CYCLES))
def test_kill9_loop(tmp_path: Path) -> None:
    rng, root = random.Random(9), tmp_path / "data"
    changes = half_written = not_named = orphans = resumed = 0
    acknowledged, every = Counter[tuple[str, ...]](), set[tuple[str, ...]]()
    with killing() as killer:
        for cycle in range(CYCLES):
            opening = rng.random() < 0.1  # killed while it opens the catalog, perhaps
            lines, delay = (0, rng.uniform(0, 0.03)) if opening else (1, rng.uniform(0.005, 0.15))
            said, code = killer.kill(["check_in", f"{cycle}", str(root)], lines=lines, delay=delay)
            assert code == -signal.SIGKILL
            acknowledged.update(map(tuple, said))
            every |= set(map(tuple, said))
            changes += len(said)
            resumed += sum(words[0] == "whole" and words[-1] != "0" for words in said)
            left = [path.name for path in (root / "tmp").iterdir()] if (root / "tmp").is_dir() else []
            half_written += not all(name.startswith(PARKED) for name in left)
            if acknowledged and cycle % 2:  # before opening it mends anything, as an operator would
                assert keeping.verify(root).sound
            before, orphans = orphans, check(root, acknowledged)
            not_named += orphans > before
            if cycle % CYCLES_A_DIRECTORY == CYCLES_A_DIRECTORY - 1:
                shutil.rmtree(root)
                acknowledged.clear()
                orphans = 0
    assert changes >= 2 * CYCLES  # and on a slow disk
    assert half_written >= CYCLES // 8  # kills in the middle of a file
    assert not_named >= CYCLES // 8  # and between the file and its row
    assert resumed >= CYCLES // 8  # uploads that went on where they, or their process, had ended
    assert {words[0] for words in every} >= {"card", "preview", "parked", "alias", "delete", "undelete"}


def rows(root: Path) -> set[tuple[str, int, str]]:
    """The versions a database names; none where there is no database."""
    if not (root / keeping.DATABASE).exists():
        return set()
    with closing(sqlite3.connect(f"file:{root / keeping.DATABASE}?mode=ro", uri=True)) as connection:
        return set(connection.execute("select name, number, digest from versions"))


def test_a_backup_that_is_killed_leaves_the_one_before_it(tmp_path: Path) -> None:
    rng, kept, data, copy = random.Random(10), 0, tmp_path / "data", tmp_path / "copy"
    catalog = Catalog(data)
    try:
        with killing() as killer:
            for _ in range(BACKUPS):
                for number in range(8):
                    with catalog.blobs.upload() as upload:
                        upload.write(rng.randbytes(2 << 20 if number == 0 else rng.randrange(1, 8 << 10)))
                        catalog.add(upload, name=rng.choice(NAMES), kind="lora", facts={}, alias="stable")
                before, here = rows(copy), rows(data)
                moments = (0, rng.randrange(len(here)), len(here) + 1)  # the database, the files, the end
                lines, delay = rng.choice(moments), rng.uniform(0, 0.02)
                _, code = killer.kill(["back_up", str(data), str(copy)], lines=lines, delay=delay)
                assert code in (-signal.SIGKILL, 0)
                after = rows(copy)
                assert after in (before, here)
                kept += after == before
                if after:
                    assert keeping.verify(copy).sound
        assert BACKUPS // 4 <= kept < BACKUPS
        report = keeping.backup(data, copy)
        assert (report.sound, report.orphans) == (True, ())
        assert rows(copy) == rows(data)
        assert {path.name for path in copy.iterdir()} == {keeping.DATABASE, "blobs", "tmp", "lock"}
        assert list((copy / "tmp").iterdir()) == []
    finally:
        catalog.close()


if __name__ == "__main__":
    main()
