"""A job and the tickets of those who wait for it.

Callers who want the same get one job: whoever joins is told what is finished already and goes on from there.
Each ticket ends by itself, with its own deadline; the job ends within one denoising step of its last ticket.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from types import TracebackType

from compose.render import Picture
from server.calls import Call, current
from server.engine import AnyWork, Result
from server.errors import Cancelled, DeadlineExceeded
from server.fairness import Claim
from server.outbox import Done, Event, Finished, Outbox, Preview, Started, Step
from server.pace import Effort
from server.spool import Spool
from server.turns import left_by, together, turn_of

KEPT, KEPT_BYTES = 32, 128 << 20
SHARED_BYTES = 256 << 20
"""Of finished pictures that a running job holds for who joins it; with more of them nobody can any more."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a name to be fair by, and the deadline (of time.monotonic)."""

    name: str = ""
    deadline: float | None = None


class Place:
    """Room in the queue for a request that brings one job after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is wanted. `load` makes the work, on a thread of its own before the job's turn; it may take long,
    and is given a check to call now and then, which raises when nobody waits for the work any more.

    Equal `identity` is the same result, which is made once; `key` is the stack that the pipeline will hold,
    `base` the pipeline; with `merges` the load waits for other merges; with `keep` the result is there for a
    while for who asks again. A job in a `place` needs no other; nor does a `durable` one, which is kept
    elsewhere and comes when there is room. `call` is that which asks.
    """

    what: str
    load: Callable[[Callable[[], None]], AnyWork]
    identity: object = None
    key: object = None
    base: str = ""
    merges: bool = False
    effort: Effort | None = None
    priority: int = 0
    keep: bool = False
    durable: bool = False
    place: Place | None = None
    call: Call = field(default_factory=current, compare=False)


@dataclass(slots=True, eq=False)
class Job:
    """One piece of work, its own render's listener; `durable` when all who wait for it are. It is done in
    turns (`server.turns`), between which it waits again. Guarded by its scheduler's mutex.
    """

    ask: Ask
    mutex: threading.Condition
    spool: Spool
    tickets: list["Ticket"] = field(default_factory=list)
    work: AnyWork | None = None
    loading: bool = False
    load_seconds: float = 0.0
    began: float | None = None
    over: bool = False
    keep: bool = False
    durable: bool = False
    clients: set[str] = field(default_factory=set)
    image: int = 0
    steps_done: int = 0
    pictures: list[Finished] = field(default_factory=list)
    shared: bool = True
    _steps: dict[int, tuple[float, int, float]] = field(default_factory=dict)
    others: Callable[["Job"], bool] = lambda _: False
    _results: list[Result] = field(default_factory=list)
    _left: range = range(0)
    _turn_began: float = 0.0
    _rested: float | None = None
    _others_seconds: float = 0.0

    def start(self, now: float) -> AnyWork:
        """What is to be done in this turn. With the first it tells everybody that it runs now."""
        assert self.work is not None
        self._steps.clear()
        self._turn_began = time.perf_counter()
        self.clients = {ticket.caller.name for ticket in self.tickets}
        if self._rested is not None:
            self._others_seconds, self._rested = self._others_seconds + now - self._rested, None
        if self.began is None:
            self._begin(now)
        return turn_of(self.work, self._left)

    def rest(self, now: float, result: Result) -> Result | None:
        """A turn is over; what all of them came to, after the last."""
        assert self.work is not None
        self._results.append(result)
        self._left = left_by(self.work, result)
        if not self._left:
            return together(self._results, self._others_seconds)
        self._rested = now
        return None

    def gives_way(self) -> bool:
        """Whether somebody else should have a turn now."""
        return self.others(self)

    def turn_seconds(self) -> tuple[float, float]:
        """What this turn took to begin, its first step included, and how long it has lasted since."""
        first = min((begun for begun, _, _ in self._steps.values()), default=self._turn_began)
        return first - self._turn_began, time.perf_counter() - first

    def left(self) -> Effort | None:
        """What is still to be done of it, the turn that runs included."""
        effort, left = self.ask.effort, self._left  # once: the render thread shortens it
        if effort is None or not left:
            return effort
        return replace(effort, steps=-(-effort.steps * len(left) // left.stop))

    def _begin(self, now: float) -> None:
        self.began = now
        for ticket in self.tickets:
            waited = max(0.0, now - ticket.claim.since - self.load_seconds)
            ticket.outbox.put(Started(waited, self.load_seconds))

    def join(self, ticket: "Ticket") -> None:
        """Another caller waits for it."""
        self.tickets.append(ticket)
        if self.began is not None:
            self.clients.add(ticket.caller.name)
            ticket.outbox.put(Started(0.0))
            for finished in self.pictures:
                ticket.outbox.put(finished)

    def drop_late(self, now: float) -> list["Ticket"]:
        """Ends the tickets whose deadline passed."""
        late = [t for t in self.tickets if t.caller.deadline is not None and now >= t.caller.deadline]
        for ticket in late:
            self.tickets.remove(ticket)
            ticket.outbox.fail(
                DeadlineExceeded(
                    "the deadline passed before the render was done; allow more time or fewer steps"
                )
            )
        return late

    def check(self) -> None:
        """Raises Cancelled when nobody waits for it any more."""
        with self.mutex:
            self.drop_late(time.monotonic())
            if not self.tickets:
                self.shared = False  # who comes now is too late
                raise Cancelled("the render was cancelled")

    def step(self, image: int, step: int) -> None:
        """Progress."""
        now = time.perf_counter()
        begun, done, _ = self._steps.get(image, (now, 0, now))
        self._steps[image] = (begun, done + 1, now)  # of 20 steps from a picture fewer are done
        with self.mutex:
            self.image, self.steps_done = image, step
            self._tell(Step(image, step))

    def step_seconds(self) -> float | None:
        """Seconds a step took, on the average of the pictures that did more than one."""
        spans = [(end - begun) / (done - 1) for begun, done, end in self._steps.values() if done > 1]
        return sum(spans) / len(spans) if spans else None

    def preview(self, image: int, step: int, picture: Picture) -> None:
        """What the picture will roughly be."""
        with self.mutex:
            self._tell(Preview(image, step, self.spool.put(picture)))

    def picture(self, image: int, picture: Picture) -> None:
        """A finished picture."""
        with self.mutex:
            finished = Finished(image, self.spool.put(picture))
            if self.shared and self.ask.identity is not None:
                self.pictures.append(finished)
            if size(self.pictures) > SHARED_BYTES:
                self.shared = False
                self.pictures.clear()
            self._tell(finished)

    def _tell(self, event: Event) -> None:
        for ticket in self.tickets:
            ticket.outbox.put(event)

    def describe(self) -> str:
        """Whose it is, for people."""
        return ", ".join(dict.fromkeys(ticket.caller.name for ticket in self.tickets))


class Ticket:
    """One caller's hold on a job; leaving it is giving up."""

    def __init__(
        self, job: Job, caller: Caller, claim: Claim[Job], leave: Callable[["Ticket"], None]
    ) -> None:
        self.job, self.caller, self.claim, self._leave = job, caller, claim, leave
        self.position = 0
        self.outbox = Outbox()

    def events(self) -> AsyncIterator[Event]:
        """What happens, until `Done`; raises what the job failed with."""
        return self.outbox.events()

    def leave(self) -> None:
        """Waits no more. Harmless afterwards."""
        self._leave(self)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


class Kept:
    """Results of a moment ago, by identity: the last `KEPT` that have `KEPT_BYTES` together."""

    def __init__(self) -> None:
        self._results: OrderedDict[object, tuple[list[Finished], Result]] = OrderedDict()

    def keep(self, identity: object, pictures: list[Finished], result: Result) -> None:
        """Keeps a result, if there is room for it at all."""
        self._results[identity] = (pictures, result)
        self._results.move_to_end(identity)
        while len(self._results) > KEPT or sum(size(p) for p, _ in self._results.values()) > KEPT_BYTES:
            self._results.popitem(last=False)

    def events(self, identity: object) -> list[Event]:
        """All that its render told in the end; nothing when it is not kept."""
        if identity not in self._results:
            return []
        pictures, result = self._results[identity]
        return [Started(0.0), *pictures, Done(result)]


def size(pictures: list[Finished]) -> int:
    """Bytes of pictures."""
    return sum(finished.picture.nbytes for finished in pictures)
