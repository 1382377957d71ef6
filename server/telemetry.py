"""What is counted and measured: a Prometheus registry of a server's own, and what `atelier top` shows of the
last minute.

Labels are rpcs, status codes, outcomes, phases and caches, never a name that a caller chose. The registry is
served by a thread of its own (`Telemetry.serve`), so that a scrape waits for no render.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
from opentelemetry.trace import NoOpTracerProvider, Tracer, TracerProvider
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

from server.recent import Durations, Rate

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


Wanted = TypeVar("Wanted")


@dataclass(slots=True)
class Cache:
    """How often what was wanted was there; counted under whatever lock guards it."""

    name: str
    hits: int = 0
    misses: int = 0

    def asked(self, found: Wanted) -> Wanted:
        """What was found, counted; None is a miss."""
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found


class Telemetry:
    """Counters, histograms and the tracer of one server. Safe to use from several threads.

    With `log_prompts` the log shows what was asked for.
    """

    def __init__(self, *, tracers: TracerProvider | None = None, log_prompts: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.tracer: Tracer = (tracers or NoOpTracerProvider()).get_tracer("atelier")
        self.log_prompts = log_prompts
        self.durations = Durations()
        self.rates = {name: Rate() for name in ("renders", "steps", "requests")}
        self.outcomes: dict[str, int] = {}
        self._mutex = threading.Lock()
        own = self.registry
        self._requests = Counter(
            "atelier_requests", "Calls by rpc and status code.", ("rpc", "code"), registry=own
        )
        self._request_seconds = Histogram(
            "atelier_request_seconds", "How long calls took.", ("rpc",), buckets=SECONDS, registry=own
        )
        self._renders = Counter("atelier_renders", "Renders by how they ended.", ("outcome",), registry=own)
        self._cancellations = Counter(
            "atelier_cancellations",
            "Calls given up by the caller or by the clock, by the phase they were in.",
            ("phase",),
            registry=own,
        )
        self._phase_seconds = Histogram(
            "atelier_phase_seconds", "How long phases took.", ("phase",), buckets=SECONDS, registry=own
        )
        self._step_seconds = Histogram(
            "atelier_step_seconds", "How long a denoising step took.", buckets=SECONDS, registry=own
        )

    def phase(self, name: str, seconds: float) -> None:
        """A phase ended well."""
        self._phase_seconds.labels(name).observe(seconds)
        self.durations.add(name, seconds)

    def step(self, seconds: float) -> None:
        """A denoising step is done."""
        self._step_seconds.observe(seconds)
        self.rates["steps"].add()

    def render(self, outcome: str) -> None:
        """A render ended: `done`, `cancelled`, `deadline`, `refused` or `failed`."""
        self._renders.labels(outcome).inc()
        with self._mutex:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if outcome == "done":
            self.rates["renders"].add()

    def request(self, rpc: str, code: grpc.StatusCode, seconds: float, *, phase: str = "") -> None:
        """A call ended, in `phase` if it was in one."""
        self._requests.labels(rpc, code.name).inc()
        self._request_seconds.labels(rpc).observe(seconds)
        self.rates["requests"].add()
        if code in {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}:
            self._cancellations.labels(phase).inc()

    @contextmanager
    def serve(self, address: str) -> Iterator[str]:
        """Answers scrapes on HOST:PORT, port 0 taking a free one, while the block runs; yields the address.
        Raises OSError when it cannot be listened on.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise OSError(f"--metrics {address} is no HOST:PORT; write --metrics 127.0.0.1:9464")
        try:
            server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=self.registry)
        except OSError as error:
            raise OSError(
                f"cannot serve metrics on {address}: {error.strerror or error}; choose another --metrics"
            ) from None
        try:
            yield f"{host}:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
