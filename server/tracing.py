"""Where spans go: to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, when the SDK is installed
(`pip install 'atelier[otel]'`); nowhere otherwise.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry.trace import TracerProvider

log = logging.getLogger("atelier")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@contextmanager
def exporting() -> Iterator[TracerProvider | None]:
    """A provider whose spans are exported, the last of them at the end of the block; None without a
    collector. The standard variables say the rest (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …).
    """
    where = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
    if not where:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider as Provider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no spans go to %s: pip install 'atelier[otel]'", where)
        yield None
        return
    named = {SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "atelier")}
    provider = Provider(resource=Resource.create({**named, SERVICE_VERSION: version("atelier")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield provider
    finally:
        provider.shutdown()
