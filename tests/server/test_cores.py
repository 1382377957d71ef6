"""How many cores rendering gets when nobody says."""

import pytest

from compose.errors import InvalidRequest
from server import main


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(main.torch, "get_num_threads", lambda: 4)


@pytest.mark.parametrize(
    ("asked", "device", "parameters", "threads"),
    [
        (0, "cpu", 860_000_000, 4),
        (0, "cpu", 3_000_000, 3),
        (0, "cuda", 860_000_000, 3),
        (1, "cpu", 860_000_000, 1),
        (4, "cpu", 3_000_000, 4),
    ],
)
def test_a_large_base_gets_every_core(asked: int, device: str, parameters: int, threads: int) -> None:
    assert main._threads(asked, device, parameters) == threads


@pytest.mark.parametrize("asked", [-1, 5])
def test_more_than_there_are_is_refused(asked: int) -> None:
    with pytest.raises(InvalidRequest, match=f"--threads {asked} is not within 0 and the 4 cores here"):
        main._threads(asked, "cpu", 0)
