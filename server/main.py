"""The composition root: `python -m server --data DIR` opens the catalog, warms the base, and serves until
told to stop.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from atelier.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    compose_pb2,
    compose_pb2_grpc,
    hub_pb2,
    hub_pb2_grpc,
    render_pb2,
    render_pb2_grpc,
)
from compose import bases
from compose.errors import ComposeError, InvalidRequest
from compose.warm import warm_up
from registry.catalog import Catalog
from registry.errors import Damaged, InvalidFile, Locked, RegistryError
from registry.hub.endpoint import DEFAULT, endpoint
from server.arguments import Parser
from server.auth import Gate, Tokens
from server.calibrations import Calibrations
from server.catalog import CatalogServicer
from server.choosing import Chooser
from server.compose import ComposeServicer
from server.engine import Engine, InProcessEngine
from server.hub import Hubs, HubServicer
from server.likes import Likes
from server.render import RenderServicer
from server.scheduler import CAPACITY, Scheduler
from server.stacks import Stacks
from server.uploads import Uploads

DRAIN_SECONDS = 30.0
MESSAGE_LIMIT = 72 << 20  # a PNG to replay comes in one message
USAGE, INVALID, CONFLICT, UNAVAILABLE = 2, 4, 5, 6
SERVICES = (
    catalog_pb2.DESCRIPTOR.services_by_name["CatalogService"].full_name,
    compose_pb2.DESCRIPTOR.services_by_name["ComposeService"].full_name,
    render_pb2.DESCRIPTOR.services_by_name["RenderService"].full_name,
    hub_pb2.DESCRIPTOR.services_by_name["HubService"].full_name,
)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers on `port`."""

    port: int
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer
    _queue: Scheduler
    _watched: CatalogServicer

    async def stop(self, drain: float) -> None:
        """Health says NOT_SERVING, accepted renders get `drain` seconds to finish, then every call ends:
        those that watch at once, others within 5 seconds.
        """
        await self._health.enter_graceful_shutdown()
        await asyncio.to_thread(self._queue.close, drain)
        self._watched.stop_watching()
        await self._server.stop(5)


async def start(
    catalog: Catalog,
    engine: Engine,
    *,
    listen: str,
    device: str,
    tokens: Tokens | None = None,
    capacity: int = CAPACITY,
    hubs: Hubs | None = None,
) -> Running:
    """Answers on `listen` from now on. Raises OSError when the address is taken."""
    calibrations, checks = Calibrations(catalog, engine.info.base), health.aio.HealthServicer()
    stacks = Stacks(catalog, calibrations, device=device)
    server = grpc.aio.server(
        interceptors=[Gate(tokens)] if tokens is not None else [],
        options=[
            ("grpc.so_reuseport", 0),  # or a second server would silently share the port
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ],
    )
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        raise OSError(
            f"cannot listen on {listen}: it is in use or not ours; choose another --listen"
        ) from None
    queue, likes = Scheduler(engine, capacity=capacity), Likes(catalog)
    chooser = Chooser(stacks, queue, engine.info, calibrations)
    watched = CatalogServicer(catalog, likes, Uploads(catalog.blobs))
    compose = ComposeServicer(catalog, stacks, likes, engine.norms(), chooser)
    render = RenderServicer(stacks, queue, engine.info, calibrations, chooser)
    catalog_pb2_grpc.add_CatalogServiceServicer_to_server(watched, server)
    compose_pb2_grpc.add_ComposeServiceServicer_to_server(compose, server)
    render_pb2_grpc.add_RenderServiceServicer_to_server(render, server)
    hub_pb2_grpc.add_HubServiceServicer_to_server(HubServicer(catalog, hubs or Hubs()), server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    for service in ("", *SERVICES):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    return Running(port, server, checks, queue, watched)


async def serve(
    catalog: Catalog, engine: Engine, *, listen: str, device: str, tokens: Tokens, hubs: Hubs
) -> None:
    """Serves until SIGTERM or SIGINT, then lets accepted renders finish."""
    running = await start(catalog, engine, listen=listen, device=device, tokens=tokens, hubs=hubs)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"listening on {listen.rsplit(':', 1)[0]}:{running.port}", flush=True)
    await stop.wait()
    await running.stop(DRAIN_SECONDS)


def main() -> int:
    """Parses the command line; the exit status."""
    parser = Parser(prog="atelier serve", description="Serve a catalog and a warm base over gRPC.")
    parser.add_argument("--data", type=Path, default=Path("atelier-data"), help="the catalog's directory")
    parser.add_argument("--listen", default="127.0.0.1:7431", help="HOST:PORT; port 0 takes a free one")
    parser.add_argument("--base", default="pocket", help="pocket, or a directory with a diffusers pipeline")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for rendering; 0: cores but one")
    parser.add_argument("--hub", action="append", help="a Hub that may be reached; may be repeated")
    parser.add_argument("--offline", action="store_true", help="reach no Hub")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr
    )
    for talkative in ("httpx", "httpx2"):  # they log links, which may be signed
        logging.getLogger(talkative).setLevel(logging.WARNING)
    try:
        device = _device(arguments.device)
        hubs = chosen_hubs(arguments.hub, offline=arguments.offline)
        torch.set_num_threads(_threads(arguments.threads))
        with closing(_catalog(arguments.data)) as catalog:
            tokens = _tokens(arguments.data, arguments.listen)
            engine = InProcessEngine(warm_up(bases.find(arguments.base), device=device))
            serving = serve(catalog, engine, listen=arguments.listen, device=device, tokens=tokens, hubs=hubs)
            asyncio.run(serving)
    except Locked as error:
        return _refuse(error, CONFLICT)
    except (ComposeError, RegistryError) as error:
        return _refuse(error, INVALID)
    except OSError as error:
        return _refuse(error, UNAVAILABLE)
    return 0


def chosen_hubs(urls: list[str] | None, *, offline: bool) -> Hubs:
    """Those that may be reached; where nobody says, as huggingface_hub's own variables do. Raises
    InvalidName.
    """
    urls = urls or [os.environ.get("HF_ENDPOINT") or DEFAULT]
    off = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return Hubs(tuple(map(endpoint, urls)), offline=offline or off)


def _device(name: str) -> str:
    """`auto` is a GPU where there is one. Raises InvalidRequest."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in {"cpu", *gpus, *(["cuda"] if gpus else [])}:
        have = ", ".join(["cpu", *gpus])
        raise InvalidRequest(f"the device {name!r} cannot be used; there is {have}", field="device")
    return name


def _threads(asked: int) -> int:
    """What rendering on a CPU gets: a core stays with the event loop, or every step waits for a thread that
    was pushed off it (655 ms instead of 354 for 20 steps of pocket on two cores). Raises InvalidRequest.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 0 <= asked <= cores:
        raise InvalidRequest(f"--threads {asked} is not within 0 and the {cores} cores here", field="threads")
    return asked or max(1, min(torch.get_num_threads(), cores - 1))


def _tokens(data: Path, listen: str) -> Tokens:
    """Who may call; beyond this machine nobody without a token. Raises InvalidRequest, InvalidFile."""
    tokens, host = Tokens(data), listen.rsplit(":", 1)[0].strip("[]")
    if not tokens and host != "localhost" and not _loopback(host):
        raise InvalidRequest(
            f"--listen {listen} reaches beyond this machine, where everybody could change the catalog; "
            f"make a token first: atelier token add NAME --role writer --data {data}",
            field="listen",
        )
    return tokens


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "unix"


def _catalog(data: Path) -> Catalog:
    """Opens the catalog. Raises Locked, Damaged, InvalidFile."""
    try:
        return Catalog(data)
    except sqlite3.DatabaseError as error:
        raise Damaged(f"{data / 'catalog.db'} is damaged ({error}); restore it from a backup") from None
    except OSError as error:
        raise InvalidFile(
            f"cannot use {data} as a catalog: {error.strerror}; choose another --data"
        ) from None


def _refuse(why: object, code: int) -> int:
    print(f"atelier serve: {why}", file=sys.stderr)
    return code
