"""The Hub over gRPC and from the command line, through the same code."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client
from atelier.v1 import hub_pb2, hub_pb2_grpc
from compose.warm import WarmPipeline
from registry.hub.client import Hub
from registry.hub.endpoint import Endpoint
from server.auth import Tokens
from server.hub import AT_ONCE, Hubs
from server.main import chosen_hubs, main
from tests.conftest import Running, serving
from tests.e2e.test_cli import Done, atelier, failed, good
from tests.hub.repos import File
from tests.hub.routes import Answer
from tests.hub.standin import TOKEN, StandIn, Trouble
from tests.hub.test_round_trip import png

CARD = b"---\nlicense: mit\ninstance_prompt: milo\n---\n\n# Milo\n"


def hubs(standin: StandIn, *, offline: bool = False, silent: float = 2.0) -> Hubs:
    """Those of a server that may reach the stand-in alone, and does not wait for it long."""

    def client(endpoint: Endpoint) -> Hub:
        return Hub(endpoint, silent=silent, answer=30.0, pauses=(0.01,))

    return Hubs((Endpoint(standin.url, TOKEN),), client=client, offline=offline)


@pytest.fixture
def running(standin: StandIn, tmp_path: Path, warm: WarmPipeline) -> Iterator[Running]:
    with serving(tmp_path / "data", warm, hubs=hubs(standin)) as server:
        yield server


@pytest.fixture
def client(running: Running, lora: Path) -> Iterator[Client]:
    """A client of a server that has milo."""
    with Client(running.address, timeout=60) as opened:
        opened.check_in(lora, name="milo", card=CARD)
        yield opened


def refused(error: pytest.ExceptionInfo[AtelierError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code, str(error.value)


def test_push_pull_sync_and_status(standin: StandIn, client: Client) -> None:
    steps: list[hub_pb2.HubStep] = []
    dry = client.hub_push("milo", repo="ann/milo", dry_run=True)
    assert (dry.commit, dry.made, dry.tag, standin.repos) == ("", False, "v1", {})
    assert [file.fresh for file in dry.files] == [True, True]
    client.add_preview("milo", png("red"))
    done = client.hub_push("milo", repo="ann/milo", private=True, told=steps.append)
    assert done.url == f"{standin.url}/ann/milo"
    assert done.commit == standin.repo("ann/milo").head.oid
    assert client.get("milo").card == done.card == standin.repo("ann/milo").head.files["README.md"].data
    assert {step.what for step in steps} == {"uploading"}
    assert steps[-1].done == steps[-1].total > 0
    pulled = client.hub_pull("ann/milo", name="again")
    assert (pulled.ref, pulled.created) == ("again:1", True)
    assert pulled.digest == client.get("milo").version.digest
    assert json.loads(client.get("again").version.origin_json)["commit"] == done.commit
    standin.repo("ann/milo").write({"README.md": File.regular(b"# Edited there")}, "theirs")
    assert {(o.name, o.action) for o in client.hub_sync()} == {("again", "pulled"), ("milo", "pulled")}
    assert client.get("again").card == client.get("milo").card == b"# Edited there"
    client.set_card("again", b"# Ours")
    status = client.hub_status()
    assert [(link.name, link.number, link.ahead) for link in status.links] == [
        ("again", 1, True), ("milo", 1, False),
    ]  # fmt: skip
    assert [(hub.url, hub.has_token) for hub in status.hubs] == [(standin.url, True)]
    assert [event.action for event in client.watch(wait=False)].count("publish") == 1


async def test_the_async_client_does_the_same(standin: StandIn, running: Running, client: Client) -> None:
    async with AsyncClient(running.address) as aio:
        done = await aio.hub_push("milo", repo="ann/milo")
        assert (await aio.hub_pull("ann/milo", revision=done.commit, name="pinned")).commit == done.commit
        assert [o.action async for o in aio.hub_sync(["milo"])] == ["unchanged"]
        assert [link.name for link in (await aio.hub_status()).links] == ["milo"]


def test_what_goes_wrong_has_a_status_and_says_what_to_do(
    standin: StandIn, running: Running, client: Client, lora: Path
) -> None:
    standin.repo("ann/gated", gated=True)
    client.save_stack({"milo": 1.0}, name="saved")
    code = grpc.StatusCode
    for call, status, message in (
        (lambda: client.hub_push("none", repo="ann/x"), code.NOT_FOUND, "there is no 'none'"),
        (lambda: client.hub_push("milo"), code.INVALID_ARGUMENT, "--repo ORG/NAME"),
        (lambda: client.hub_push("milo", repo="x"), code.INVALID_ARGUMENT, "ORG/NAME"),
        (lambda: client.hub_push("saved", repo="ann/x"), code.INVALID_ARGUMENT, "is a saved stack"),
        (lambda: client.hub_pull("ann/none"), code.NOT_FOUND, "there is no ann/none"),
        (lambda: client.hub_pull("ann/x", name="Ä"), code.INVALID_ARGUMENT, "is not a name"),
        (lambda: client.hub_pull("ann/x", hub="https://evil"), code.INVALID_ARGUMENT, "not among the server"),
        (lambda: list(client.hub_sync(["milo"])), code.NOT_FOUND, "has no repository on a Hub"),
        (lambda: client.hub_status(["milo"]), code.NOT_FOUND, "has no repository on a Hub"),
    ):
        with pytest.raises(AtelierError, match=message) as caught:
            call()
        assert caught.value.code is status
    with pytest.raises(ValueError, match="SYNC_KEEP_NOBODY"):
        list(client.hub_sync(keep="nobody"))
    standin.trouble(".*", Answer(429, {}, {"Retry-After": "900"}), times=9)
    with pytest.raises(AtelierError, match="asks to wait 900 s") as caught:
        client.hub_pull("ann/gated")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(running.address) as channel:
        stub = hub_pb2_grpc.HubServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raw:
            list(stub.Sync(hub_pb2.SyncRequest(keep=9)))  # type: ignore[arg-type]
        assert raw.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_names_are_counted(client: Client) -> None:
    for call in (client.hub_status, lambda names: list(client.hub_sync(names))):
        with pytest.raises(AtelierError, match="10001 names, at most 10000 at once") as caught:
            call(["milo"] * 10_001)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_card_that_cannot_be_one_here_is_left_there_when_asked_to(
    standin: StandIn, running: Running, client: Client, lora: Path
) -> None:
    weights = {"pytorch_lora_weights.safetensors": standin.storage.put(lora.read_bytes())}
    card = {"README.md": File.regular(b"---\na: &x [1]\nb: *x\n---\n")}
    standin.repo("ann/odd").write({**weights, **card}, "theirs")
    failed(run(running, "hub", "pull", "ann/odd"), 4, "`atelier hub pull ann/odd --without-card`")
    assert good(run(running, "hub", "pull", "ann/odd", "--without-card")).startswith("odd:1 is ann/odd at ")
    assert client.get("odd").card == b""
    assert [link.name for link in client.hub_status().links] == []


def test_a_failing_asset_is_told_of_and_the_others_go_on(
    standin: StandIn, client: Client, lora: Path
) -> None:
    client.hub_push("milo", repo="ann/milo")
    client.hub_pull("ann/milo", name="luna")
    standin.repo("ann/milo").write({"pytorch_lora_weights.safetensors": standin.storage.put(b"no")}, "bad")
    outcomes = {outcome.name: outcome for outcome in client.hub_sync()}
    assert {o.action for o in outcomes.values()} == {"failed"}
    assert "too few to be safetensors" in outcomes["milo"].notes[0]


def test_offline_reaches_no_hub_and_reads_what_is_here(
    standin: StandIn, tmp_path: Path, warm: WarmPipeline, lora: Path
) -> None:
    with serving(tmp_path / "data", warm, hubs=hubs(standin)) as server, Client(server.address) as client:
        client.check_in(lora, name="milo", card=CARD)
        client.hub_push("milo", repo="ann/milo")
    seen = len(standin.requests)
    offline = serving(tmp_path / "data", warm, hubs=hubs(standin, offline=True))
    with offline as server, Client(server.address) as client:
        for call in (lambda: client.hub_pull("ann/milo", name="x"), lambda: list(client.hub_sync())):
            with pytest.raises(AtelierError, match="stays off the network"):
                call()
        status = client.hub_status()
        assert (status.offline, [link.repo for link in status.links]) == (True, ["ann/milo"])
        assert client.get("milo").card
    assert len(standin.requests) == seen


def test_hanging_up_stops_the_work(standin: StandIn, running: Running, client: Client) -> None:
    client.hub_push("milo", repo="ann/milo")
    standin.trouble(".*", Answer(503, {}, {"Retry-After": "20"}), times=99)
    with Client(running.address, timeout=0.5) as hasty, pytest.raises(AtelierError) as caught:
        hasty.hub_pull("ann/milo", name="x")
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    standin._planned.clear()
    for _ in range(150):  # far less than the Hub asked for
        with suppress(AtelierError):
            assert client.hub_pull("ann/milo", name="x").created  # its name is free again
            break
        time.sleep(0.1)
    else:
        pytest.fail("the work goes on")


def test_a_hub_that_stalls_keeps_no_other_call_waiting(
    standin: StandIn, tmp_path: Path, warm: WarmPipeline, lora: Path
) -> None:
    patient = serving(tmp_path / "data", warm, hubs=hubs(standin, silent=60.0))
    with patient as server, Client(server.address, timeout=60) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        client.check_in(lora, name="milo")
        standin.trouble(".*", Trouble.STALL, times=99)
        waiting = [pool.submit(client.hub_pull, "ann/x", name=f"x{n}") for n in range(AT_ONCE)]
        while len(standin.requests) < AT_ONCE:
            time.sleep(0.02)
        assert client.get("milo").version.number == 1
        with pytest.raises(AtelierError, match=f"{AT_ONCE} calls talk to a Hub already") as caught:
            client.hub_pull("ann/x", name="more")
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        standin.stopping.set()  # lets them go
        standin._planned.clear()
        assert {type(done.exception(60)) for done in waiting} == {AtelierError}
        with pytest.raises(AtelierError, match="there is no ann/x"):
            client.hub_pull("ann/x", name="more")


def test_one_asset_is_exchanged_by_one_call_at_a_time(standin: StandIn, client: Client) -> None:
    standin.trouble("POST .*/commit/", Trouble.STALL)
    outcomes: list[str] = []

    def busy(step: hub_pb2.HubStep) -> None:
        if not outcomes:
            with pytest.raises(AtelierError, match="being published or pulled by another call") as caught:
                client.hub_push("milo", repo="ann/milo")
            outcomes.append(caught.value.code.name)

    client.hub_push("milo", repo="ann/milo", told=busy)
    assert outcomes == ["ABORTED"]


def test_roles(standin: StandIn, tmp_path: Path, warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    tokens = Tokens(tmp_path / "data")
    monkeypatch.setenv("ATELIER_TOKEN", tokens.add("ann", "reader"))
    guarded = serving(tmp_path / "data", warm, tokens=tokens, hubs=hubs(standin))
    with guarded as server, Client(server.address) as client:
        assert client.hub_status().hubs[0].url == standin.url
        for call in (
            lambda: client.hub_push("milo", repo="ann/milo"),
            lambda: client.hub_pull("ann/milo"),
            lambda: list(client.hub_sync()),
        ):
            with pytest.raises(AtelierError, match="needs the role writer"):
                call()
    assert standin.requests == []


def test_the_token_is_in_no_status_no_trailer_and_no_log(
    standin: StandIn, running: Running, client: Client, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    client.hub_push("milo", repo="ann/milo")
    told: list[str] = []
    with grpc.insecure_channel(running.address) as channel:
        stub = hub_pb2_grpc.HubServiceStub(channel)
        for trouble in (
            Trouble.CUT_BEFORE,
            *(Answer(n, {"error": TOKEN}) for n in (400, 401, 403, 404, 500)),
        ):
            standin.trouble(".*", trouble, times=99)
            for call in (
                stub.Push(hub_pb2.PushRequest(ref="milo")),
                stub.Pull(hub_pb2.PullRequest(repo="ann/milo", name="x")),
                stub.Sync(hub_pb2.SyncRequest()),
            ):
                with suppress(grpc.RpcError):
                    told += [str(event) for event in call]
                told += [str(call.code()), str(call.details()), str(call.trailing_metadata())]
            standin._planned.clear()
        told.append(str(stub.Status(hub_pb2.StatusRequest())))
    assert len(told) > 50
    assert not [text for text in told if "INTERNAL" in text]
    assert TOKEN not in "".join(told) + caplog.text
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def run(server: Running, *arguments: object) -> Done:
    return atelier(*arguments, server=server.address)


def test_an_artist_publishes_from_the_command_line(
    standin: StandIn, running: Running, client: Client
) -> None:
    shown = good(run(running, "hub", "push", "milo", "--repo", "ann/milo", "--dry-run"))
    assert "would send  pytorch_lora_weights.safetensors" in shown
    assert "template:sd-lora" in shown
    told = good(run(running, "hub", "push", "milo", "--repo", "ann/milo"))
    assert re.fullmatch(rf"milo:1 is published: {standin.url}/ann/milo at [0-9a-f]{{8}}, tag v1\n", told)
    told = good(run(running, "hub", "pull", "ann/milo@v1", "--name", "pinned"))
    assert told.startswith("pinned:1 is ann/milo at ")
    assert good(run(running, "hub", "sync")) == "1 unchanged\n"
    client.set_card("milo", b"---\nlicense: mit\n---\n# Ours\n")
    assert re.search(r"milo +ann/milo +1 +[0-9a-f]{8} +ahead", good(run(running, "hub", "status")))
    standin.repo("ann/milo").write({"README.md": File.regular(b"# Theirs")}, "theirs")
    done = run(running, "hub", "sync", "milo")
    assert done.returncode == 5
    assert "milo: conflict, ann/milo\n  ours:\n" in done.stdout
    assert "+# Theirs" in done.stdout
    assert "choose with --keep" in done.stderr
    outcome = json.loads(good(run(running, "hub", "sync", "--keep", "theirs", "--json")))
    assert (outcome["name"], outcome["action"]) == ("milo", "pulled")


@contextmanager
def watching(server: Running, *names: str) -> Iterator[subprocess.Popen[str]]:
    """`atelier hub sync --watch`, until it is interrupted."""
    command = [sys.executable, "-m", "atelier.cli", "hub", "sync", *names, "--watch", "--every", "1"]
    environment = {**os.environ, "ATELIER_SERVER": server.address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_watching_goes_on_until_interrupted(standin: StandIn, running: Running, client: Client) -> None:
    client.hub_push("milo", repo="ann/milo")
    with watching(running, "milo") as process:
        assert process.stdout.readline() == "milo: unchanged, ann/milo\n"
        standin.repo("ann/milo").write({"README.md": File.regular(b"# Edited there")}, "theirs")
        assert process.stdout.readline() == "milo: pulled, ann/milo, version 1\n"
    assert client.get("milo").card == b"# Edited there"


def test_watching_says_that_it_does_and_when_what_failed_is_well_again(
    standin: StandIn, running: Running, client: Client
) -> None:
    client.hub_push("milo", repo="ann/milo")
    with watching(running) as process:
        assert process.stderr.readline() == "1 unchanged; looking again every 1 s\n"
        standin.trouble(".*", Answer(503, {}), times=3)
        assert process.stdout.readline() == "milo: failed, ann/milo\n"
        assert process.stderr.readline() == f"note: {standin.url} answered 503; try again later\n"
        standin._planned.clear()
        assert process.stdout.readline() == "milo: unchanged, ann/milo\n"


def test_what_the_command_line_refuses(standin: StandIn, running: Running, client: Client) -> None:
    failed(run(running, "hub", "push", "milo"), 4, "where to? milo has no repository yet; --repo ORG/NAME")
    failed(run(running, "hub", "pull", "ann/none"), 3, "there is no ann/none on")
    failed(run(running, "hub", "pull", "ann/none@"), 2, "which revision?")
    failed(run(running, "hub", "sync", "--keep", "mine"), 2, "choose ours, theirs, both")
    failed(run(running, "hub", "sync", "--direction", "up"), 2, "choose both, push, pull")


def test_where_nobody_says_which_hub_huggingface_hubs_own_variables_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (public,) = chosen_hubs(None, offline=False).endpoints
    assert (public.url, public.token) == ("https://huggingface.co", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = chosen_hubs(None, offline=False)
    assert ([one.url for one in found.endpoints], found.offline) == (["https://hub.example"], True)
    said = chosen_hubs(["https://a.example,files.a.example", "https://b.example"], offline=False)
    assert [(one.url, one.token, one.storage) for one in said.endpoints] == [
        ("https://a.example", "", ("files.a.example",)), ("https://b.example", "", ()),
    ]  # fmt: skip


def test_a_server_is_not_started_with_a_hub_in_the_clear(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--hub", "http://hub.example", f"--data={tmp_path}"])
    assert main() == 4
    assert "would send files and tokens in the clear; write --hub https://hub.ex" in capsys.readouterr().err
