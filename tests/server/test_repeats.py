"""Requests that come again: remembered in number and weight, the first of two at once is right."""

import threading

import pytest

from atelier.messages import render_request
from registry.errors import Conflict
from server.errors import BadRequest
from server.repeats import BYTES_LIMIT, REMEMBERED, Repeats

ASKED, OTHER = render_request("a star"), render_request("a moon")


def test_the_first_is_given_again_to_the_same_client_alone() -> None:
    repeats: Repeats[object] = Repeats()
    first = repeats.first("mia", "one", ASKED, object)
    assert repeats.first("mia", "one", ASKED, object) is first
    assert repeats.first("tom", "one", ASKED, object) is not first
    assert repeats.first("mia", "two", ASKED, object) is not first
    with pytest.raises(Conflict, match="request id 'one' was used for another request"):
        repeats.first("mia", "one", OTHER, object)


def test_of_two_at_once_both_are_given_the_same() -> None:
    repeats: Repeats[object] = Repeats()
    both = threading.Barrier(2)
    found: list[object] = []

    def made() -> object:
        both.wait(60)
        return object()

    threads = [
        threading.Thread(target=lambda: found.append(repeats.first("", "one", ASKED, made))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] is found[1]


def test_what_could_not_be_made_is_not_remembered() -> None:
    repeats: Repeats[int] = Repeats()
    with pytest.raises(ZeroDivisionError):
        repeats.first("", "one", ASKED, lambda: 1 // 0)
    assert repeats.first("", "one", OTHER, lambda: 7) == 7


def test_the_oldest_are_forgotten_by_number_and_by_weight() -> None:
    repeats: Repeats[int] = Repeats(weigh=lambda made: made)
    for number in range(REMEMBERED + 1):
        repeats.first("", str(number), ASKED, lambda: 0)
    assert repeats.first("", "0", ASKED, lambda: 5) == 5
    repeats.first("", "heavy", ASKED, lambda: BYTES_LIMIT)
    assert repeats.first("", "1", ASKED, lambda: 9) == 9
    assert repeats.first("", "heavy", ASKED, lambda: 3) == 3


@pytest.mark.parametrize("wrong", ["x" * 65, "a\nb", "\x00"])
def test_an_id_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(BadRequest, match="is not of up to 64 printable characters"):
        Repeats[int]().first("", wrong, ASKED, lambda: 1)
