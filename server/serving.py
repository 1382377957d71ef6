"""What answers: every service of the contract, joined over one catalog and one engine."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from atelier.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    compose_pb2,
    compose_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    hub_pb2,
    hub_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    render_pb2,
    render_pb2_grpc,
    sweep_pb2,
    sweep_pb2_grpc,
)
from compose.clip import Clip
from compose.threads import heed
from registry.catalog import Catalog
from server.afterwards import Afterwards
from server.auth import Gate, Tokens
from server.calibrations import Calibrations
from server.catalog import CatalogServicer
from server.choosing import Chooser
from server.compose import ComposeServicer
from server.engine import Engine
from server.hub import Hubs, HubServicer
from server.jobs import JobServicer
from server.likes import Likes
from server.observer import Observer
from server.render import RenderServicer
from server.rendering import Renderings
from server.runner import KEPT, JobRunner
from server.scheduler import CAPACITY, Scheduler
from server.served import served
from server.shelf import CACHE_BYTES
from server.spool import Spool
from server.stacks import Stacks
from server.status import EngineServicer, Machine
from server.sweep import SweepServicer
from server.sweeps import Sweeps
from server.telemetry import Telemetry
from server.uploads import Uploads
from server.watched import Watched
from server.wire import Chunks

MESSAGE_LIMIT = 72 << 20  # a PNG to replay comes in one message
SERVICES = (
    catalog_pb2.DESCRIPTOR.services_by_name["CatalogService"].full_name,
    compose_pb2.DESCRIPTOR.services_by_name["ComposeService"].full_name,
    render_pb2.DESCRIPTOR.services_by_name["RenderService"].full_name,
    hub_pb2.DESCRIPTOR.services_by_name["HubService"].full_name,
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
    _afterwards: Afterwards
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
        await asyncio.to_thread(self._afterwards.stop)


async def start(
    catalog: Catalog,
    engine: Engine,
    *,
    listen: str,
    device: str,
    tokens: Tokens | None = None,
    capacity: int = CAPACITY,
    keep_jobs: timedelta = KEPT,
    adapter_bytes: int = CACHE_BYTES,
    telemetry: Telemetry | None = None,
    hubs: Hubs | None = None,
    tls: grpc.ServerCredentials | None = None,
    clip: Clip | None = None,
    shares: Mapping[str, float] = MappingProxyType({}),
) -> Running:
    """Answers on `listen` from now on, with `tls` encrypted. Raises OSError when the address is taken."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(None, "work", heed))
    telemetry = telemetry or Telemetry()
    checks, bases = health.aio.HealthServicer(), served(info.base for info in engine.infos.values())
    calibrations = Calibrations(catalog, bases)
    stacks = Stacks(catalog, calibrations, device=device, adapter_bytes=adapter_bytes, ledger=engine.ledger)
    if clip:
        engine.ledger.claim("scorer", "clip", clip.nbytes(), what="the scorer")
    server = grpc.aio.server(
        interceptors=[Observer(telemetry), *([Gate(tokens)] if tokens is not None else []), Chunks()],
        options=[
            ("grpc.so_reuseport", 0),  # or a second server would silently share the port
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ],
    )
    try:
        port = server.add_secure_port(listen, tls) if tls else server.add_insecure_port(listen)
    except RuntimeError:
        raise OSError(
            f"cannot listen on {listen}: it is in use or not ours; choose another --listen"
        ) from None
    watching, likes = Watched(engine, telemetry), Likes(catalog)
    spool = Spool(catalog.blobs.incoming)
    queue = Scheduler(watching, capacity=capacity, shares=shares, spool=spool)
    chooser = Chooser(stacks, queue, calibrations, clip)
    uploads = Uploads(catalog.blobs)
    watched, afterwards = CatalogServicer(catalog, likes, uploads), Afterwards(catalog, uploads)
    compose = ComposeServicer(catalog, stacks, likes, engine.norms, chooser)
    renderings = Renderings(stacks, queue, engine.infos)
    runner = JobRunner(catalog.jobs, renderings, keep=keep_jobs, telemetry=telemetry)
    render = RenderServicer(stacks, queue, engine.infos, calibrations, chooser, renderings)
    sweeps = Sweeps(stacks, renderings, bases)
    status = EngineServicer(Machine(catalog, stacks, queue, watching, telemetry))
    catalog_pb2_grpc.add_CatalogServiceServicer_to_server(watched, server)
    compose_pb2_grpc.add_ComposeServiceServicer_to_server(compose, server)
    render_pb2_grpc.add_RenderServiceServicer_to_server(render, server)
    sweep_pb2_grpc.add_SweepServiceServicer_to_server(SweepServicer(sweeps), server)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(status, server)
    hub_pb2_grpc.add_HubServiceServicer_to_server(HubServicer(catalog, hubs or Hubs(), sweeps), server)
    jobs_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(catalog, renderings, runner), server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await runner.start()
    await server.start()
    afterwards.start()
    for service in ("", *SERVICES):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    return Running(port, queue, runner, afterwards, server, checks, (watched, status))
