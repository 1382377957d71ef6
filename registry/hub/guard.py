"""What every HTTP request of huggingface_hub passes.

Its own client waits for ever, follows any redirect, sends files and the token wherever a link points, and
tries again by itself for minutes. Here a request goes to the endpoint or its storage, or nowhere; the token
goes to the endpoint alone; waiting ends; and what may be worth another try is raised as ours at once, so that
`client` decides. Nothing raised here holds a request, which would hold the token.

huggingface_hub has one HTTP client for the process, made by `set_client_factory`: `install` makes it one that
asks `calling` who is calling. Requests outside of such a call are refused.
"""

import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import disable_progress_bars, parse_ratelimit_headers

from registry.errors import Stopped, Unavailable, Untrusted
from registry.hub.endpoint import Endpoint

CONNECT_SECONDS, SILENT_SECONDS, ANSWER_SECONDS = 10.0, 30.0, 60.0
"""To connect; without a byte; for an answer that is no file."""
ANSWER_LIMIT = 32 << 20
SLOWEST = 4096
"""Bytes a second that a file comes with; below that the Hub only holds us up."""
REQUESTS_LIMIT = 300
"""In one call: pages of a tree, redirects."""
AGAIN = {408, 425, 429, 500, 502, 503, 504}
RETRY_LIMIT = 3600.0


@dataclass(slots=True)
class Call:
    """A call under way. `moved` is told of bytes of files, `stopped` asked whether to go on."""

    endpoint: Endpoint
    silent: float = SILENT_SECONDS
    answer: float = ANSWER_SECONDS
    transfer: bool = False
    """Whether the answer is a file, which may be large and take its time."""
    moved: Callable[[int], None] = lambda size: None
    stopped: Callable[[], bool] = lambda: False
    requests: int = field(default=0)

    def check(self) -> None:
        """Raises Stopped."""
        if self.stopped():
            raise Stopped("the caller does not want the answer any more")


_call: ContextVar[Call | None] = ContextVar("hub_call", default=None)


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Within, this thread's requests are made for `call`."""
    install()
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


_installed = False


def install() -> None:
    """Makes huggingface_hub use guarded clients, without Xet, telemetry, or tokens it finds by itself."""
    global _installed
    if _installed:
        return
    constants.HF_HUB_DISABLE_XET = True  # its protocol has a client of its own, which no guard sees
    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    disable_progress_bars()
    warnings.filterwarnings("ignore", message="Warnings while validating metadata")  # the Hub's, of cards
    set_client_factory(client)
    _installed = True


def client() -> httpx2.Client:
    """A guarded client."""
    return httpx2.Client(transport=Guard(), follow_redirects=True, max_redirects=5)


class Guard(httpx2.BaseTransport):
    """Lets through what `Call.endpoint` may reach."""

    def __init__(self) -> None:
        self._direct = httpx2.HTTPTransport(limits=httpx2.Limits(max_connections=32))
        self._proxies = {
            scheme: httpx2.HTTPTransport(proxy=url)
            for scheme, url in urllib.request.getproxies().items()
            if scheme == "https"  # plain http is for this machine alone, and a proxy would read the token
        }

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises Untrusted, Unavailable, Stopped."""
        call, url = _call.get(), request.url
        if call is None:
            raise Untrusted("a request to a Hub outside of a call to one")
        call.check()
        call.requests += 1
        if call.requests > REQUESTS_LIMIT:
            raise Untrusted(f"{call.endpoint.url} sends from page to page without an end")
        if not call.endpoint.may_reach(url.scheme, url.host, url.port):
            where = f"{url.scheme}://{url.netloc.decode('ascii', 'replace')[:100]}"
            raise Untrusted(
                f"{call.endpoint.url} pointed to {where}, which is not among its hosts, so nothing was sent; "
                "if it should be: atelier serve --hub ENDPOINT,HOST"
            )
        if not call.endpoint.is_home(url.scheme, url.host, url.port):
            request.headers.pop("authorization", None)
        request.headers["accept-encoding"] = "identity"  # what is not compressed cannot explode
        # In place of the caller's: listing pages pass `timeout=None`, which would be for ever.
        waits = {"connect": CONNECT_SECONDS, "pool": CONNECT_SECONDS}
        request.extensions["timeout"] = waits | {"read": call.silent, "write": call.silent}
        if request.method == "PUT":
            request.stream = _Sent(request.stream, call)
        return _checked(self._sent(request, call), call)

    def _sent(self, request: httpx2.Request, call: Call) -> httpx2.Response:
        host, proxy = request.url.host, self._proxies.get(request.url.scheme)
        transport = proxy if proxy and not urllib.request.proxy_bypass(host) else self._direct
        try:
            return transport.handle_request(request)
        except httpx2.TransportError as error:
            raise _unreachable(error, call) from None

    def close(self) -> None:
        """Closes every connection."""
        for transport in (self._direct, *self._proxies.values()):
            transport.close()


def _checked(response: httpx2.Response, call: Call) -> httpx2.Response:
    if response.status_code in AGAIN:
        seconds = _retry_after(response.headers.get("retry-after", ""))
        if told := parse_ratelimit_headers(response.headers):
            seconds = max(seconds, float(min(told.reset_in_seconds, RETRY_LIMIT)))
        response.close()
        why = "asks to wait" if response.status_code == 429 else f"answered {response.status_code}"
        raise Unavailable(f"{call.endpoint.url} {why}{_wait(seconds)}; try again later", seconds=seconds)
    if response.headers.get("content-encoding", "identity").lower() not in {"", "identity"}:
        response.close()
        raise Untrusted(f"{call.endpoint.url} sent compressed what was asked for plain")
    if isinstance(response.stream, httpx2.SyncByteStream):
        whole = call.transfer and response.status_code in {200, 206}
        response.stream = _Received(response.stream, call, whole=whole)
    return response


def _wait(seconds: float) -> str:
    return f" {seconds:g} s" if seconds else ""


def _retry_after(text: str) -> float:
    return min(float(text), RETRY_LIMIT) if text.isascii() and text.isdigit() and len(text) < 10 else 0.0


def _unreachable(error: httpx2.TransportError, call: Call) -> Unavailable:
    match error:
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            why = "cannot be reached"
        case httpx2.TimeoutException():
            why = f"said nothing for {call.silent:g} s"
        case _:
            why = "cut the connection"
    return Unavailable(f"{call.endpoint.url} {why}; try again later")


class _Sent(httpx2.SyncByteStream):
    """A file on its way there."""

    def __init__(self, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream | None, call: Call) -> None:
        self._stream, self._call = stream, call

    def __iter__(self) -> Iterator[bytes]:
        if isinstance(self._stream, httpx2.SyncByteStream):
            for piece in self._stream:
                self._call.check()
                yield piece
                self._call.moved(len(piece))

    def close(self) -> None:
        """Closes what it reads from."""
        if isinstance(self._stream, httpx2.SyncByteStream):
            self._stream.close()


class _Received(httpx2.SyncByteStream):
    """An answer on its way here: within `ANSWER_SECONDS` and `ANSWER_LIMIT`, or a file (`whole`), at
    `SLOWEST` bytes a second or more.
    """

    def __init__(self, stream: httpx2.SyncByteStream, call: Call, *, whole: bool) -> None:
        self._stream, self._call, self._whole = stream, call, whole
        self._began = time.monotonic()

    def __iter__(self) -> Iterator[bytes]:
        call, size = self._call, 0
        try:
            for piece in self._stream:
                call.check()
                size += len(piece)
                if not self._whole and size > ANSWER_LIMIT:
                    raise Untrusted(f"{call.endpoint.url} answers with more than {ANSWER_LIMIT >> 20} MiB")
                allowed = call.answer + (size / SLOWEST if self._whole else 0.0)
                if time.monotonic() > self._began + allowed:
                    raise Unavailable(
                        f"{call.endpoint.url} took more than {call.answer:g} s to answer; try again later"
                    )
                yield piece
        except httpx2.TransportError as error:
            raise _unreachable(error, call) from None

    def close(self) -> None:
        """Gives the connection back."""
        self._stream.close()
