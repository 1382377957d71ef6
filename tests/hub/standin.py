"""A stand-in for the Hub: a real HTTP server that speaks the routes which huggingface_hub uses, and can be
told to misbehave.

    with StandIn(tmp_path) as hub:
        hub.repo("ann/milo").write({"README.md": File.regular(b"# Milo")}, "by hand")
        hub.trouble("POST .*/commit/", Trouble.CUT_AFTER)
"""

import base64
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.hub.repos import File, Repo, Storage
from tests.hub.routes import ROUTES, Answer, Pace, Refusal

TOKEN = "hf_canary_Vx7Qm2Lk9Tz4"
DRIP_SECONDS = 0.01
"""Between two bytes of what drips."""


class Trouble(Enum):
    """What a request meets instead of its answer."""

    STALL = auto()
    """Nothing comes, until the stand-in closes."""
    CUT_BEFORE = auto()
    """The connection is cut and nothing is done."""
    CUT_AFTER = auto()
    """It is done, and then the connection is cut."""


@dataclass(slots=True)
class _Planned:
    pattern: re.Pattern[str]
    trouble: Trouble | Answer | Pace
    left: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    authorization: str


@dataclass(slots=True, repr=False)
class StandIn:
    """The server. `token` is the one it wants for what is private, gated or written."""

    directory: Path
    token: str = TOKEN
    page: int = 1000
    """Entries of a tree in one page."""
    endless: bool = False
    """Whether a tree's last page names a next one."""
    requests: list[Seen] = field(default_factory=list)
    repos: dict[str, Repo] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    extra: list[dict[str, object]] = field(default_factory=list)
    """Entries that every tree lists besides its own."""
    corrupt: set[str] = field(default_factory=set)
    """Paths of files that come with other bytes of the same size."""
    redirects: dict[str, str] = field(default_factory=dict)
    """By path in a repo, where its download is redirected to."""
    upload_to: str = ""
    """The origin of upload links; empty: here."""
    verify_to: str = ""
    """The origin of the links that uploads are verified with; empty: here."""
    dead: Callable[[str], Trouble | None] | None = None
    """Asked before every request (METHOD PATH)."""
    storage: Storage = field(init=False)
    lock: threading.RLock = field(default_factory=threading.RLock)
    stopping: threading.Event = field(default_factory=threading.Event)
    _planned: list[_Planned] = field(default_factory=list)
    _server: ThreadingHTTPServer = field(init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(self.directory)

    def __repr__(self) -> str:
        return f"StandIn at {self.url}"

    def __enter__(self) -> Self:
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def repo(self, name: str, **told: bool) -> Repo:
        """A repository; a new one begins as the Hub's do."""
        if name not in self.repos:
            self.repos[name] = Repo(name, **told)
            self.repos[name].write({".gitattributes": File.regular(b"*.safetensors filter=lfs\n")}, "initial")
        return self.repos[name]

    def trouble(self, pattern: str, trouble: Trouble | Answer | Pace, *, times: int = 1) -> None:
        """What the next requests (METHOD PATH) that fit a pattern meet; a pace is how their own answer
        comes.
        """
        self._planned.append(_Planned(re.compile(pattern), trouble, times))

    def due(self, request: str) -> Trouble | Answer | Pace | None:
        """What this request meets."""
        if self.dead and (trouble := self.dead(request)):
            return trouble
        for planned in self._planned:
            if planned.left and planned.pattern.match(request):
                planned.left -= 1
                return planned.trouble
        return None

    @contextmanager
    def counted(self) -> Iterator[list[Seen]]:
        """The requests that come within."""
        before, seen = len(self.requests), list[Seen]()
        yield seen
        seen += self.requests[before:]

    def allowed(self, authorization: str) -> bool:
        return authorization == f"Bearer {self.token}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: StandIn) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Tests look at `requests`."""

    def _serve(self) -> None:
        hub, request = self.server.hub, f"{self.command} {self.path}"
        hub.requests.append(Seen(self.command, self.path, self.headers.get("authorization", "")))
        due = hub.due(request)
        if due is Trouble.STALL:
            hub.stopping.wait(60)
        if due is Trouble.STALL or due is Trouble.CUT_BEFORE:
            self._cut()
            return
        if isinstance(due, Answer):
            self._body()
            self._send(due)
            return
        try:
            answer = self._routed(hub)
        except Refusal as refusal:
            answer = refusal.answer
        if due is Trouble.CUT_AFTER:
            self._cut()
        else:
            self._send(replace(answer, pace=due) if isinstance(due, Pace) else answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815  # the names of http.server

    def _routed(self, hub: StandIn) -> Answer:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        for methods, pattern, route in ROUTES:
            if self.command in methods and (match := pattern.fullmatch(path)):
                if route.__name__ == "put_object":  # not into memory
                    return self._received(hub, match[1])
                told = Asked(
                    self.command,
                    dict(urllib.parse.parse_qsl(url.query)),
                    self._body(),
                    self.headers.get("authorization", ""),
                    self.headers.get("range", ""),
                )
                with hub.lock:
                    return route(hub, told, *match.groups())
        self._body()
        return Answer(404, {"error": f"no such route: {self.command} {path}"})

    def _received(self, hub: StandIn, sha256: str) -> Answer:
        part = hub.storage.path(f"{sha256}.{threading.get_ident()}")
        with part.open("wb") as file:
            for piece in self._pieces():
                file.write(piece)
        part.replace(hub.storage.path(sha256))
        return Answer(200, {})

    def _pieces(self) -> Iterator[bytes]:
        left = int(self.headers.get("content-length") or 0)
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        while left and (piece := self.rfile.read(min(left, 1 << 20))):
            left -= len(piece)
            yield piece

    def _body(self) -> bytes:
        return b"".join(self._pieces())

    def _cut(self) -> None:
        self.close_connection = True

    def _send(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        size = answer.file.stat().st_size if answer.file else len(body)
        self.send_response(answer.status)
        length = {} if answer.pace is Pace.ENDLESS else {"Content-Length": str(size)}
        for name, value in {**length, **answer.headers}.items():
            self.send_header(name, value)
        if answer.pace is Pace.HEADERS_DRIP:
            self._drip(b"".join(self._headers_buffer))
            self._headers_buffer.clear()
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.pace is Pace.BODY_DRIPS:
            self._drip(answer.file.read_bytes() if answer.file else body)
        elif answer.pace is Pace.ENDLESS:
            self._cut()  # what has no length ends with the connection
            while not self.server.hub.stopping.is_set():
                self.wfile.write(body)
        elif answer.file:
            with answer.file.open("rb") as file:
                while piece := file.read(1 << 20):
                    self.wfile.write(piece)
        else:
            self.wfile.write(body)

    def _drip(self, data: bytes) -> None:
        for place in range(len(data)):
            if self.server.hub.stopping.wait(DRIP_SECONDS):
                return
            self.wfile.write(data[place : place + 1])
            self.wfile.flush()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as routes see it."""

    method: str
    query: dict[str, str]
    body: bytes
    authorization: str
    range: str

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def form(self) -> dict[str, list[str]]:
        return urllib.parse.parse_qs(self.body.decode())


def decoded(text: str) -> bytes:
    """base64."""
    return base64.b64decode(text)
