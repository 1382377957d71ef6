"""Every sink gets every piece, in order, until one fails: then nobody gets any more."""

import threading

import pytest

from registry.intake import DEPTH, Intake


def test_each_sink_gets_all_in_order_and_a_slow_one_holds_up_none() -> None:
    fast, slow, go = list[bytes](), list[bytes](), threading.Event()

    def wait(data: bytes) -> None:
        go.wait()
        slow.append(data)

    pieces = [b"%d" % number for number in range(DEPTH + 3)]
    with Intake(fast.append, wait) as intake:
        pending = [intake.feed(piece) for piece in pieces]
        assert pending[:DEPTH] == [[]] * DEPTH
        for work in pending[DEPTH:]:
            work[0].result(timeout=60)  # the fast sink's
            assert not work[1].done()
        go.set()
        for future in intake.rest():
            future.result(timeout=60)
        assert fast == slow == pieces
        assert intake.rest() == []


@pytest.mark.parametrize("bad", range(3))
def test_after_a_failure_what_was_written_has_no_gap(bad: int) -> None:
    written = list[int]()

    def write(data: bytes) -> None:
        if data[0] == bad:
            raise OSError("no space left")
        written.append(data[0])

    with Intake(write, len) as intake:
        work = [future for number in range(6) for future in intake.feed(bytes([number]))]
        errors = [future.exception() for future in (*work, *intake.rest())]
    assert [str(error) for error in errors if error] == ["no space left"]
    assert written == list(range(bad))


def test_leaving_waits_for_what_was_fed() -> None:
    started, go, done = threading.Event(), threading.Event(), list[bytes]()

    def sink(data: bytes) -> None:
        started.set()
        go.wait(60)
        done.append(data)

    with Intake(sink) as intake:
        intake.feed(b"a")
        intake.feed(b"b")
        started.wait(60)
        threading.Timer(0.05, go.set).start()
    assert done == [b"a", b"b"]


def test_when_it_is_cut_what_came_is_kept_and_nobody_else_is_waited_for() -> None:
    started, go, done, kept, seen = *(threading.Event() for _ in range(3)), list[bytes](), list[bytes]()

    def watch(data: bytes) -> None:
        started.set()
        go.wait()
        seen.append(data)
        done.set()

    with Intake(kept.append, watch) as intake:
        for data in (b"a", b"b"):
            intake.feed(data)
        started.wait(60)
        for future in intake.cut():
            future.result(timeout=60)
        assert intake.rest() == []
    assert kept == [b"a", b"b"]
    assert seen == []
    go.set()
    done.wait(60)
    assert seen == [b"a"]
