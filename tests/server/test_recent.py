"""The last minute and the last durations, with a clock that the test turns."""

from server.recent import KEPT, Durations, Percentiles, Rate


def test_a_rate_counts_the_last_minute_and_forgets_what_is_older() -> None:
    now = [1000.0]
    rate = Rate(lambda: now[0])
    for _ in range(120):
        rate.add()
        now[0] += 1.0
    assert rate.per_second() == 59 / 60  # the second that has just begun is empty
    now[0] += 30.0
    assert rate.per_second() == 29 / 60
    now[0] += 3600.0
    assert rate.per_second() == 0.0


def test_a_young_rate_is_over_its_own_age() -> None:
    now = [0.5]
    rate = Rate(lambda: now[0])
    rate.add(8)
    assert rate.per_second() == 8.0  # of an age below a second, by the second
    now[0] = 4.5
    assert rate.per_second() == 2.0


def test_percentiles_are_of_the_last_durations_by_nearest_rank() -> None:
    durations = Durations()
    for number in range(1, 101):
        durations.add("denoise", float(number))
    durations.add("patch", 0.25)
    assert durations.percentiles() == {
        "denoise": Percentiles(100, 50.0, 95.0, 99.0),
        "patch": Percentiles(1, 0.25, 0.25, 0.25),
    }
    for _ in range(KEPT):
        durations.add("denoise", 7.0)
    assert durations.percentiles()["denoise"] == Percentiles(KEPT, 7.0, 7.0, 7.0)
