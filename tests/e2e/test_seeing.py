"""`atelier top`, metrics and the log of a server process, as whoever runs the machine sees them."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atelier.client import Client
from tests.conftest import Running
from tests.e2e.test_cli import atelier, failed, good, hear_interrupts
from tests.e2e.test_serve import process, refused
from tests.server.test_telemetry import scrape


def test_top_prints_a_frame_for_people_and_for_programs(server: Running) -> None:
    with Client(server.address) as client:
        list(client.render("a star", steps=1))
    shown = good(atelier("top", "--once", server=server.address))
    assert re.match(r"atelier \d\S*  up \d+:\d\d:\d\d", shown)
    for wanted in ("renders/s", "running", "nothing", "waiting  0 of 64", "denoise", "pocket on cpu"):
        assert wanted in shown
    told = json.loads(good(atelier("top", "--once", "--json", server=server.address)))
    assert told["bases"][0]["name"] == "pocket"
    assert int(told["outcomes"]["done"]) >= 1
    failed(atelier("top", "--once"), 6, "no server answers at 127.0.0.1:1")
    assert atelier("top", "--interval", "0").returncode == 2


def test_a_server_tells_its_metrics_and_logs_calls_as_json(tmp_path: Path) -> None:
    more = ("--metrics", "127.0.0.1:0", "--log-format", "json")
    with process(tmp_path / "data", "127.0.0.1:0", *more) as (server, address), Client(address) as client:
        assert server.stderr is not None
        first = json.loads(server.stderr.readline())
        found = re.fullmatch(r"metrics on http://(127\.0\.0\.1:\d+)/metrics", first["message"])
        assert found
        list(client.render("a secret star", steps=1))
        assert scrape(found[1])["atelier_renders_total", "done"] == 1
        taken = found[1]
        code, told = refused(tmp_path / "other", "127.0.0.1:0", "--metrics", taken)
        assert (code, f"cannot serve metrics on {taken}" in told) == (6, True)
        server.send_signal(signal.SIGTERM)
        rest = [json.loads(line) for line in server.stderr]
        assert server.wait(30) == 0
    (line,) = [line for line in rest if line["message"] == "Render OK"]
    assert line["request_id"]
    assert "secret" not in json.dumps(rest)


@contextmanager
def following(address: str) -> Iterator["tuple[subprocess.Popen[str], list[float]]"]:
    """`atelier top --json` in a process of its own, and the uptimes of its first three lines."""
    with subprocess.Popen(
        [sys.executable, "-m", "atelier.cli", "top", "--json", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ATELIER_SERVER": address},
        preexec_fn=hear_interrupts,
    ) as process:
        assert process.stdout
        yield process, [json.loads(process.stdout.readline())["uptime_seconds"] for _ in range(3)]


def test_top_follows_until_it_is_interrupted(server: Running) -> None:
    with following(server.address) as (top, seen):
        assert seen == sorted(set(seen))
        top.send_signal(signal.SIGINT)
        _, told = top.communicate(timeout=60)
    assert (top.returncode, told) == (130, "atelier: interrupted\n")


def test_top_ends_with_the_server_and_says_so(tmp_path: Path) -> None:
    with process(tmp_path / "data") as (server, address), following(address) as (top, _):
        server.send_signal(signal.SIGTERM)
        _, told = top.communicate(timeout=60)
        assert (top.returncode, told) == (6, f"atelier: the server at {address} has shut down\n")
        assert server.wait(30) == 0
