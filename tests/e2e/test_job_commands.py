"""`atelier job …` as typed: made, watched, fetched, called off, forgotten, and what is amiss told."""

import json
from pathlib import Path

from tests.e2e.test_cli import Run, failed, good, run  # noqa: F401  # a fixture

SMALL = ("--steps", 2, "--size", "64x64")


def test_a_job_from_its_making_to_its_end(run: Run, tmp_path: Path) -> None:  # noqa: F811
    made = good(run("job", "create", "a cli star", *SMALL, "--count", 2, "--seed", 7))
    name = made.split()[0]
    assert f"`atelier job fetch {name} --wait` fetches its pictures" in made
    assert good(run("job", "fetch", name, "--wait", "-o", "x.png")) == "x-1.png\nx-2.png\n"
    watched = good(run("job", "watch", name)).splitlines()
    assert [line.split()[1] for line in watched] == ["queued", "running", "picture", "picture", "done"]
    (last,) = good(run("job", "watch", name, "--after", 4, "--json")).splitlines()
    assert json.loads(last)["state"] == "JOB_STATE_DONE"
    good(run("render", "a cli star", *SMALL, "--count", 2, "--seed", 7, "-o", "y.png"))
    for number in (1, 2):
        assert (tmp_path / f"x-{number}.png").read_bytes() == (tmp_path / f"y-{number}.png").read_bytes()
    shown = good(run("job", "show", name))
    assert "done" in shown
    assert "a cli star" in shown
    assert json.loads(good(run("job", "show", name, "--json")))["count"] == 2
    assert name in good(run("job", "list", "--state", "done", "--limit", 1000))
    assert good(run("job", "cancel", name)) == f"{name} is done, with 2 of 2 pictures\n"
    assert good(run("job", "delete", name)) == f"{name} is forgotten\n"
    failed(run("job", "show", name), 3, f"there is no job '{name}'")


def test_the_same_request_is_the_same_job_and_one_that_is_called_off_says_so(run: Run) -> None:  # noqa: F811
    asked = ("job", "create", "a cli moon", "--steps", 150, "--count", 64, "--request-id", "cli-moon", "-q")
    name = good(run(*asked)).strip()
    assert good(run(*asked)).strip() == name
    assert json.loads(good(run("job", "cancel", name, "--json")))["state"] == "JOB_STATE_CANCELLED"
    done = run("job", "fetch", name, "-o", "moon.png")
    assert (done.returncode, "is cancelled" in done.stderr) == (4, True)
    good(run("job", "delete", name))


def test_mistakes_are_told_in_one_line(run: Run) -> None:  # noqa: F811
    failed(run("job", "create"), 2, "say what to draw")
    failed(run("job", "create", "a", "--steps", 0), 4, "steps 0")
    failed(run("job", "create", "a", "--size", "large"), 2, "is not a size")
    failed(run("job", "watch", "nothing"), 3, "there is no job 'nothing'")
    failed(run("job", "list", "--state", "odd"), 2, "'odd' is no state")
    assert good(run("job", "list", "--creator", "nobody at all")).startswith("no job answers that")
