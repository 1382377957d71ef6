"""The Engine: what renders, behind one small protocol, so that the GPU side can move to another process or
machine.

Today there is one: a warm pipeline in this process, owned by the scheduler's thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from compose.bases import Base
from compose.calibrate import measure
from compose.manifest import environment
from compose.moments import Moments
from compose.render import Listener, Picture, Rendered, Settings, default_size, granularity, render
from compose.trial import pictures
from compose.warm import WarmPipeline
from server.calls import Call, current
from server.stacks import Composition


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A base this engine holds. Sizes in pixels, of its weights in bytes; `granularity` is what sizes are
    multiples of.
    """

    base: Base
    device: str
    dtype: str
    modules: int
    size: int
    granularity: int
    scheduler: str
    environment: dict[str, str]
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A render with everything resolved, and the call that it is for."""

    settings: Settings
    composition: Composition
    preview_every: int = 0
    call: Call = field(default_factory=current, compare=False)


@dataclass(frozen=True, slots=True)
class Measuring:
    """An adapter to be rendered alone on prompts of its own, for the moments of what flows through the
    layers.
    """

    settings: Settings
    composition: Composition
    prompts: tuple[str, ...]
    call: Call = field(default_factory=current, compare=False)


@dataclass(frozen=True, slots=True)
class Trying:
    """A stack to be looked at on a set of prompts, in one batch; the pictures are thrown away afterwards."""

    composition: Composition
    prompts: tuple[str, ...]
    seed: int
    steps: int
    call: Call = field(default_factory=current, compare=False)


AnyWork = Work | Measuring | Trying
Result = Rendered | Moments | list[Picture]


class Engine(Protocol):
    """Does one piece of work at a time."""

    @property
    def info(self) -> BaseInfo:
        """The base it holds."""

    def norms(self) -> Mapping[str, float]:
        """||W||_F of the base's layers."""

    def do(self, work: AnyWork, listener: Listener) -> Result:
        """Does it on the calling thread, telling the listener: how a render went, moments by what was read
        (`compose.calibrate`), or pictures to look at.
        """


class InProcessEngine:
    """A warm pipeline in this process. Not thread-safe: the scheduler's thread owns it."""

    def __init__(self, warm: WarmPipeline) -> None:
        self._warm = warm
        self._info = BaseInfo(
            base=warm.base,
            device=str(warm.device),
            dtype=warm.dtype,
            modules=warm.modules,
            size=default_size(warm),
            granularity=granularity(warm),
            scheduler=type(warm.pipeline.scheduler).__name__,
            environment=environment(warm),
            size_bytes=warm.nbytes,
        )

    @property
    def info(self) -> BaseInfo:
        """The base it holds."""
        return self._info

    def norms(self) -> Mapping[str, float]:
        """||W||_F of the base's layers."""
        return self._warm.norms()

    def do(self, work: AnyWork, listener: Listener) -> Result:
        """Does it, telling the listener."""
        stack = work.composition
        match work:
            case Work():
                return render(
                    self._warm,
                    work.settings,
                    layers=stack.layers,
                    words=stack.words,
                    key=stack.key,
                    listener=listener,
                    preview_every=work.preview_every,
                    doras=stack.doras,
                )
            case Measuring():
                return measure(
                    self._warm,
                    work.prompts,
                    layers=stack.layers,
                    words=stack.words,
                    settings=work.settings,
                    listener=listener,
                    doras=stack.doras,
                )
            case Trying():
                return pictures(
                    self._warm,
                    work.prompts,
                    layers=stack.layers,
                    words=stack.words,
                    seed=work.seed,
                    steps=work.steps,
                    guidance=self._warm.base.guidance,
                    doras=stack.doras,
                    check=listener.check,
                )
