"""The Engine: what renders, behind one small protocol, so that the GPU side can move to another process or
machine.

Today there is one: warm pipelines in this process, owned by the scheduler's thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from compose.bases import Base
from compose.calibrate import measure
from compose.families import table
from compose.guiding import UNGUIDED, Guides
from compose.ledger import Ledger
from compose.manifest import environment
from compose.moments import Moments
from compose.render import Listener, Picture, Rendered, render
from compose.residence import Residence
from compose.schedule import ALWAYS, Plan
from compose.schedulers import schedulers
from compose.settings import Settings
from compose.source import Source
from compose.trial import pictures
from compose.warm import WarmPipeline, dtype_name, dtype_on
from server.calls import Call, current
from server.stacks import Composition


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A base this engine holds. Sizes in pixels; `granularity` is what sizes are multiples of; `schedulers`
    are those it can be rendered with.
    """

    base: Base
    device: str
    dtype: str
    modules: int
    size: int
    granularity: int
    scheduler: str
    environment: dict[str, str]
    schedulers: tuple[str, ...] = ()
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A render with everything resolved, and the call that it is for; `base` "" is the first. Of its pictures
    `images`, or all.
    """

    settings: Settings
    composition: Composition
    preview_every: int = 0
    plan: Plan = ALWAYS
    source: Source | None = None
    guides: Guides = UNGUIDED
    base: str = ""
    images: range | None = None
    call: Call = field(default_factory=current, compare=False)


@dataclass(frozen=True, slots=True)
class Measuring:
    """An adapter to be rendered alone on prompts of its own, for the moments of what flows through the
    layers.
    """

    settings: Settings
    composition: Composition
    prompts: tuple[str, ...]
    base: str = ""
    call: Call = field(default_factory=current, compare=False)


@dataclass(frozen=True, slots=True)
class Trying:
    """A stack to be looked at on a set of prompts, several in a batch; the pictures are thrown away
    afterwards. `size` in pixels a side, 0 for the base's own.
    """

    composition: Composition
    prompts: tuple[str, ...]
    seed: int
    steps: int
    size: int = 0
    base: str = ""
    call: Call = field(default_factory=current, compare=False)


AnyWork = Work | Measuring | Trying
Result = Rendered | Moments | list[Picture]


class Engine(Protocol):
    """Does one piece of work at a time."""

    @property
    def info(self) -> BaseInfo:
        """The first of its bases: what is rendered on when none is named."""

    @property
    def infos(self) -> Mapping[str, BaseInfo]:
        """All its bases, by name, loaded or not."""

    @property
    def loaded(self) -> tuple[BaseInfo, ...]:
        """The bases that are warm, the least recently used first. From any thread."""

    @property
    def ledger(self) -> Ledger:
        """The account of its device's memory, for everything that lies there."""

    @property
    def host(self) -> Ledger:
        """The account of the host's memory that bases take besides."""

    def norms(self, base: str) -> Mapping[str, float]:
        """||W||_F of a base's layers, once it was warm; before that {}. From any thread."""

    def do(self, work: AnyWork, listener: Listener) -> Result:
        """Does it on the calling thread, telling the listener: how a render went, moments by what was read
        (`compose.calibrate`), or pictures to look at.
        """


class InProcessEngine:
    """Warm pipelines in this process. Not thread-safe: the scheduler's thread owns it."""

    def __init__(self, bases: WarmPipeline | Residence) -> None:
        self.residence = bases if isinstance(bases, Residence) else Residence(bases)
        first = self.residence.loaded()[0]
        self._first = first.base.name
        self._norms = {self._first: first.norms()}
        self._sizes = {self._first: first.nbytes()}
        known = (first.base, *self.residence.others)
        self._infos = {base.name: _info(base, first) for base in known}

    @property
    def loaded(self) -> tuple[BaseInfo, ...]:
        """The bases that are warm, the least recently used first. From any thread."""
        names = [warm.base.name for warm in self.residence.loaded()]
        return tuple(replace(self._infos[name], size_bytes=self._sizes.get(name, 0)) for name in names)

    @property
    def ledger(self) -> Ledger:
        """The account of its device's memory."""
        return self.residence.ledger

    @property
    def host(self) -> Ledger:
        """The account of the host's memory that bases take besides."""
        return self.residence.host

    @property
    def info(self) -> BaseInfo:
        """The first of its bases."""
        return self._infos[self._first]

    @property
    def infos(self) -> Mapping[str, BaseInfo]:
        """All its bases, by name, loaded or not."""
        return self._infos

    def norms(self, base: str) -> Mapping[str, float]:
        """||W||_F of a base's layers, once it was warm; before that {}. From any thread."""
        return self._norms.get(base, {})

    def do(self, work: AnyWork, listener: Listener) -> Result:
        """Does it, telling the listener."""
        warm = self.residence.warm(work.base or self._first, listener.check)
        if warm.base.name not in self._norms:
            self._norms[warm.base.name] = warm.norms()
        try:
            return self._on(warm, work, listener)
        finally:  # counted here, where nobody changes it meanwhile
            self._sizes[warm.base.name] = warm.nbytes()

    @staticmethod
    def _on(warm: WarmPipeline, work: AnyWork, listener: Listener) -> Result:
        stack = work.composition
        match work:
            case Work():
                return render(
                    warm,
                    work.settings,
                    stack=stack.stack,
                    words=stack.words,
                    key=stack.key,
                    listener=listener,
                    preview_every=work.preview_every,
                    plan=work.plan,
                    source=work.source,
                    guides=work.guides,
                    only=work.images,
                )
            case Measuring():
                return measure(
                    warm,
                    work.prompts,
                    stack=stack.stack,
                    words=stack.words,
                    settings=work.settings,
                    listener=listener,
                )
            case Trying():
                return pictures(
                    warm,
                    work.prompts,
                    stack=stack.stack,
                    words=stack.words,
                    seed=work.seed,
                    steps=work.steps,
                    size=work.size,
                    guidance=warm.base.guidance,
                    check=listener.check,
                )


def _info(base: Base, warm: WarmPipeline) -> BaseInfo:
    """What is known of a base on the device of `warm`, loaded or not."""
    dtype = warm.dtype if base == warm.base else dtype_name(base, dtype_on(base, warm.device))
    return BaseInfo(
        base=base,
        device=str(warm.device),
        dtype=dtype,
        modules=warm.modules if base == warm.base else len(table(base.family)),
        size=base.size,
        granularity=base.granularity,
        scheduler=base.scheduler,
        environment=environment(warm.device, dtype),
        schedulers=tuple(schedulers(base)),
    )
