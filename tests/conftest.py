"""One fixture per real thing: the warm embedded base, an adapter file, a gRPC server on a real socket."""

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from atelier.client import Client, Rendering
from atelier.v1 import render_pb2
from compose import bases
from compose.clip import Clip
from compose.warm import WarmPipeline, warm_up
from registry.catalog import Catalog
from server.auth import Tokens
from server.engine import InProcessEngine
from server.hub import Hubs
from server.scheduler import Scheduler
from server.serving import start
from server.telemetry import Telemetry
from tests.adapters import random_factors, write_kohya

SEEDS = itertools.count(10_000)
DEVICE = os.environ.get("ATELIER_TEST_DEVICE", "cpu")
"""Where the embedded base lies, in float32."""

torch.set_num_threads(
    1
)  # the pictures are tiny: a second thread costs more than it brings, and xdist uses the other core


@pytest.fixture(scope="session")
def warm() -> WarmPipeline:
    """The embedded base, shared by the session."""
    return warm_up(bases.find("pocket"), device=DEVICE, dtype=torch.float32)


@pytest.fixture
def bare(warm: WarmPipeline) -> Iterator[WarmPipeline]:
    """The warm base, bare before and after."""
    warm.apply(())
    yield warm
    warm.apply(())
    assert warm.is_golden()


@dataclass(frozen=True, slots=True)
class Running:
    """A server in this process, on a real socket."""

    address: str
    catalog: Catalog
    engine: InProcessEngine
    queue: Scheduler
    stop: Callable[[float], None]


@contextmanager
def serving(
    data: Path,
    warm: WarmPipeline,
    *,
    capacity: int = 64,
    tokens: Tokens | None = None,
    engine: InProcessEngine | None = None,
    telemetry: Telemetry | None = None,
    hubs: Hubs | None = None,
    clip: Clip | None = None,
    device: str = DEVICE,
) -> Iterator[Running]:
    """Serves `data` on a free port, on a loop in its own thread."""
    catalog, engine = Catalog(data), engine or InProcessEngine(warm)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = asyncio.run_coroutine_threadsafe(
        start(
            catalog,
            engine,
            listen="127.0.0.1:0",
            device=device,
            capacity=capacity,
            tokens=tokens,
            telemetry=telemetry,
            hubs=hubs,
            clip=clip,
        ),
        loop,
    ).result(30)

    def stop(drain: float) -> None:
        asyncio.run_coroutine_threadsafe(running.stop(drain), loop).result(60)

    try:
        yield Running(f"127.0.0.1:{running.port}", catalog, engine, running.queue, stop)
    finally:
        stop(1.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        catalog.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, warm: WarmPipeline) -> Iterator[Running]:
    """One server for the session; tests choose asset names of their own."""
    with serving(tmp_path_factory.mktemp("catalog"), warm) as running:
        yield running


@contextmanager
def begun(rendering: Rendering, field: str) -> Iterator[Iterator[render_pb2.RenderResponse]]:
    """The events of a render after the first one of that kind; it is cancelled at the end of the block."""
    events = iter(rendering)
    while not next(events).HasField(field):
        pass
    yield events
    rendering.cancel()


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    """A client of that server."""
    with Client(server.address, timeout=60) as opened:
        yield opened


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A small kohya LoRA for pocket, of bytes that no other test has in the session's server."""
    path = tmp_path / "lora.safetensors"
    write_kohya(path, random_factors("pocket", seed=next(SEEDS), rank=4))
    return path
