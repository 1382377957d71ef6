"""What is kept between merges, by numbers: never more than its budget, and what is in use the longest."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.memo import Memo

KB = 1024


def kilobytes(n: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(n * KB, dtype=torch.uint8)


class Counting:
    """A `compute` that counts its calls."""

    def __init__(self, n: int) -> None:
        self.calls, self.make = 0, kilobytes(n)

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.make()


def test_what_is_kept_is_not_computed_again() -> None:
    memo, work = Memo(10 * KB), Counting(4)
    first = memo.once("a", 0, work)
    assert memo.once("a", 0, work) is first
    assert memo.once("a", 1, work) is not first
    assert work.calls == 2
    assert memo.nbytes == 8 * KB


def test_the_key_that_was_used_longest_ago_makes_room_first() -> None:
    memo, work = Memo(10 * KB), {name: Counting(4) for name in "abc"}
    for name in ("a", "b", "a", "c"):  # each in a run of its own
        memo.begin()
        memo.once(name, 0, work[name])
    assert memo.nbytes == 8 * KB
    for name in ("a", "c", "b"):
        memo.once(name, 0, work[name])
    assert [work[name].calls for name in "abc"] == [1, 2, 1]


def test_a_run_that_does_not_fit_keeps_its_first_places_again_and_again() -> None:
    memo, work = Memo(10 * KB), [Counting(4) for _ in range(5)]
    for _ in range(3):
        memo.begin()
        for place in range(5):
            memo.once("a", place, work[place])
            assert memo.nbytes <= 10 * KB
    assert [counting.calls for counting in work] == [1, 1, 3, 3, 3]


def test_keys_of_one_run_do_not_throw_each_other_out() -> None:
    memo = Memo(10 * KB)
    outcomes, cores = Counting(2), Counting(3)
    for _ in range(2):
        memo.begin()
        for place in range(2):
            memo.once("outcome", place, outcomes)
            memo.once("core", place, cores)
    assert (outcomes.calls, cores.calls) == (2, 2)
    assert memo.nbytes == 10 * KB
    memo.begin()
    memo.once("other", 0, kilobytes(6))
    assert memo.nbytes <= 10 * KB


def test_bytes_are_counted_in_whatever_holds_them_and_once() -> None:
    @dataclass
    class Pair:
        left: Tensor
        rest: dict[str, list[Tensor]]

    whole, besides = torch.zeros(4 * KB, dtype=torch.uint8), torch.zeros(64 * KB)
    memo = Memo(100 * KB)
    memo.once("a", 0, lambda: (Pair(whole[:10], {"x": [whole[5:], besides[:3]]}), "text"), besides=[besides])
    assert memo.nbytes == 4 * KB
    memo.clear()
    assert memo.nbytes == 0


def test_memory_that_two_keys_hold_counts_once_and_until_both_have_gone() -> None:
    memo, shared = Memo(10 * KB), torch.zeros(4 * KB, dtype=torch.uint8)
    memo.once("a", 0, lambda: shared)
    memo.once("b", 0, lambda: (shared[:5], torch.zeros(2 * KB, dtype=torch.uint8)))
    assert memo.nbytes == 6 * KB
    memo.begin()
    memo.once("b", 0, kilobytes(0))
    memo.once("c", 0, kilobytes(5))  # what "a" has "b" has, too: to let it go gives no room
    assert memo.nbytes == 6 * KB
    memo.begin()
    memo.once("c", 0, kilobytes(5))
    assert memo.nbytes == 5 * KB
