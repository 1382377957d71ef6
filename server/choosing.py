"""Which method, which order, which weights: decided by looking at pictures, not by a formula.

Weight space hardly sees what fights (two published adapters were orthogonal to 0.02 and fought all the same),
and no method wins everywhere. So the stack is rendered on a few prompts under every candidate, and what an
inspection suggests (`server.suggestion`), and scored:

    a candidate's value = mean over the pictures of the least that is left in each, of any adapter or, where
                          that is seen, of the prompt (`server.scorers`)

Weights are then found as artists find them: the first adapter alone from a low weight up until it just takes
effect, then the next beside it, and so on. From the best of all trials they are moved a little at a time, one
adapter after the other, as long as the value grows. Every trial is one job in the queue, so that others get
their turn between them; all have one place there, or a queue that is full halfway would lose what was tried.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from compose.bases import Base
from compose.clip import Clip
from compose.errors import InvalidRequest
from compose.groups import nobody_asks
from compose.interference import interference
from compose.merging import check
from compose.methods import Parameters
from compose.render import Picture
from compose.settings import COUNT_LIMIT, Settings
from compose.sheet import contact_sheet
from compose.weights import AS_TRAINED, Weight
from server.calibrations import Calibrations, calling
from server.calls import current
from server.checkin import LORA
from server.engine import Trying
from server.errors import BadRequest
from server.job import Ask, Caller, Place
from server.outbox import Done
from server.pinned import Pinned, fill, is_dora
from server.scheduler import Scheduler
from server.scorers import Scorer, scorer
from server.shelf import Check
from server.stacks import Composition, Stacks, applied, merges
from server.suggestion import Suggestion, suggest

PICTURES, STEPS, SEED = 12, 12, 7
PIXELS_LIMIT = 64 << 20
"""Of all pictures of one trial: as many as 64 of 1024 x 1024."""
ROWS, COLUMNS, SHOWN = 12, 8, 120
"""Of the sheet: the best trials, pictures in a row, and pictures in all, which keep it within 4 MB or so."""
CLIMB, TAKES_EFFECT = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4), 0.75
"""Shares of the weight that was asked for, and how much of an adapter is there when it takes effect."""
MOVES = (0.8, 0.9, 1.1, 1.25)
STACK_LIMIT = 4
"""Of adapters to choose for."""

Ordered = tuple[str, Parameters, tuple[int, ...]]
"""A method, what it is told, and the stack's places in order of priority."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was looked at: the stack in its order, mean retention by place in the request, the
    value, what is left of the prompt where that is seen, and while an adapter's weight goes up its place in
    the request and that weight.
    """

    method: str
    parameters: Parameters
    stack: tuple[Pinned, ...]
    retention: tuple[float, ...]
    value: float
    pictures: tuple[Picture, ...]
    prompt: float | None = None
    climbs: tuple[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be decided for: the stack, the base that it is looked at on, prompts that call all of it,
    `size` in pixels a side (0 is the base's own), what may be varied, and what is suggested before a
    picture is seen.
    """

    stack: tuple[Pinned, ...]
    base: Base
    prompts: tuple[str, ...]
    steps: int = STEPS
    size: int = 0
    methods: tuple[Ordered, ...] = ()
    weights: bool = False
    suggestion: Suggestion | None = None

    @property
    def triggers(self) -> list[str]:
        """What calls each adapter first; "" for one that nothing calls, or that takes away (a weight below
        0): no judge can see that.
        """
        return [p.triggers[0] if p.triggers and p.weight.value >= 0 else "" for p in self.stack]


class Chooser:
    """Asks the engine, through the queue."""

    def __init__(
        self, stacks: Stacks, queue: Scheduler, calibrations: Calibrations, clip: Clip | None = None
    ) -> None:
        self._stacks, self._queue, self._calibrations = stacks, queue, calibrations
        self._clip = clip

    def question(
        self,
        stack: tuple[Pinned, ...],
        *,
        prompts: Sequence[str],
        pictures: int = PICTURES,
        steps: int = STEPS,
        weights: bool = False,
        base: str = "",
        size: int | None = None,
        wanted: Check = nobody_asks,
    ) -> Question:
        """A question about a stack of 1 to 4 LoRAs, on the base of that name or the first that it fits;
        candidates are the methods that ever did best on pocket. What `wanted` raises meanwhile ends it.
        Raises BadRequest, InvalidRequest, IncompatibleBase.
        """
        if not 1 <= len(stack) <= STACK_LIMIT:
            raise BadRequest(
                f"a choice is made for 1 to {STACK_LIMIT} adapters, not {len(stack)}", field="stack"
            )
        if other := next((p for p in stack if p.version.kind != LORA), None):
            raise BadRequest(
                f"{other.version.ref} is no LoRA: there is nothing to choose for it", field="stack"
            )
        if not 1 <= pictures <= COUNT_LIMIT:
            raise BadRequest(f"pictures {pictures} is not within 1 and {COUNT_LIMIT}", field="pictures")
        on = self._calibrations.served.under(stack, base)
        side = on.size if size is None else size
        if pictures * side**2 > PIXELS_LIMIT:
            raise BadRequest(
                f"{pictures} pictures of {side}x{side} are more than {PIXELS_LIMIT >> 20} megapixels; ask "
                "for fewer, or smaller ones",
                field="pictures",
            )
        told = [fill(prompt, stack) for prompt in prompts]
        if not told:
            mute = next((p for p in stack if not p.triggers), None)
            if mute:
                raise BadRequest(
                    f"{mute.version.ref} has no trigger word; give prompts that call it", field="prompts"
                )
            told = calling([p.triggers[0] for p in stack], on, pictures)
        told = [told[i % len(told)] for i in range(pictures)]
        for prompt in dict.fromkeys(told):
            Settings(prompt=prompt, steps=steps, width=side, height=side).check(on.granularity)
        methods, suggestion = self._candidates(stack, on), self._suggested(stack, on, wanted)
        return Question(stack, on, tuple(told), steps, side, methods, weights, suggestion)

    def _suggested(self, stack: Sequence[Pinned], base: Base, wanted: Check) -> Suggestion | None:
        if len(stack) == 1 or any(map(is_dora, stack)):
            return None
        _, adapters = self._stacks.weighed(stack, base.name, wanted)
        return suggest(interference(adapters, check=wanted), stack)

    def _candidates(self, stack: Sequence[Pinned], base: Base) -> tuple[Ordered, ...]:
        places = tuple(range(len(stack)))
        # DoRA is no product of factors, and merges with nothing.
        if len(stack) == 1 or any(map(is_dora, stack)):
            return (("naive", Parameters(), places),)
        orders = [(first, *(i for i in places if i != first)) for first in places]
        found: list[Ordered] = [("naive", Parameters(), places), ("tsv", Parameters(), places)]
        found += [
            ("magnitude-prune", Parameters(), places),
            ("orthogonal", Parameters(side="output"), orders[0]),
        ]
        found += [("orthogonal", Parameters(), order) for order in orders]
        if all(self._calibrations.of(p.version, base) for p in stack):
            found += [("activation", Parameters(mu=0.3), order) for order in orders]
        return tuple(found)

    async def trials(self, question: Question, caller: Caller) -> AsyncIterator[Trial]:
        """Every trial as it is made; the best of them is the answer. Raises what a render raises."""
        with self._queue.place() as room:
            async for trial in self._trials(question, caller, room):
                yield trial

    async def _trials(self, question: Question, caller: Caller, room: Place) -> AsyncIterator[Trial]:
        async def look(stack: tuple[Pinned, ...], method: str, parameters: Parameters) -> list[Picture]:
            ask = Ask(
                what=f"try {method} on {len(question.prompts)} pictures: "
                + (" > ".join(p.version.ref for p in stack) or "the bare base"),
                load=partial(self._work, question, stack, method, parameters),
                merges=merges(method),
                place=room,
            )
            current().begin("queue")
            with self._queue.admit(ask, caller) as ticket:
                async for event in ticket.events():
                    match event:
                        case Done(list() as pictures):
                            return pictures
            raise AssertionError("a trial ends with its pictures")

        without = await look((), "naive", Parameters())
        whole = [replace(p, weight=Weight(math.copysign(1, p.weight.value))) for p in question.stack]
        alone = [await look((pinned,), "naive", Parameters()) for pinned in whole]

        scores = await asyncio.to_thread(
            Scorer, question.base, question.triggers, question.prompts, self._clip, without, alone
        )

        made: dict[object, Trial] = {}

        async def attempt(
            how: Ordered, stack: tuple[Pinned, ...], climbs: tuple[int, float] | None = None
        ) -> Trial | None:
            """A trial; None for one that was made before, which is told again only as part of a climb."""
            method, parameters, order = how
            ordered = tuple(stack[i] for i in order)
            same = method, parameters, tuple((p.content, p.weight) for p in applied(ordered, method))
            if same in made:
                return replace(made[same], climbs=climbs) if climbs else None
            seen = await look(ordered, method, parameters)
            left = await asyncio.to_thread(scores.left, seen)
            made[same] = Trial(
                method,
                parameters,
                ordered,
                tuple(float(share.mean()) for share in left.adapters),
                float(left.least().mean()),
                tuple(seen[:COLUMNS]),
                None if left.prompt is None else float(left.prompt.mean()),
                climbs,
            )
            return made[same]

        best, how, stack = None, question.methods[0], question.stack
        for candidate in question.methods:
            if (trial := await attempt(candidate, stack)) is None:
                continue
            yield trial
            if best is None or trial.value > best.value:
                best, how = trial, candidate
        if (said := question.suggestion) and best is not None:
            candidate, suggested = (said.method, said.parameters, said.order), said.stack(stack)
            if trial := await attempt(candidate, suggested):
                yield trial
                if trial.value > best.value:
                    best, how, stack = trial, candidate, suggested
        if not question.weights or best is None:
            return
        climbed = tuple(replace(p, weight=replace(p.weight, value=0.0)) for p in question.stack)
        for place, pinned in enumerate(question.stack):
            here, most = climbed, -1.0
            for share in CLIMB:
                moved = _moved(pinned.weight if pinned.weight.value else AS_TRAINED, share)
                tried = _with(here, place, moved)
                try:
                    trial = await attempt(how, tried, (place, moved.value))
                except InvalidRequest:  # it would weigh too much
                    break
                assert trial is not None
                yield trial
                if trial.retention[place] >= most:
                    climbed, most = tried, trial.retention[place]
                if trial.value > best.value:
                    best, stack = trial, tried
                if most >= TAKES_EFFECT:
                    break
        for place in range(len(stack)):
            centre = stack[place].weight
            for share in MOVES:
                tried = _with(stack, place, _moved(centre, share))
                try:
                    trial = await attempt(how, tried)
                except InvalidRequest:
                    continue
                if trial is None:
                    continue
                yield trial
                if trial.value > best.value:
                    best, stack = trial, tried

    def _work(
        self,
        question: Question,
        stack: tuple[Pinned, ...],
        method: str,
        parameters: Parameters,
        wanted: Callable[[], None],
    ) -> Trying:
        composition = Composition((), (), None)
        if stack:
            check([p.weight for p in stack], method, parameters)
            composition = self._stacks.compose_measured(
                stack, question.base, method=method, parameters=parameters, check=wanted
            )
        return Trying(
            composition, question.prompts, SEED, question.steps, question.size, base=question.base.name
        )

    def scorer(self, question: Question) -> str:
        """Which scorer decides: `judge`, `clip` or `effect`."""
        return scorer(question.base, question.triggers, self._clip)


def _moved(weight: Weight, share: float) -> Weight:
    """`share` times as strong, of four digits; the same parts."""
    return replace(weight, value=float(f"{weight.value * share:.4g}"))


def _with(stack: tuple[Pinned, ...], place: int, weight: Weight) -> tuple[Pinned, ...]:
    """The stack with another weight at a place."""
    return (*stack[:place], replace(stack[place], weight=weight), *stack[place + 1 :])


@dataclass(frozen=True, slots=True)
class Climb:
    """What was left of the adapter at a place as its weight went up, and the weight that it came to."""

    place: int
    weights: tuple[float, ...]
    retention: tuple[float, ...]

    @property
    def chosen(self) -> float:
        """The weight at which most of it was there: the last, where it took effect."""
        return max(zip(self.retention, range(len(self.weights)), self.weights, strict=True))[2]


def climbs(trials: Sequence[Trial]) -> list[Climb]:
    """One for each adapter whose weight went up, by place."""
    found: dict[int, list[tuple[float, float]]] = {}
    for trial in trials:
        if trial.climbs:
            place, weight = trial.climbs
            found.setdefault(place, []).append((weight, trial.retention[place]))
    return [Climb(place, *zip(*points, strict=True)) for place, points in found.items()]


def label(trial: Trial) -> str:
    """A trial in two lines: the method with what it is told, and the stack in its order."""
    told = ", ".join(f"{name} {getattr(trial.parameters, name)}" for name in sorted(trial.parameters.given()))
    return f"{trial.method}{f' ({told})' if told else ''}: {trial.value:.0%}\n{_stacked(trial)}"


def _stacked(trial: Trial) -> str:
    return " > ".join(f"{p.version.name} {p.weight}" for p in trial.stack if p.weight.value)


def sheet(trials: Sequence[Trial], question: Question) -> Picture:
    """The first pictures of the best trials, the best first; below, those of every weight that went up."""
    once = {id(trial.pictures): trial for trial in trials}.values()  # one that is told again has the same
    best_first = sorted(once, key=lambda trial: -trial.value)[:ROWS]
    rows = [(label(trial), trial.pictures) for trial in best_first]
    for trial in trials:
        if trial.climbs:
            place, weight = trial.climbs
            name, share = question.stack[place].version.name, trial.retention[place]
            rows.append((f"{name} {weight:g}: {share:.0%}\n{_stacked(trial)}", trial.pictures))
    columns = min(COLUMNS, SHOWN // len(rows))
    return contact_sheet(
        [(text, pictures[:columns]) for text, pictures in rows],
        title=f"What is left of each, together: {question.prompts[0]}, …",
        fold=True,
    )


async def choose(chooser: Chooser, question: Question, caller: Caller) -> tuple[Trial, list[Trial]]:
    """The best trial, and all of them."""
    trials = [trial async for trial in chooser.trials(question, caller)]
    return max(trials, key=lambda trial: trial.value), trials
