"""A Hub that drips, never ends, or asks to wait for no time at all: every call ends, with the right error."""

import socketserver
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from huggingface_hub.utils import close_session

from registry.errors import Denied, NotFound, Stopped, Unavailable, Untrusted
from registry.hub import guard
from registry.hub.client import Entry, Hub
from registry.hub.endpoint import Endpoint
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Open, Studio
from tests.hub.repos import File
from tests.hub.routes import Answer, Pace
from tests.hub.standin import TOKEN, StandIn, Trouble

HUGE = "9" * 5000


def hasty(url: str, **limits: float) -> Hub:
    """A client that has half a second for an answer, and asks once."""
    return Hub(Endpoint(url, TOKEN), pauses=(), **({"silent": 5.0, "answer": 0.5} | limits))


@pytest.mark.parametrize("pace", [Pace.HEADERS_DRIP, Pace.BODY_DRIPS])
def test_what_drips_ends_with_the_answers_time(standin: StandIn, pace: Pace) -> None:
    standin.repo("ann/milo").write({f"{n}.txt": File.regular(b"x") for n in range(9)}, "many")
    standin.trouble("GET .*/revision/", pace)
    with pytest.raises(Unavailable, match=r"took more than 0.5 s to answer"):
        hasty(standin.url).head("ann/milo")


@pytest.mark.parametrize(
    ("pace", "why"),
    [
        (Pace.HEADERS_DRIP, "took more than 2 s to answer"),
        (Pace.BODY_DRIPS, "moves less than 4096 bytes a second"),
    ],
)
def test_a_file_that_drips_ends(
    standin: StandIn, studio: Studio, studios: Open, pace: Pace, why: str
) -> None:
    studio.check_in("milo")
    push(studio.exchange, "milo", repo="ann/milo")
    standin.trouble("GET .*/resolve/.*safetensors", pace)
    other = studios(hasty(standin.url, answer=2.0))
    with pytest.raises(Unavailable, match=why):
        pull(other.exchange, "ann/milo")
    assert not other.catalog.newest()
    assert list(other.catalog.blobs.incoming.iterdir()) == []


def test_a_file_has_as_long_as_its_bytes_take_at_the_slowest_rate(standin: StandIn) -> None:
    repo = standin.repo("ann/milo")
    repo.write({"x.txt": File.regular(b"x" * 300)}, "x")
    entry = Entry("x.txt", 300, f"git:{repo.head.files['x.txt'].oid}")
    standin.trouble("GET .*/resolve/", Pace.BODY_DRIPS, times=2)  # at less than 100 bytes a second
    assert hasty(standin.url, slowest=1.0).read("ann/milo", repo.head.oid, entry) == b"x" * 300
    with pytest.raises(Unavailable, match="moves less than 400 bytes a second"):
        hasty(standin.url, slowest=400.0).read("ann/milo", repo.head.oid, entry)


@contextmanager
def listening(handle: object) -> Iterator[str]:
    """A server of connections; its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            handle(self.request)  # type: ignore[operator]

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_answers_before_the_answer_end_with_its_time() -> None:
    done = threading.Event()

    def hint(connection: object) -> None:
        for _ in range(400):  # 4 KiB each, far more than a file has to move with
            if not done.wait(0.02):
                connection.sendall(b"HTTP/1.1 103 Early Hints\r\nx: " + b"y" * 4096 + b"\r\n\r\n")  # type: ignore[attr-defined]

    with listening(hint) as address:
        entry = Entry("x.txt", 300, f"git:{'0' * 40}")
        with pytest.raises(Unavailable, match=r"took more than 0.5 s to answer"):
            hasty(f"http://{address}").read("ann/milo", "0" * 40, entry)
        done.set()


def test_a_handshake_that_drips_ends_with_the_answers_time() -> None:
    done = threading.Event()

    def drip(connection: object) -> None:
        while not done.wait(0.02):
            connection.sendall(b"\x16")  # type: ignore[attr-defined]  # how a handshake begins

    with listening(drip) as address:
        with pytest.raises(Unavailable):
            hasty(f"https://{address}").head("ann/milo")
        done.set()


def test_an_upload_that_nobody_reads_ends(standin: StandIn, tmp_path: Path) -> None:
    standin.repo("ann/milo")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\0" * (8 << 20))  # more than the connection's buffers hold
    standin.trouble("PUT ", Trouble.STALL, times=9)
    with pytest.raises(Unavailable):
        hasty(standin.url, silent=30.0, slowest=1e9).commit(
            "ann/milo", add={path.name: path}, title="x", parent=standin.repo("ann/milo").head.oid
        )
    assert len(standin.repo("ann/milo").commits) == 1


def test_a_caller_that_gives_up_a_stalled_request_ends_it(standin: StandIn) -> None:
    standin.trouble(".*", Trouble.STALL, times=9)
    stop = threading.Event()
    standin.dead = lambda request: stop.set()
    with pytest.raises(Stopped):
        hasty(standin.url, silent=60.0, answer=60.0).watched(lambda size: None, stop.is_set).head("ann/milo")


@pytest.mark.parametrize("what", ["tree", "made"])
def test_endless_pages_end_with_the_calls_time(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(guard, "REQUESTS_LIMIT", 10**9)
    head = standin.repo("ann/milo").head.oid
    standin.page, standin.endless = 1, True
    hub = hasty(standin.url, whole=0.3)
    with pytest.raises(Unavailable, match=r"took more than 0.3 s, answer by answer"):
        hub.tree("ann/milo", head) if what == "tree" else hub.made("ann/milo", "none")


def test_endless_pages_of_commits_end_with_their_number(
    standin: StandIn, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "REQUESTS_LIMIT", 20)
    standin.repo("ann/milo")
    standin.endless = True
    with pytest.raises(Untrusted, match="from page to page without an end"):
        hub.made("ann/milo", "none")


def test_a_page_elsewhere_is_not_followed(standin: StandIn, hub: Hub) -> None:
    link = {"Link": '<https://evil.example/next>; rel="next"'}
    standin.trouble("GET .*/tree/", Answer(200, [], link))
    with pytest.raises(Untrusted, match=r"pointed to https://evil.example"):
        hub.tree("ann/milo", standin.repo("ann/milo").head.oid)


@pytest.mark.parametrize(
    ("status", "headers", "error", "message"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, NotFound, "there is no ann/milo"),
        (403, {}, Denied, "has no right to this"),
        (400, {}, Untrusted, r"refused the request \(400\)"),
        (500, {}, Unavailable, "answered 500"),
        (302, {"Location": "https://evil.example/"}, Untrusted, "pointed to https://evil.example"),
        (200, {}, Untrusted, "answers with more than 2 MiB"),
    ],
)
@pytest.mark.parametrize("call", ["head", "read"])
def test_endless_answers_are_read_to_a_limit(
    standin: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: dict[str, str],
    error: type[Exception],
    message: str,
    call: str,
) -> None:
    """An error stays the error that it is; of a redirect nothing more is wanted than where to."""
    monkeypatch.setattr(guard, "ANSWER_LIMIT", 2 << 20)
    standin.trouble(".*", Answer(status, b"x" * 1000, headers, pace=Pace.ENDLESS), times=9)
    hub = hasty(standin.url, answer=60.0)  # far more than it takes
    if call == "head":
        with pytest.raises(error, match=message):
            hub.head("ann/milo")
    elif status != 200:  # a file has the length that the tree tells
        with pytest.raises(error, match=message):
            hub.read("ann/milo", "0" * 40, Entry("x.txt", 3, f"git:{'0' * 40}"))


@pytest.mark.parametrize("status", [200, 206])
def test_files_alone_may_be_larger_than_an_answer(
    standin: StandIn, hub: Hub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(guard, "ANSWER_LIMIT", 1000)
    data = b"x" * 5000
    oid = f"git:{File.regular(data).oid}"
    standin.trouble("GET .*/resolve/", Answer(status, data))
    assert hub.read("ann/milo", "0" * 40, Entry("x.txt", 5000, oid)) == data
    standin.trouble("GET .*/revision/", Answer(status, data))
    with pytest.raises(Untrusted, match="answers with more than"):
        hub.head("ann/milo")
    standin.trouble("GET .*/resolve/", Answer(203, data))
    with pytest.raises(Untrusted, match="answers with more than"):
        hub.read("ann/milo", "0" * 40, Entry("x.txt", 5000, oid))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "900"}, 900),
        ({"Retry-After": HUGE}, 3600),
        ({"RateLimit": '"api";r=0;t=900'}, 900),
        ({"RateLimit": '"api"; t = 900 ; r = 0'}, 900),
        ({"RateLimit": '"api";r=480;t=900'}, 0),  # there are requests left: it has another reason
        ({"RateLimit": '"api";r=3;t=1800, "pages";r=0;t=900'}, 900),
        ({"RateLimit": '"api";r=0;t=900', "Retry-After": "1200"}, 1200),
        ({"RateLimit": f'"api";r=0;t={HUGE}'}, 3600),
        *(({"Retry-After": told}, 0) for told in ("-5", "nan", "inf", "1e9", "0x10", "soon", "²", "")),
        *(({"RateLimit": f'"api";r=0;t={told}'}, 0) for told in ("-5", "nan", "inf", "1e9", "soon", "")),
        *(({"Retry-After": told}, 0) for told in ("Mon, 99 Foo 2026 99:99:99 GMT", "6 Nov 1994")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_is_waited_for_as_long_as_it_asks_and_no_longer(
    standin: StandIn, status: int, headers: dict[str, str], seconds: float
) -> None:
    standin.trouble(".*", Answer(status, {}, {k: v.encode().decode("latin-1") for k, v in headers.items()}))
    told = f" {seconds} s" if seconds else ""
    why = "asks to wait" if status == 429 else "answered 503"
    with pytest.raises(Unavailable, match=f"{why}{told}; try again later") as caught:
        hasty(standin.url, answer=60.0).head("ann/milo")
    assert caught.value.seconds == seconds


def test_a_hub_may_name_the_moment_to_come_back(standin: StandIn) -> None:
    for days, seconds in ((400, 3600), (-400, 0)):
        moment = datetime.now(UTC) + timedelta(days=days)
        standin.trouble(".*", Answer(429, {}, {"Retry-After": format_datetime(moment, usegmt=True)}))
        with pytest.raises(Unavailable) as caught:
            hasty(standin.url).head("ann/milo")
        assert caught.value.seconds == seconds


@contextmanager
def proxy(seen: list[bytes]) -> Iterator[str]:
    """A proxy that lets nobody through, and remembers what it was told."""

    def refuse(connection: object) -> None:
        seen.append(connection.recv(65536))  # type: ignore[attr-defined]
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")  # type: ignore[attr-defined]

    with listening(refuse) as address:
        yield f"http://ann:proxy-secret@{address}"


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment's proxies are read anew, before and after."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    guard.install()
    close_session()
    yield monkeypatch
    close_session()


def test_a_proxy_sees_hosts_and_no_token(standin: StandIn, proxied: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    standin.repo("ann/milo")
    with proxy(seen) as url:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            proxied.setenv(name, url)
        hasty(standin.url).head("ann/milo")  # in the clear, so past every proxy
        assert seen == []
        with pytest.raises(Unavailable, match="cut the connection") as caught:
            hasty("https://hub.example").head("ann/milo")
    (told,) = seen
    assert told.startswith(b"CONNECT hub.example:443 HTTP/1.1\r\n")
    assert b"Bearer" not in told
    assert TOKEN.encode() not in told
    assert "secret" not in str(caught.value)


def test_what_is_not_to_be_proxied_is_not(proxied: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    with proxy(seen) as url, listening(lambda connection: connection.close()) as address:
        proxied.setenv("HTTPS_PROXY", url)
        proxied.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(Unavailable):
            hasty(f"https://{address}").head("ann/milo")
    assert seen == []


def test_plain_http_that_another_proxy_is_for_goes_past_it(
    standin: StandIn, proxied: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    standin.repo("ann/milo")
    with proxy(seen) as url:
        proxied.setenv("ALL_PROXY", url)
        hasty(standin.url).head("ann/milo")
        with pytest.raises(Unavailable):  # no proxy was named for https
            hasty("https://127.0.0.1:9").head("ann/milo")
    assert seen == []


@pytest.mark.parametrize(
    "url", ["ftp://ann:secret@proxy.example", "socks9://ann:secret@x", "http://x:secret"]
)
def test_a_proxy_that_is_none_is_told_of_without_its_password(proxied: pytest.MonkeyPatch, url: str) -> None:
    proxied.setenv("HTTPS_PROXY", url)
    with pytest.raises(Unavailable, match=r"the proxy in HTTPS_PROXY cannot be used") as caught:
        hasty("https://hub.example").head("ann/milo")
    assert "secret" not in "".join(traceback.format_exception(caught.value))
