"""What every HTTP request of huggingface_hub passes.

Its own client waits for ever, follows any redirect, sends files and the token wherever a link points, and
tries again by itself for minutes. Here a request goes to the endpoint or its storage, or nowhere; the token
goes to the endpoint alone; waiting ends; and what may be worth another try is raised as ours at once, so that
`client` decides. Nothing raised here holds a request, which would hold the token.

huggingface_hub has one HTTP client for the process, made by `set_client_factory`: `install` makes it one that
asks `calling` who is calling. Requests outside of such a call are refused.
"""

import re
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import disable_progress_bars

from registry.errors import Unavailable, Untrusted
from registry.hub.wire import Call, Wire, calling_now, current

CONNECT_SECONDS = 10.0
ANSWER_LIMIT, ERROR_LIMIT = 32 << 20, 64 << 10
"""Bytes of an answer that is no file, and of one that is an error or a redirect, whose rest nobody reads."""
REQUESTS_LIMIT = 300
"""In one call: pages of a tree, redirects."""
AGAIN = {408, 425, 429, 500, 502, 503, 504}
RETRY_LIMIT = 3600.0


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Within, this thread's requests are made for `call`."""
    install()
    token = current.set(call)
    try:
        yield call
    finally:
        current.reset(token)


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
        self._direct = _transport()
        proxy = urllib.request.getproxies().get("https")
        # Plain http is for this machine alone, and a proxy would read the token; https it sees from outside.
        self._proxy = _transport(proxy) if proxy else None

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises Untrusted, Unavailable, Stopped."""
        call, url = calling_now(), request.url
        call.begin(sending=request.method in {"POST", "PUT"})
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
        host, proxied = request.url.host, self._proxy and request.url.scheme == "https"
        bypass = not proxied or urllib.request.proxy_bypass(host)
        transport = self._direct if bypass or not self._proxy else self._proxy
        try:
            return transport.handle_request(request)
        except httpx2.TransportError as error:
            raise _unreachable(error, call) from None

    def close(self) -> None:
        """Closes every connection."""
        for transport in filter(None, (self._direct, self._proxy)):
            transport.close()


def _transport(proxy: str | None = None) -> httpx2.HTTPTransport:
    """Raises Unavailable for a proxy that is none."""
    try:
        made = httpx2.HTTPTransport(proxy=proxy, limits=httpx2.Limits(max_connections=32))
    except (ValueError, ImportError, httpx2.InvalidURL):  # its message may hold the proxy's password
        raise Unavailable(
            "the proxy in HTTPS_PROXY cannot be used; write http://HOST:PORT there, or unset it"
        ) from None
    made._pool._network_backend = Wire(made._pool._network_backend)  # httpx2 has no public way to say this
    return made


def _checked(response: httpx2.Response, call: Call) -> httpx2.Response:
    if response.status_code in AGAIN:
        seconds = _asked_to_wait(response.headers)
        response.close()
        why = "asks to wait" if response.status_code == 429 else f"answered {response.status_code}"
        raise Unavailable(f"{call.endpoint.url} {why}{_wait(seconds)}; try again later", seconds=seconds)
    if response.headers.get("content-encoding", "identity").lower() not in {"", "identity"}:
        response.close()
        raise Untrusted(f"{call.endpoint.url} sent compressed what was asked for plain")
    if isinstance(response.stream, httpx2.SyncByteStream):
        whole = call.transfer and response.status_code in {200, 206}
        error = not response.is_success
        response.stream = _Received(response.stream, call, whole=whole, error=error)
    return response


def _wait(seconds: float) -> str:
    return f" {seconds:.0f} s" if seconds else ""


def _asked_to_wait(headers: httpx2.Headers) -> float:
    """Seconds, at most `RETRY_LIMIT`; 0 when an answer does not ask for any, or not for what is a time.

    Retry-After is seconds or a date (RFC 9110); RateLimit `"api";r=0;t=55` for each limit, of which those
    with requests left (r) are no reason to wait (draft-ietf-httpapi-ratelimit-headers-09).
    """
    asked = headers.get("retry-after", "").strip()
    found = [_seconds(asked) or _until(asked)]
    for limit in headers.get("ratelimit", "").split(","):
        told = dict(_PARAMETER.findall(limit))
        found += [_seconds(told["t"])] if "t" in told and told.get("r", "").strip("0") == "" else []
    return max(found)


_PARAMETER = re.compile(r";\s*([rt])\s*=\s*(\d+)\s*(?=[;,]|$)", re.ASCII)


def _seconds(text: str) -> float:
    if not (text.isascii() and text.isdigit()):
        return 0.0
    return min(float(text), RETRY_LIMIT) if len(text) < 10 else RETRY_LIMIT


def _until(date: str) -> float:
    try:
        then = parsedate_to_datetime(date)
        left = (then if then.tzinfo else then.replace(tzinfo=UTC)) - datetime.now(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return min(max(left.total_seconds(), 0.0), RETRY_LIMIT)


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
                yield piece
                self._call.moved(len(piece))

    def close(self) -> None:
        """Closes what it reads from."""
        if isinstance(self._stream, httpx2.SyncByteStream):
            self._stream.close()


class _Received(httpx2.SyncByteStream):
    """An answer on its way here: of at most `ANSWER_LIMIT`, or a file (`whole`); of an `error` only the
    beginning.
    """

    def __init__(self, stream: httpx2.SyncByteStream, call: Call, *, whole: bool, error: bool) -> None:
        self._stream, self._call, self._whole, self._error = stream, call, whole, error

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        try:
            for piece in self._stream:
                size += len(piece)
                if self._whole:
                    self._call.passed(received=len(piece))
                if self._error and size > ERROR_LIMIT:
                    return
                if not self._whole and size > ANSWER_LIMIT:
                    limit = f"{ANSWER_LIMIT >> 20} MiB"
                    raise Untrusted(f"{self._call.endpoint.url} answers with more than {limit}")
                yield piece
        except httpx2.TransportError as error:
            raise _unreachable(error, self._call) from None

    def close(self) -> None:
        """Gives the connection back."""
        self._stream.close()
