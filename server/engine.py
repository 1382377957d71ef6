"""The Engine: what renders, behind one small protocol, so that the GPU side can move to another process or
machine.

Today there is one: a warm pipeline in this process, owned by the scheduler's thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from compose.bases import Base
from compose.manifest import environment
from compose.render import Listener, Rendered, Settings, default_size, granularity, render
from compose.warm import WarmPipeline
from compose.words import Word
from server.stacks import Composition


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A base this engine holds. Sizes in pixels; `granularity` is what sizes are multiples of."""

    base: Base
    device: str
    dtype: str
    modules: int
    size: int
    granularity: int
    scheduler: str
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Work:
    """A render with everything resolved."""

    settings: Settings
    composition: Composition
    preview_every: int = 0


class Engine(Protocol):
    """Renders one piece of work at a time."""

    @property
    def info(self) -> BaseInfo:
        """The base it holds."""

    def render(self, work: Work, listener: Listener) -> Rendered:
        """Renders, telling the listener; on the calling thread."""


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
        )

    @property
    def info(self) -> BaseInfo:
        """The base it holds."""
        return self._info

    def render(self, work: Work, listener: Listener) -> Rendered:
        """Renders, telling the listener."""
        composition: Composition = work.composition
        words: Sequence[Word] = composition.words
        key: Any = composition.key
        return render(
            self._warm,
            work.settings,
            layers=composition.layers,
            words=words,
            key=key,
            listener=listener,
            preview_every=work.preview_every,
            doras=composition.doras,
        )
