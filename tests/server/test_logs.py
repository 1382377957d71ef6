"""The log of a real server: what each line says, and what none may."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from atelier.client import AtelierError, Client
from atelier.messages import render_request
from atelier.v1 import catalog_pb2, catalog_pb2_grpc, render_pb2_grpc
from compose.warm import WarmPipeline
from server.auth import Tokens
from server.calls import Call, working_for
from server.errors import status
from server.logs import Json, Text, worth_saying
from server.telemetry import Telemetry
from tests.conftest import serving

PROMPT = "a secret star of the north"


@contextmanager
def logged(formatter: logging.Formatter) -> Iterator[io.StringIO]:
    """What the server logs in the block."""
    text, log = io.StringIO(), logging.getLogger("atelier")
    handler, before = logging.StreamHandler(text), log.level
    handler.setFormatter(formatter)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield text
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def lines(text: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_every_call_is_a_line_with_its_request_and_never_its_prompt(
    warm: WarmPipeline, tmp_path: Path
) -> None:
    with (
        logged(Json()) as text,
        serving(tmp_path / "data", warm, telemetry=Telemetry()) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        metadata = (("x-request-id", "req-1"), ("atelier-user", 'ann "x" level=ERROR'))
        stub = render_pb2_grpc.RenderServiceStub(channel)
        list(stub.Render(render_request(PROMPT, steps=2), metadata=metadata))
        refused = stub.Render(render_request(PROMPT, steps=0), metadata=(("x-request-id", "req 2"),))
        with pytest.raises(grpc.RpcError) as caught:
            list(refused)
        given = dict(caught.value.trailing_metadata())["x-request-id"]
    done, failed = lines(text)
    assert (done["request_id"], done["rpc"], done["outcome"]) == ("req-1", "Render", "OK")
    assert (done["client"], done["base"], done["steps"]) == ('ann "x" level=ERROR', "pocket", 2)
    assert done["seconds"] > 0
    assert (failed["request_id"], failed["outcome"]) == (given, "INVALID_ARGUMENT")
    assert len(given) == 32  # what was said is no identifier
    assert failed["client"].startswith("ipv4:127.0.0.1:")
    assert "secret" not in text.getvalue()


def test_a_job_is_a_line_with_its_name_and_whose_it_is(warm: WarmPipeline, tmp_path: Path) -> None:
    with (
        logged(Json()) as text,
        serving(tmp_path / "data", warm, telemetry=Telemetry()) as running,
        Client(running.address, timeout=60) as client,
    ):
        job = client.create_job(PROMPT, steps=2)
        list(client.watch_job(job.name))
    told = {line["rpc"]: line for line in lines(text)}
    assert told["CreateJob"]["job"] == job.name
    assert (told["job"]["request_id"], told["job"]["client"]) == (job.name, job.creator)
    assert (told["job"]["outcome"], told["job"]["base"], told["job"]["steps"]) == ("OK", "pocket", 2)
    assert "secret" not in text.getvalue()


def test_prompts_are_logged_only_when_asked_for(warm: WarmPipeline, tmp_path: Path) -> None:
    telemetry = Telemetry(log_prompts=True)
    with (
        logged(Text()) as text,
        serving(tmp_path / "data", warm, telemetry=telemetry) as running,
        Client(running.address) as client,
    ):
        list(client.render(PROMPT, steps=1))
    (line,) = text.getvalue().splitlines()
    assert f'prompt="{PROMPT}"' in line
    assert " atelier INFO Render OK 0." in line
    assert " request=" in line


def test_a_token_is_in_no_line(warm: WarmPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    tokens = Tokens(tmp_path / "data")
    token = tokens.add("ann", "reader")
    with logged(Json()) as text, serving(tmp_path / "data", warm, tokens=tokens) as running:
        monkeypatch.setenv("ATELIER_TOKEN", token)
        with Client(running.address) as client:
            list(client.render(PROMPT, steps=1))
            with pytest.raises(AtelierError, match="needs the role writer"):
                client.delete("hero")
        monkeypatch.setenv("ATELIER_TOKEN", f"{token}x")
        with Client(running.address) as client, pytest.raises(AtelierError, match="does not know"):
            list(client.render(PROMPT, steps=1))
        with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError):
            catalog_pb2_grpc.CatalogServiceStub(channel).GetVersion(catalog_pb2.GetVersionRequest(ref="x"))
    told = [(line["client"], line["rpc"], line["outcome"]) for line in lines(text)]
    assert told[0] == ("ann", "Render", "OK")
    assert [outcome for _, _, outcome in told[1:]] == ["PERMISSION_DENIED", *["UNAUTHENTICATED"] * 2]
    assert token not in text.getvalue()
    assert token.removeprefix("atelier_")[:12] not in text.getvalue()


def test_a_fault_is_told_and_logged_under_the_request() -> None:
    call = Call(Telemetry(), "Render", request_id="req-9", client="ann")
    with logged(Json()) as text, working_for(call):
        code, message, _ = status(RuntimeError("the fan fell off"))
    assert (code, message) == (
        grpc.StatusCode.INTERNAL,
        "a fault in the server, in its log as req-9; please report it",
    )
    (line,) = lines(text)
    assert (line["level"], line["request_id"], line["client"]) == ("ERROR", "req-9", "ann")
    assert "RuntimeError: the fan fell off" in line["traceback"]


def test_a_line_outside_of_every_call_names_none() -> None:
    with logged(Text()) as text:
        logging.getLogger("atelier").warning("the calibration of %s is not used", "hero:1")
    assert text.getvalue().endswith("atelier WARNING the calibration of hero:1 is not used\n")


def test_who_hangs_up_while_something_is_sent_is_no_fault() -> None:
    grpcs, text = logging.getLogger("grpc._cython.cygrpc"), io.StringIO()
    handler = logging.StreamHandler(text)
    handler.addFilter(worth_saying)
    grpcs.addHandler(handler)
    try:
        for error in ("ExecuteBatchError", "InternalError"):
            grpcs.error("%s raised in core by servicer method [/atelier.v1.RenderService/Render]", error)
    finally:
        grpcs.removeHandler(handler)
    assert text.getvalue().splitlines() == [
        "InternalError raised in core by servicer method [/atelier.v1.RenderService/Render]"
    ]
