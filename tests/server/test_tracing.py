"""Spans, collected by OpenTelemetry's own SDK."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from atelier.client import AtelierError, Client
from atelier.messages import render_request
from atelier.v1 import render_pb2_grpc
from compose.warm import WarmPipeline
from server import tracing
from server.telemetry import Telemetry
from tests.conftest import Running, begun, serving
from tests.server.test_telemetry import PHASES, until


class Traced:
    """A server whose spans are kept."""

    def __init__(self, running: Running, kept: InMemorySpanExporter) -> None:
        self.address, self._kept = running.address, kept

    def spans(self, root: str) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The one span of that rpc, and its children by time; once it has ended."""
        until(lambda: any(span.name == root for span in self._kept.get_finished_spans()))
        found = self._kept.get_finished_spans()
        (parent,) = [span for span in found if span.name == root]
        children = [span for span in found if span.parent and span.parent.span_id == parent.context.span_id]
        return parent, sorted(children, key=lambda span: span.start_time or 0)


@pytest.fixture
def traced(warm: WarmPipeline, tmp_path: Path) -> Iterator[Traced]:
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    with serving(tmp_path / "data", warm, telemetry=Telemetry(tracers=provider)) as running:
        yield Traced(running, kept)
    provider.shutdown()


def test_a_render_is_a_span_with_a_child_for_every_phase(traced: Traced, lora: Path) -> None:
    with Client(traced.address) as client:
        client.check_in(lora, name="hero", base="pocket")
        list(client.render("a star", stack={"hero": 1.0}, steps=2))
    parent, children = traced.spans("Render")
    assert sorted(span.name for span in children) == sorted(PHASES)
    told = dict(parent.attributes or {})
    assert (told["atelier.base"], told["atelier.steps"], told["atelier.stack"]) == ("pocket", 2, 1)
    assert told["atelier.client"]
    assert len(str(told["atelier.request_id"])) == 32
    assert "a star" not in str(told)
    assert parent.status.status_code is StatusCode.UNSET
    assert parent.start_time
    assert parent.end_time
    for span in children:
        assert span.end_time
        assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time, span.name


def test_a_span_goes_under_the_callers(traced: Traced) -> None:
    trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    metadata = (("traceparent", f"00-{trace}-{span}-01"), ("x-request-id", "mine-7"))
    with grpc.insecure_channel(traced.address) as channel:
        call = render_pb2_grpc.RenderServiceStub(channel).Render(
            render_request("a star", steps=1), metadata=metadata
        )
        list(call)
        assert dict(call.trailing_metadata())["x-request-id"] == "mine-7"
    parent, children = traced.spans("Render")
    assert parent.parent
    assert (f"{parent.parent.trace_id:032x}", f"{parent.parent.span_id:016x}") == (trace, span)
    assert {f"{child.context.trace_id:032x}" for child in children} == {trace}
    assert dict(parent.attributes or {})["atelier.request_id"] == "mine-7"


def test_a_cancelled_call_leaves_no_span_open(traced: Traced) -> None:
    with Client(traced.address) as client, begun(client.render("a star", steps=150, count=64), "step"):
        pass
    parent, children = traced.spans("Render")
    assert dict(parent.attributes or {})["atelier.cancelled"] == "cancelled"
    assert (parent.status.status_code, parent.status.description) == (StatusCode.ERROR, "CANCELLED")
    cut = [span for span in children if dict(span.attributes or {}).get("atelier.cut")]
    assert [span.name for span in cut] in (["denoise"], ["decode"])
    assert all(span.end_time for span in children)


def test_a_call_that_waits_in_vain_says_that_it_waited(traced: Traced) -> None:
    with Client(traced.address) as client, Client(traced.address, timeout=1.0) as hasty:
        with begun(client.render("a star", steps=150, count=64), "step"):
            with pytest.raises(AtelierError):
                list(hasty.render("a planet", steps=1))
            parent, children = traced.spans("Render")
        (waited,) = [span for span in children if span.name == "queue"]
        assert dict(waited.attributes or {})["atelier.cut"] == "deadline"
        assert dict(parent.attributes or {})["atelier.cancelled"] == "deadline"


def test_spans_go_nowhere_without_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    with tracing.exporting() as tracers:
        assert tracers is None
