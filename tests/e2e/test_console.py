"""What all commands do alike: where they write, what they print as JSON, who stops reading, how they wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atelier.aio import AsyncClient
from atelier.cli import app
from atelier.client import Client
from atelier.typed import as_typed
from registry.catalog import Catalog
from server.auth import Tokens
from tests.conftest import Running
from tests.e2e.test_cli import atelier, failed, good


def test_nothing_is_rendered_for_a_directory_that_cannot_be_written_over(tmp_path: Path) -> None:
    """No server is asked: there is none."""
    failed(atelier("render", "a star", "-o", tmp_path), 4, f"{tmp_path} is a directory; name a file in it")


def test_json_says_what_is_zero_and_empty_too(server: Running) -> None:
    status = json.loads(good(atelier("top", "--once", "--json", server=server.address)))
    assert status["queue"]["waiting"] == 0
    assert status["queue"]["jobs"] == []
    told = good(atelier("job", "create", "a star", "--steps", 1, "--json", server=server.address))
    job = json.loads(told)
    assert (job["images"], job["priority"], job["error"]) == ([], 0, "")
    assert "end_time" not in job
    lines = good(atelier("job", "watch", job["name"], "--json", server=server.address)).splitlines()
    (image,) = [event["image"] for event in map(json.loads, lines) if "image" in event]
    assert image["image"] == 0


def unread(*command: object, **more: str) -> subprocess.CompletedProcess[str]:
    """A command whose output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "atelier.cli", *map(str, command)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **more},
        timeout=60,
    )
    os.close(writing)
    return done


@pytest.mark.parametrize(
    "command",
    ["bases --json", "bases", "methods", "list", "job list", "hub status", "top"],
)
def test_a_reader_who_has_seen_enough_is_no_error(server: Running, command: str) -> None:
    done = unread(*command.split(), ATELIER_SERVER=server.address)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_reader_of_a_local_command_who_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    Catalog(tmp_path / "data").close()
    tokens = Tokens(tmp_path / "data")
    for number in range(300):  # more than one buffer of output
        tokens.add(f"somebody-with-a-long-name-{number}", "reader")
    data = ("--data", tmp_path / "data")
    commands = (
        ("verify", *data),
        ("verify", "--json", *data),
        ("backup", tmp_path / "copy", *data),
        ("restore", tmp_path / "copy", "--data", tmp_path / "again"),
        ("token", "list", *data),
        ("--help",),
    )
    for command in commands:
        done = unread(*command)
        assert (command, done.returncode, done.stderr) == (command, 1, "")
    assert (tmp_path / "again" / "catalog.db").exists()


def test_a_full_disk_is_one_line(server: Running) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "atelier.cli", "bases", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "ATELIER_SERVER": server.address},
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (4, "atelier: No space left on device\n")


@pytest.mark.parametrize("timeout", ["nan", "inf", "0", "-1", "1e20"])
async def test_a_timeout_is_a_number_of_seconds(timeout: str) -> None:
    """gRPC takes all of these for a deadline that has passed."""
    failed(atelier("render", "a star", "--timeout", timeout), 4, "is not above 0 and up to 1e+09 seconds")
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="is not above 0"):
            kind(timeout=float(timeout))


def test_the_help_shows_brackets_as_they_are_typed() -> None:
    shown = CliRunner().invoke(app, ["render", "--help"]).output
    assert "[less]" in shown


def test_top_prints_frame_after_frame_where_there_is_no_screen(server: Running) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "atelier.cli", "top", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ATELIER_SERVER": server.address},
    ) as top:
        assert top.stdout is not None
        heads = (line for line in top.stdout if line.startswith("atelier "))
        assert [next(heads) for _ in range(2)]
        top.kill()


def test_who_calls_is_told_in_what_a_header_can_hold(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_USER", "änn\nb")
    monkeypatch.setenv("ATELIER_TOKEN", "one\ntwo")
    with Client(server.address, timeout=60) as client:
        assert [base.name for base in client.bases()] == ["pocket"]
        assert client.create_job("a star", steps=1).creator == "?nn?b"


@pytest.mark.parametrize(
    ("message", "told", "words"),
    [
        ("common.stack[1].ref: there is no 'b'", {"stack": "a=1, b@x=2"}, "b@x: there is no 'b'"),
        ("common.stack[0].ref: there is no 'a'", {"what": "a"}, "a: there is no 'a'"),
        ("common.stack[0].ref: there is no 'a'", {"ref": "a"}, "there is no 'a'"),
        ("axes[1] does not say", {"by": ["seed=1"]}, "--by seed=1 does not say"),
        ("axes[0].weight.values[6]: weight 1", {"over": None}, "weight 1"),
        (
            "controls[0] acts from 1 to 0; begin",
            {"control": ["c=e:1..0"]},
            "--control c=e:1..0 acts from 1 to 0; begin",
        ),
        ("the control_images is damaged", {"control": ["e.png"]}, "--control is damaged"),
        ("negative_prompt has 9 characters", {"negative": "x"}, "--negative has 9 characters"),
        ("request_id 'x' is not of", {"request_id": "x"}, "--request-id 'x' is not of"),
        ("steps 0 is not within 1 and 150", {"steps": 0}, "steps 0 is not within 1 and 150"),
        ("the image is damaged", {"image": "x"}, "the image is damaged"),
    ],
)
def test_errors_say_what_was_typed(message: str, told: dict[str, object], words: str) -> None:
    assert as_typed(message, told) == words
