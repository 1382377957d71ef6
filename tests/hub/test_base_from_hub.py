"""A base that is named as hub:ORGANISATION/NAME: downloaded once, and there without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atelier.client import Client
from compose import bases, pocket
from tests.e2e.test_serve import process
from tests.hub.repos import File
from tests.hub.standin import StandIn

FIND = """
import sys
from compose import bases
from compose.errors import ComposeError
for told in sys.argv[1].split(","):
    try:
        base = bases.find(told, offline=sys.argv[2] == "offline")
        print(base.name, base.family, base.digest)
    except ComposeError as error:
        print("refused:", error)
"""


@pytest.fixture
def published(standin: StandIn) -> str:
    """The embedded base in a repository; the commit that holds it."""
    files = {
        path.relative_to(pocket.WEIGHTS).as_posix(): standin.storage.put(path.read_bytes())
        if path.suffix == ".safetensors"
        else File.regular(path.read_bytes())
        for path in pocket.WEIGHTS.rglob("*")
        if path.is_file()
    }
    return standin.repo("ann/pocket").write(files, "weights").oid


def surroundings(standin: StandIn, home: Path) -> dict[str, str]:
    """A machine on which nothing was downloaded, and whose Hub is the stand-in."""
    told = {"HF_ENDPOINT": standin.url, "HF_HOME": str(home)}
    return told | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": ""}


def found(told: str, standin: StandIn, home: Path, *, offline: bool = False) -> str:
    """What a process of its own makes of it: the endpoint is read when huggingface_hub is imported."""
    done = subprocess.run(
        [sys.executable, "-c", FIND, told, "offline" if offline else ""],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **surroundings(standin, home)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_base_is_downloaded_once_and_is_there_without_a_network(
    standin: StandIn, published: str, tmp_path: Path
) -> None:
    here = bases.find("pocket")
    told = f"studio=hub:ann/pocket@{published}"
    assert found(told, standin, tmp_path / "home") == f"studio pocket {here.digest}"
    assert not any(request.authorization for request in standin.requests)
    environment = surroundings(standin, tmp_path / "home")
    with (
        standin.counted() as seen,
        process(tmp_path / "data", "127.0.0.1:0", "--offline", "--base", told, **environment) as (_, address),
        Client(address, timeout=60) as client,
    ):
        assert [(base.name, base.digest) for base in client.bases()] == [("studio", here.digest)]
        assert list(client.render("a red star", steps=1))
    assert seen == []


def test_offline_a_base_that_is_not_here_is_not_asked_for(
    standin: StandIn, published: str, tmp_path: Path
) -> None:
    with standin.counted() as seen:
        told = f"hub:ann/pocket@{published}"
        answer = found(told, standin, tmp_path / "home", offline=True)
    assert answer.startswith(f"refused: {told} cannot be had: ")
    assert [request for request in seen if "pocket" in request.path] == []


def test_a_base_that_no_hub_has_is_refused_in_a_line(standin: StandIn, tmp_path: Path) -> None:
    wrong = ("hub:ann/nothing", "hub:../etc", "hub:")
    answers = found(",".join(wrong), standin, tmp_path / "home").splitlines()
    assert len(answers) == len(wrong), answers
    for told, answer in zip(wrong, answers, strict=True):
        assert answer.startswith(f"refused: {told} cannot be had: ")
