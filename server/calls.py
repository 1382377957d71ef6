"""A call on its way: who asked, which phase it is in, how it ended.

`current()` is the call that the running code works for: on the event loop, in the threads it waits for, and
on the thread that renders. What a call tells becomes metrics, the children of its span, and the words in
which the log names it.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from server.telemetry import Telemetry

log = logging.getLogger("atelier")
REQUEST_ID = "x-request-id"
OTHERS = "others"
"""The phase between two turns of a render of several pictures."""
WAITING = {"queue", OTHERS}
GIVEN_UP = {grpc.StatusCode.CANCELLED: "cancelled", grpc.StatusCode.DEADLINE_EXCEEDED: "deadline"}
REFUSED = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
Fact = str | int | float


class Call:
    """A request under way. Phases may be told from several threads; after its end nothing is recorded."""

    def __init__(
        self,
        telemetry: Telemetry | None,
        rpc: str,
        *,
        request_id: str = "",
        client: str = "",
        parent: Context | None = None,
        quiet: bool = False,
    ) -> None:
        self.rpc, self.request_id, self.client = rpc, request_id, client
        self.facts: dict[str, Fact] = {}
        self.prompt = ""
        self._telemetry, self._quiet = telemetry, quiet
        self._began = time.perf_counter()
        self._open: dict[str, float] = {}
        self._sending = 0.0
        self._mutex = threading.Lock()
        self._ended = telemetry is None
        self.code: grpc.StatusCode | None = None
        if telemetry:
            self._span = telemetry.tracer.start_span(rpc, context=parent, kind=SpanKind.SERVER)
            self._inside = set_span_in_context(self._span)

    @property
    def ended(self) -> bool:
        """Whether there is nobody any more to work for."""
        return self._ended

    def named(self) -> tuple[tuple[str, str], ...]:
        """The metadata that tell the caller its identifier."""
        return ((REQUEST_ID, self.request_id),) if self.request_id else ()

    def about(self, *, prompt: str = "", **facts: Fact) -> None:
        """What it asks for: base, steps, stack size. The prompt is forgotten unless the log shall show it."""
        if not self._ended:
            self.facts |= facts
            self.prompt = prompt if self._telemetry and self._telemetry.log_prompts else ""

    def begin(self, phase: str) -> None:
        """A phase begins; it ends with `end` or `took`, or is cut off by the end of the call."""
        if not self._ended:
            self._open[phase] = time.perf_counter()

    def end(self, phase: str) -> None:
        """A phase that was begun has ended well. Harmless when it has ended already."""
        began = self._open.pop(phase, None)
        if began is not None:
            self._record(phase, time.perf_counter() - began)

    def took(self, phase: str, seconds: float, *, begun: str = "") -> None:
        """A phase has just ended well, and took so long; it is what was begun as `begun`, if anything was."""
        self._open.pop(begun, None)
        self._record(phase, seconds)

    def sent(self, seconds: float) -> None:
        """An answer went out, and it took so long until the next was wanted."""
        self._sending += seconds

    def cut(self, why: str) -> None:
        """Whatever is going on ends here."""
        for phase in list(self._open):
            began = self._open.pop(phase, None)
            if began is not None:
                self._record(phase, time.perf_counter() - began, cut=why)

    def finish(self, code: grpc.StatusCode) -> None:
        """The call ended so: counted, its span ended, its line logged; once."""
        with self._mutex:
            if self._ended or self._telemetry is None:
                return
            # a copy: other threads begin and end phases meanwhile
            phase = next(reversed(list(self._open)), "send" if self.facts else "")
            if self._sending and self.facts:
                self._record("send", self._sending)
            waited, outcome = not WAITING.isdisjoint(self._open), GIVEN_UP.get(code, "failed")
            self.cut(GIVEN_UP.get(code, code.name))
            self._ended, self.code = True, code
        seconds = time.perf_counter() - self._began
        self._telemetry.request(self.rpc, code, seconds, phase=phase)
        if waited:
            self._telemetry.render("refused" if code in REFUSED else outcome)
        self._end_span(code)
        told = {"outcome": code.name, "seconds": round(seconds, 6), **self.facts}
        if self.prompt:
            told["prompt"] = self.prompt
        level = logging.DEBUG if self._quiet else logging.INFO
        log.log(level, "%s %s", self.rpc, code.name, extra={"call": self, "told": told})

    def _end_span(self, code: grpc.StatusCode) -> None:
        self._span.set_attributes(
            {
                "rpc.system": "grpc",
                "rpc.grpc.status_code": code.value[0],
                "atelier.request_id": self.request_id,
                "atelier.client": self.client,
                **{f"atelier.{name}": value for name, value in self.facts.items()},
            }
        )
        if code in GIVEN_UP:
            self._span.set_attribute("atelier.cancelled", GIVEN_UP[code])
        if code is not grpc.StatusCode.OK:
            self._span.set_status(Status(StatusCode.ERROR, code.name))
        self._span.end()

    def _record(self, phase: str, seconds: float, *, cut: str = "") -> None:
        if self._ended or self._telemetry is None:
            return
        now = time.time_ns()
        span = self._telemetry.tracer.start_span(
            phase, context=self._inside, start_time=now - round(seconds * 1e9)
        )
        if cut:
            span.set_attribute("atelier.cut", cut)
            span.set_status(Status(StatusCode.ERROR, cut))
        else:
            self._telemetry.phase(phase, seconds)
        span.end(now)


NOBODY = Call(None, "")
"""For code that works for no call."""
_current: ContextVar[Call] = ContextVar("call", default=NOBODY)


def current() -> Call:
    """The call that this code works for."""
    return _current.get()


def enter(call: Call) -> None:
    """From here on, what runs in this context works for that call."""
    _current.set(call)


@contextmanager
def working_for(call: Call) -> Iterator[None]:
    """The block works for that call, on whatever thread it runs."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
