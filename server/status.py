"""EngineService: what the machine is doing, for `atelier top`; the same as gauges for Prometheus."""

import asyncio
import platform
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.metadata import version

import grpc
import psutil
import torch
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from atelier.v1 import engine_pb2, engine_pb2_grpc
from registry.catalog import Catalog
from server.engine import BaseInfo
from server.errors import BadRequest, answering
from server.scheduler import Scheduler
from server.stacks import Stacks
from server.telemetry import Telemetry
from server.watched import Running, Watched

LISTED = 100
INTERVAL, SHORTEST, LONGEST = 1.0, 0.1, 3600.0
PHASES = (
    "compose", "queue", "shared", "others", "patch", "embed", "guide", "denoise", "decode", "encode", "send",
)  # fmt: skip
VERSIONS = ("atelier", "torch", "diffusers", "transformers", "grpcio")


class Machine:
    """Looks at a server's parts, from any thread and without stopping one of them."""

    def __init__(
        self, catalog: Catalog, stacks: Stacks, queue: Scheduler, engine: Watched, telemetry: Telemetry
    ) -> None:
        self._catalog, self._stacks, self._queue = catalog, stacks, queue
        self._engine, self._telemetry = engine, telemetry
        self._began, self._process = time.monotonic(), psutil.Process()
        self._versions = {name: version(name) for name in VERSIONS} | {"python": platform.python_version()}
        telemetry.registry.register(self)

    def status(self) -> engine_pb2.Status:
        """How things are."""
        telemetry = self._telemetry
        found = engine_pb2.Status(
            uptime_seconds=time.monotonic() - self._began,
            queue=self._waiting(),
            bases=map(_base, self._bases()),
            adapters=self._adapters(),
            rates=engine_pb2.Rates(**{name: rate.per_second() for name, rate in telemetry.rates.items()}),
            caches=[
                engine_pb2.Cache(name=cache.name, hits=cache.hits, misses=cache.misses)
                for cache in self._stacks.caches
            ],
            memory=self._memory(),
            outcomes=dict(telemetry.outcomes),
            versions=self._versions,
        )
        found.time.GetCurrentTime()
        told = telemetry.durations.percentiles()
        for phase in (*(p for p in PHASES if p in told), *sorted(told.keys() - set(PHASES))):
            p = told[phase]
            found.phases.add(phase=phase, count=p.count, p50=p.p50, p95=p.p95, p99=p.p99)
        return found

    def collect(self) -> Iterator[Metric]:
        """The same as gauges, read when they are scraped; prometheus_client calls this."""
        waiting, held, memory = self._queue.status(), self._stacks.shelf.held(), self._memory()
        for name, text, value in (
            ("queue_length", "Jobs that wait.", len(waiting.waiting)),
            ("jobs_running", "Jobs that are worked on.", int(self._engine.running is not None)),
            ("resident_adapters", "Adapters held, read and ready.", len(held)),
            ("resident_adapter_bytes", "Bytes of all adapters held.", sum(size for _, size in held)),
            ("merges_kept", "Merged stacks kept for the next render.", len(self._stacks.merges)),
            ("warm_bases", "Bases that are ready to render.", len(self._bases())),
            ("resident_memory_bytes", "What the process holds.", memory.resident_bytes),
            ("uptime_seconds", "Since the server started.", time.monotonic() - self._began),
        ):
            yield GaugeMetricFamily(f"atelier_{name}", text, value=value)
        if memory.device_total_bytes:
            device = GaugeMetricFamily(
                "atelier_device_memory_bytes", "Memory of the device.", labels=["kind"]
            )
            device.add_metric(["used"], memory.device_used_bytes)
            device.add_metric(["total"], memory.device_total_bytes)
            yield device
        parts = GaugeMetricFamily(
            "atelier_memory_bytes", "What the memory budget is spent on.", labels=["part"]
        )
        for part in memory.parts:
            parts.add_metric([part.name], part.size_bytes)
        yield parts
        yield GaugeMetricFamily(
            "atelier_memory_budget_bytes", "What may be spent.", value=memory.budget_bytes
        )
        asked = CounterMetricFamily(
            "atelier_cache_requests",
            "How often what was wanted was there (hit) or had to be made (miss).",
            labels=["cache", "result"],
        )
        for cache in self._stacks.caches:
            asked.add_metric([cache.name, "hit"], cache.hits)
            asked.add_metric([cache.name, "miss"], cache.misses)
        yield asked

    def _bases(self) -> Sequence[BaseInfo]:
        return self._engine.loaded

    def _waiting(self) -> engine_pb2.Queue:
        told, running = self._queue.status(), self._engine.running
        return engine_pb2.Queue(
            waiting=len(told.waiting),
            capacity=told.capacity,
            draining=told.draining,
            coalesced=told.coalesced,
            jobs=[
                engine_pb2.WaitingJob(
                    client=job.client,
                    kind=job.what,
                    waited_seconds=job.seconds,
                    priority=job.priority,
                    phase=job.phase,
                    callers=job.callers,
                )
                for job in told.waiting[:LISTED]
            ],
            running=[_running(running, told.running.client if told.running else "")] if running else [],
        )

    def _adapters(self) -> engine_pb2.Residents:
        held = self._stacks.shelf.held()
        return engine_pb2.Residents(
            count=len(held),
            size_bytes=sum(size for _, size in held),
            budget_bytes=self._stacks.shelf.capacity,
            adapters=[
                engine_pb2.ResidentAdapter(ref=self._ref(digest), digest=digest, size_bytes=size)
                for digest, size in held[:LISTED]
            ],
            merges=len(self._stacks.merges),
        )

    def _ref(self, digest: str) -> str:
        return next((version.ref for version in self._catalog.with_digest(digest)), "")

    def _memory(self) -> engine_pb2.Memory:
        used = total = 0
        if self._engine.info.device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(self._engine.info.device)
            used = total - free
        resident = self._process.memory_info().rss
        ledger, host = self._engine.ledger, self._engine.host
        return engine_pb2.Memory(
            resident_bytes=resident,
            device_used_bytes=used,
            device_total_bytes=total,
            budget_bytes=ledger.budget,
            parts=[engine_pb2.MemoryPart(name=n, size_bytes=s) for n, s in ledger.parts().items() if s],
            host_golden_bytes=host.used(),
        )


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """Tells what a machine is doing."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._leaving = asyncio.Event()

    def stop_watching(self) -> None:
        """Lets everybody go who watches."""
        self._leaving.set()

    async def GetStatus(
        self, request: engine_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.Status:
        del request
        async with answering(context):
            return await asyncio.to_thread(self._machine.status)
        raise AssertionError("answering ended the call")

    async def WatchStatus(
        self, request: engine_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.Status]:
        async with answering(context):
            interval = request.interval_seconds if request.HasField("interval_seconds") else INTERVAL
            if not SHORTEST <= interval <= LONGEST:  # NaN, too
                raise BadRequest(
                    f"interval_seconds {interval:g} is not within {SHORTEST:g} and {LONGEST:g}",
                    field="interval_seconds",
                )
            while not self._leaving.is_set():
                yield await asyncio.to_thread(self._machine.status)
                try:
                    await asyncio.wait_for(self._leaving.wait(), interval)
                except TimeoutError:
                    continue


def _base(info: BaseInfo) -> engine_pb2.WarmBase:
    return engine_pb2.WarmBase(
        name=info.base.name,
        family=info.base.family,
        device=info.device,
        dtype=info.dtype,
        size_bytes=info.size_bytes,
    )


def _running(running: Running, client: str) -> engine_pb2.RunningJob:
    return engine_pb2.RunningJob(
        client=client or running.call.client,
        request_id=running.call.request_id,
        kind=running.kind,
        phase=running.phase,
        image=running.image,
        images=running.images,
        step=running.step,
        steps=running.steps,
        seconds=time.perf_counter() - running.began,
        base=running.base,
    )
