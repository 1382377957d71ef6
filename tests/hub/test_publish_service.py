"""Publishing with a sweep, and into another repository, over gRPC, from both clients and the command line."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from atelier import hub as module
from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client
from atelier.v1 import hub_pb2
from compose.warm import WarmPipeline
from tests.conftest import Running, serving
from tests.e2e.test_cli import failed, good
from tests.hub.standin import StandIn
from tests.hub.test_hub_service import CARD, hubs, run

MILO = Path("compose/pocket/adapters/milo.safetensors")


@pytest.fixture
def running(standin: StandIn, tmp_path: Path, warm: WarmPipeline) -> Iterator[Running]:
    with serving(tmp_path / "data", warm, hubs=hubs(standin)) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    """A client of a server that has milo."""
    with Client(running.address, timeout=120) as opened:
        opened.check_in(MILO, name="milo", card=CARD)
        yield opened


def pictures(standin: StandIn, repo: str = "ann/milo") -> list[str]:
    return [path for path in standin.repo(repo).head.files if path.endswith(".png")]


def test_a_push_with_a_sweep_shows_it_and_its_dry_run_shows_the_same(
    standin: StandIn, client: Client
) -> None:
    steps: list[hub_pb2.HubStep] = []
    dry = client.hub_push("milo", repo="ann/milo", sweep=True, dry_run=True, told=steps.append)
    assert standin.repos == {}
    assert len(client.get("milo").previews) == 0
    assert [(s.name, s.repo, s.what, s.done, s.total) for s in steps] == [
        ("milo", "ann/milo", "sweeping", done, 7) for done in range(8)
    ]
    steps.clear()
    done = client.hub_push("milo", repo="ann/milo", sweep=True, told=steps.append)
    assert list(dry.files) == list(done.files)
    assert (dry.card, dry.notes, dry.tag) == (done.card, done.notes, done.tag)
    assert list(dict.fromkeys(step.what for step in steps)) == ["sweeping", "uploading"]
    (path,) = pictures(standin)
    (shown,) = client.get("milo").previews
    assert re.fullmatch(r"sweep: milo 0 to 1\.2; .*milo.*", shown.caption)
    assert path == f"images/{shown.digest[7:23]}.png"
    assert path.encode() in done.card
    file = standin.repo("ann/milo").head.files[path]
    image = Image.open(io.BytesIO(standin.storage.path(file.sha256).read_bytes()))
    assert image.width > 3 * image.height  # seven in a row
    again = client.hub_push("milo", sweep=True)  # the same picture, once
    assert (again.made, len(client.get("milo").previews)) == (False, 1)
    assert pictures(standin) == [path]


def test_nothing_is_rendered_for_a_push_that_is_refused(standin: StandIn, client: Client) -> None:
    standin.repo("ann/public")
    steps: list[hub_pb2.HubStep] = []
    for private, repo, message in ((True, "ann/public", "is there and public"), (False, "", "where to")):
        with pytest.raises(AtelierError, match=message):
            client.hub_push("milo", repo=repo, private=private, sweep=True, told=steps.append)
    assert steps == []


def test_a_version_that_the_base_cannot_sweep_is_refused_by_name(
    standin: StandIn, client: Client, tmp_path: Path
) -> None:
    save_file({"<glow>": torch.randn(2, 768)}, tmp_path / "glow.safetensors")
    client.check_in(tmp_path / "glow.safetensors", name="glow", card=CARD)
    with pytest.raises(AtelierError, match="no sweep of glow:1: ") as caught:
        client.hub_push("glow", repo="ann/glow", sweep=True)
    assert caught.value.code in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT}
    assert standin.repos == {}


async def test_the_async_client_sweeps_and_relinks_too(
    standin: StandIn, running: Running, client: Client
) -> None:
    async with AsyncClient(running.address) as aio:
        await aio.hub_push("milo", repo="ann/milo", sweep=True)
        assert len(pictures(standin)) == 1
        with pytest.raises(AtelierError, match="--relink") as caught:
            await aio.hub_push("milo", repo="ann/other")
        assert caught.value.code is grpc.StatusCode.ABORTED
        done = await aio.hub_push("milo", repo="ann/other", relink=True)
        assert done.url == f"{standin.url}/ann/other"
        assert [link.repo for link in (await aio.hub_status()).links] == ["ann/other"]


def test_a_renamed_repository_has_a_status(standin: StandIn, client: Client) -> None:
    standin.repo("ann/new")
    standin.renamed["ann/old"] = "ann/new"
    with pytest.raises(AtelierError, match=r"ann/old has been renamed; it is ann/new now") as caught:
        client.hub_push("milo", repo="ann/old")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_the_command_line_sweeps_and_relinks(standin: StandIn, running: Running, client: Client) -> None:
    shown = good(run(running, "hub", "push", "milo", "--repo", "ann/milo", "--sweep", "--dry-run"))
    (path,) = re.findall(r"would send  (images/\w+\.png)  \d+ bytes", shown)
    assert f"url: {path}" in shown
    good(run(running, "hub", "push", "milo", "--repo", "ann/milo", "--sweep"))
    assert pictures(standin) == [path]
    failed(run(running, "hub", "push", "milo", "--repo", "ann/other"), 5, "--relink leaves that as it is")
    told = good(run(running, "hub", "push", "milo", "--repo", "ann/other", "--relink"))
    assert told.startswith(f"milo:1 is published: {standin.url}/ann/other at ")


def test_a_bar_counts_cells_as_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(module, "err", Console(file=out, force_terminal=True, width=120))
    with module.bars() as told:
        told(hub_pb2.HubStep(name="milo", what="sweeping", done=3, total=7))
    assert "sweeping milo" in out.getvalue()
    assert "3/7 cells" in out.getvalue()
    with module.bars() as told:
        told(hub_pb2.HubStep(name="milo", what="uploading", done=1000, total=2000))
    assert "1.0/2.0 kB" in out.getvalue()
