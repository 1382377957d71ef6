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
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
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
    engine_pb2,
    engine_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    render_pb2,
    render_pb2_grpc,
    sweep_pb2,
    sweep_pb2_grpc,
)
from compose import bases
from compose.errors import ComposeError, InvalidRequest
from compose.residence import Residence
from compose.warm import warm_up
from registry.catalog import Catalog
from registry.errors import Damaged, InvalidFile, Locked, RegistryError
from server import logs, tracing
from server.arguments import Parser
from server.auth import Gate, Tokens
from server.calibrations import Calibrations
from server.catalog import CatalogServicer
from server.choosing import Chooser
from server.compose import ComposeServicer
from server.engine import Engine, InProcessEngine
from server.jobs import JobServicer
from server.likes import Likes
from server.observer import Observer
from server.render import RenderServicer
from server.rendering import Renderings
from server.runner import KEPT, JobRunner
from server.scheduler import CAPACITY, Scheduler
from server.stacks import Stacks
from server.status import EngineServicer, Machine
from server.sweep import SweepServicer
from server.sweeps import Sweeps
from server.telemetry import Telemetry
from server.uploads import Uploads
from server.watched import Watched

log = logging.getLogger("atelier")
DRAIN_SECONDS = 30.0
MESSAGE_LIMIT = 72 << 20  # a PNG to replay comes in one message
USAGE, INVALID, CONFLICT, UNAVAILABLE = 2, 4, 5, 6
SERVICES = (
    catalog_pb2.DESCRIPTOR.services_by_name["CatalogService"].full_name,
    compose_pb2.DESCRIPTOR.services_by_name["ComposeService"].full_name,
    render_pb2.DESCRIPTOR.services_by_name["RenderService"].full_name,
    jobs_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
    engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name,
    sweep_pb2.DESCRIPTOR.services_by_name["SweepService"].full_name,
)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers on `port`."""

    port: int
    queue: Scheduler
    _runner: JobRunner
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer
    _watched: tuple[CatalogServicer, EngineServicer]

    async def stop(self, drain: float) -> None:
        """Health says NOT_SERVING, accepted renders get `drain` seconds to finish, then every call ends:
        those that watch at once, others within 5 seconds. Jobs that wait, or were not done in time, are done
        after the next start.
        """
        await self._health.enter_graceful_shutdown()
        await asyncio.to_thread(self.queue.close, drain)
        await self._runner.stop()
        for watched in self._watched:
            watched.stop_watching()
        await self._server.stop(5)


async def start(
    catalog: Catalog,
    engine: Engine,
    *,
    listen: str,
    device: str,
    tokens: Tokens | None = None,
    capacity: int = CAPACITY,
    keep_jobs: timedelta = KEPT,
    telemetry: Telemetry | None = None,
) -> Running:
    """Answers on `listen` from now on. Raises OSError when the address is taken."""
    telemetry = telemetry or Telemetry()
    calibrations, checks = Calibrations(catalog, engine.info.base), health.aio.HealthServicer()
    stacks = Stacks(catalog, calibrations, device=device)
    server = grpc.aio.server(
        interceptors=[Observer(telemetry), *([Gate(tokens)] if tokens is not None else [])],
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
    watching, likes = Watched(engine, telemetry), Likes(catalog)
    queue = Scheduler(watching, capacity=capacity)
    chooser = Chooser(stacks, queue, engine.info, calibrations)
    watched = CatalogServicer(catalog, likes, Uploads(catalog.blobs))
    compose = ComposeServicer(catalog, stacks, likes, engine.norms(), chooser)
    renderings = Renderings(stacks, queue, engine.infos)
    runner = JobRunner(catalog.jobs, renderings, keep=keep_jobs)
    render = RenderServicer(stacks, queue, engine.infos, calibrations, chooser, renderings)
    sweep = SweepServicer(Sweeps(stacks, renderings, engine.info, calibrations))
    status = EngineServicer(Machine(catalog, stacks, queue, watching, telemetry))
    catalog_pb2_grpc.add_CatalogServiceServicer_to_server(watched, server)
    compose_pb2_grpc.add_ComposeServiceServicer_to_server(compose, server)
    render_pb2_grpc.add_RenderServiceServicer_to_server(render, server)
    sweep_pb2_grpc.add_SweepServiceServicer_to_server(sweep, server)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(status, server)
    jobs_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(catalog, renderings, runner), server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await runner.start()
    await server.start()
    for service in ("", *SERVICES):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    return Running(port, queue, runner, server, checks, (watched, status))


async def serve(
    catalog: Catalog,
    engine: Engine,
    *,
    listen: str,
    device: str,
    tokens: Tokens,
    keep_jobs: timedelta,
    telemetry: Telemetry,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets accepted renders finish."""
    running = await start(
        catalog, engine, listen=listen, device=device, tokens=tokens, keep_jobs=keep_jobs, telemetry=telemetry
    )
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
    parser.add_argument(
        "--base",
        action="append",
        metavar="[NAME=]BASE",
        help="pocket, a directory with a diffusers pipeline, or hub:ORGANISATION/NAME; several times for "
        "several, the first is loaded at once",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="for all warm bases; the least recently used is let go (default: 90%% of the device's)",
    )
    parser.add_argument(
        "--adapter-memory",
        type=float,
        default=2.0,
        metavar="GB",
        help="for adapters that are held (2)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for rendering; 0: cores but one")
    parser.add_argument(
        "--keep-jobs", type=float, default=KEPT.days, help="days that a job is kept after its end"
    )
    parser.add_argument("--metrics", default="", help="HOST:PORT for Prometheus; nowhere when left out")
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="text, or JSON lines")
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info", help="info: a line a call")
    parser.add_argument("--log-prompts", action="store_true", help="show in the log what was asked for")
    arguments = parser.parse_args()
    logs.configure(arguments.log_format, arguments.log_level)
    try:
        device = _device(arguments.device)
        torch.set_num_threads(_threads(arguments.threads))
        keep_jobs = _days(arguments.keep_jobs)
        with ExitStack() as stack:
            catalog = stack.enter_context(closing(_catalog(arguments.data)))
            tokens = _tokens(arguments.data, arguments.listen)
            engine = _engine(arguments.base or ["pocket"], device, arguments.memory)
            tracers = stack.enter_context(tracing.exporting())
            telemetry = Telemetry(tracers=tracers, log_prompts=arguments.log_prompts)
            if arguments.metrics:
                address = stack.enter_context(telemetry.serve(arguments.metrics))
                log.info("metrics on http://%s/metrics", address)
            asyncio.run(
                serve(
                    catalog,
                    engine,
                    listen=arguments.listen,
                    device=device,
                    tokens=tokens,
                    keep_jobs=keep_jobs,
                    telemetry=telemetry,
                )
            )
    except Locked as error:
        return _refuse(error, CONFLICT)
    except (ComposeError, RegistryError) as error:
        return _refuse(error, INVALID)
    except OSError as error:
        return _refuse(error, UNAVAILABLE)
    return 0


def _engine(told: list[str], device: str, memory: float | None) -> InProcessEngine:
    """The first base warm, the others known. Raises InvalidRequest, IncompatibleBase."""
    if memory is not None and not memory > 0:
        raise InvalidRequest(f"--memory {memory} is not above 0", field="memory")
    first, *others = map(bases.find, told)
    budget = None if memory is None else int(memory * 1e9)
    return InProcessEngine(Residence(warm_up(first, device=device), others, budget=budget))


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


def _days(asked: float) -> timedelta:
    """Raises InvalidRequest."""
    if not 0 <= asked <= 36500:
        raise InvalidRequest(f"--keep-jobs {asked} is not within 0 and 36500 days", field="keep_jobs")
    return timedelta(days=asked)


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
