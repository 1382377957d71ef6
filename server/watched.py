"""An engine that tells what it does: phases, steps, outcomes; and what it is at, for whoever looks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from compose.ledger import Ledger
from compose.render import Listener, Picture, Rendered, YieldingListener
from server.calls import GIVEN_UP, WAITING, Call, working_for
from server.engine import AnyWork, BaseInfo, Engine, Measuring, Result, Trying, Work
from server.errors import Cancelled, DeadlineExceeded
from server.telemetry import Telemetry

KINDS: dict[type, str] = {Work: "render", Measuring: "calibrate", Trying: "tune"}


@dataclass(slots=True)
class Running:
    """What the engine is at. `step` counts the steps of picture `image` that are done."""

    call: Call
    kind: str
    base: str
    images: int
    steps: int
    phase: str
    began: float
    image: int = 0
    step: int = 0


class Watched:
    """An engine in front of another, for the scheduler's thread; `running` may be read from any other."""

    def __init__(self, engine: Engine, telemetry: Telemetry) -> None:
        self._engine, self._telemetry = engine, telemetry
        self.running: Running | None = None

    @property
    def info(self) -> BaseInfo:
        """The first of its bases."""
        return self._engine.info

    @property
    def infos(self) -> Mapping[str, BaseInfo]:
        """All its bases."""
        return self._engine.infos

    @property
    def loaded(self) -> tuple[BaseInfo, ...]:
        """The bases that are warm."""
        return self._engine.loaded

    @property
    def ledger(self) -> Ledger:
        """The account of its device's memory."""
        return self._engine.ledger

    @property
    def host(self) -> Ledger:
        """The account of the host's memory that bases take besides."""
        return self._engine.host

    def norms(self, base: str) -> Mapping[str, float]:
        """||W||_F of a base's layers, once it was warm."""
        return self._engine.norms(base)

    def do(self, work: AnyWork, listener: Listener) -> Result:
        """Does it, telling the listener, and the call that it is for."""
        call, alone = work.call, work.call.ended
        if alone:  # work that outlives the call which asked for it: others wait for it, too
            call = Call(self._telemetry, "job", request_id=call.request_id, client=call.client)
        for waited in WAITING:
            call.end(waited)
        kind = KINDS[type(work)]
        images, steps = _size(work)
        first = work.images.start if isinstance(work, Work) and work.images is not None else 0
        now = time.perf_counter()
        phase = "patch" if kind == "render" else kind
        base = work.base or self.info.base.name
        self.running = Running(call, kind, base, images, steps, phase, now, first)
        call.begin(phase)
        outcome, code = "failed", grpc.StatusCode.INTERNAL
        try:
            with working_for(call):
                result = self._engine.do(work, _Watching(listener, self.running, self._telemetry))
            if kind != "render":  # whose phases are told one by one
                call.end(phase)
            unfinished = isinstance(result, Rendered) and result.gave_way_at is not None
            outcome, code = "unfinished" if unfinished else "done", grpc.StatusCode.OK
            return result
        except Cancelled:
            code = call.code or grpc.StatusCode.CANCELLED  # of a late call the end comes first
            outcome = GIVEN_UP.get(code, "cancelled")
            raise
        except DeadlineExceeded:
            outcome, code = "deadline", grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        finally:
            self.running = None
            if kind == "render" and outcome != "unfinished":
                self._telemetry.render(outcome)
            if outcome not in {"done", "unfinished"}:
                call.cut(outcome)
            if alone:
                call.finish(code)


class _Watching:
    """A listener in front of another."""

    def __init__(self, listener: Listener, running: Running, telemetry: Telemetry) -> None:
        self._listener, self._running, self._telemetry = listener, running, telemetry
        self._last = time.perf_counter()

    def check(self) -> None:
        """Passed on."""
        self._listener.check()

    def step(self, image: int, step: int) -> None:
        """A step is done."""
        self._running.image, self._running.step = image, step
        self._telemetry.step(time.perf_counter() - self._last)
        self._listener.step(image, step)
        self._last = time.perf_counter()

    def preview(self, image: int, step: int, picture: Picture) -> None:
        """A preview was decoded, which is no part of the next step."""
        self._listener.preview(image, step, picture)
        self._last = time.perf_counter()

    def picture(self, image: int, picture: Picture) -> None:
        """A picture is done."""
        running = self._running
        self._listener.picture(image, picture)
        if image + 1 < running.images:
            running.image, running.step = image + 1, 0

    def gives_way(self) -> bool:
        """Passed on; else the next picture begins."""
        if isinstance(self._listener, YieldingListener) and self._listener.gives_way():
            return True
        self._expect("denoise")
        return False

    def phase(self, name: str, seconds: float) -> None:
        """A phase of a render ended; the next is likely the one that follows."""
        self._running.call.took(name, seconds, begun=self._running.phase)
        following = {"patch": "embed", "embed": "denoise", "guide": "denoise", "denoise": "decode"}.get(name)
        if following:
            self._expect(following)

    def _expect(self, phase: str) -> None:
        self._running.phase = phase
        self._running.call.begin(phase)
        self._last = time.perf_counter()


def _size(work: AnyWork) -> tuple[int, int]:
    """Pictures, and steps of each."""
    match work:
        case Work(settings):
            return settings.count, settings.steps
        case Measuring(settings, _, prompts):
            return len(prompts), settings.steps
        case Trying():
            return len(work.prompts), work.steps
