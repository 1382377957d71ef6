"""A call under way, and the connection that ends with it.

An HTTP client's timeouts are for one read, and what drips byte by byte, headers or body, meets none. So time
is kept below HTTP and TLS, where every byte passes: a request has `answer` seconds from connecting to its
last byte, all that one call asks for (pages, redirects, uploads) `whole`, and both as much more as the bytes
of files that moved take at `slowest` a second.
"""

import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpcore2

from registry.errors import Stopped, Unavailable, Untrusted
from registry.hub.endpoint import Endpoint

SILENT_SECONDS, ANSWER_SECONDS, WHOLE_SECONDS = 30.0, 60.0, 600.0
SLOWEST = 4096
"""Bytes a second that a file moves with; below that the Hub only holds us up."""
PIECE = 16 << 10
GLANCE = 0.5
"""Seconds between two looks at whether the answer to a silent Hub is wanted still."""


@dataclass(slots=True)
class Call:
    """A call under way. `silent`, `answer` and `whole` are seconds: without a byte, for a request, for all
    that the call asks. `moved` is told of bytes of files, `stopped` asked whether to go on.
    """

    endpoint: Endpoint
    silent: float = SILENT_SECONDS
    answer: float = ANSWER_SECONDS
    whole: float = WHOLE_SECONDS
    slowest: float = SLOWEST
    transfer: bool = False
    """Whether the answer is a file, which may be large and take its time."""
    moved: Callable[[int], None] = lambda size: None
    stopped: Callable[[], bool] = lambda: False
    requests: int = field(default=0, init=False)
    _sending: bool = field(default=False, init=False)
    _began: float = field(default=0.0, init=False)
    _first: float = field(default=0.0, init=False)
    _size: int = field(default=0, init=False)
    _total: int = field(default=0, init=False)

    def begin(self, *, sending: bool) -> None:
        """A request begins, `sending` something or only asking. Raises Stopped, Unavailable."""
        self._began, self._size, self._sending = time.monotonic(), 0, sending
        self._first = self._first or self._began
        self.requests += 1
        self.left()

    def passed(self, *, sent: int = 0, received: int = 0) -> None:
        """Bytes have moved. Those of files may take their time; no header is one, nor what comes before an
        answer (1xx), of which there may be any number.
        """
        size = (sent if self._sending else 0) + (received if self.transfer else 0)
        self._size += size
        self._total += size

    def check(self) -> None:
        """Raises Stopped."""
        if self.stopped():
            raise Stopped("the caller does not want the answer any more")

    def left(self) -> float:
        """Seconds that the request has. Raises Stopped, and Unavailable when there are none."""
        self.check()
        now, where = time.monotonic(), self.endpoint.url
        request = self._began + self.answer + self._size / self.slowest - now
        call = self._first + self.whole + self._total / self.slowest - now
        if request <= 0 and self._size > (0 if self.transfer else self.slowest):
            raise Unavailable(f"{where} moves less than {self.slowest:g} bytes a second; try again later")
        if request <= 0:
            raise Unavailable(f"{where} took more than {self.answer:g} s to answer; try again later")
        if call <= 0:
            raise Unavailable(f"{where} took more than {self.whole:g} s, answer by answer; try again later")
        return min(request, call)


current: ContextVar[Call | None] = ContextVar("hub_call", default=None)


def calling_now() -> Call:
    """The call that this thread's requests are made for. Raises Untrusted outside of one."""
    if call := current.get():
        return call
    raise Untrusted("a request to a Hub outside of a call to one")


class Wire(httpcore2.NetworkBackend):
    """Connections that keep to the time of whichever call uses them."""

    def __init__(self, network: httpcore2.NetworkBackend) -> None:
        self._network = network

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Raises Stopped, Unavailable, httpcore2.ConnectError."""
        timeout = _within(timeout)
        return _Stream(self._network.connect_tcp(host, port, timeout, local_address, socket_options))


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Raises Stopped, Unavailable, httpcore2.ReadTimeout, httpcore2.ReadError."""
        call = calling_now()
        until = time.monotonic() + (call.silent if timeout is None else timeout)
        while True:
            left = min(call.left(), until - time.monotonic(), GLANCE)
            try:
                data = self._stream.read(max_bytes, max(left, 0.001))
            except httpcore2.ReadTimeout:
                call.left()
                if time.monotonic() >= until:
                    raise
            else:
                return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Raises Stopped, Unavailable, httpcore2.WriteTimeout, httpcore2.WriteError."""
        call = calling_now()
        for start in range(0, len(buffer), PIECE):  # a buffer may be a whole body
            piece = buffer[start : start + PIECE]
            try:
                self._stream.write(piece, _within(timeout))
            except httpcore2.WriteTimeout:
                call.left()
                raise
            call.passed(sent=len(piece))

    def close(self) -> None:
        """Closes the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """Raises Stopped, Unavailable, httpcore2.ConnectError."""
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _within(timeout)))

    def get_extra_info(self, info: str) -> Any:
        """What the connection below tells of itself."""
        return self._stream.get_extra_info(info)


def _within(timeout: float | None) -> float:
    """A timeout that ends with the call. Raises Stopped, Unavailable."""
    left = calling_now().left()
    return left if timeout is None else min(timeout, left)
