"""What trial pictures are scored with: `judge` on pocket where it knows everything that is called, else
`clip` where the operator gave a model (`serve --scorer DIR`), else `effect`.

    retention of adapter i in a picture = min(1, its score there / its score in the same picture alone)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from compose import clip
from compose.bases import Base
from compose.clip import Clip
from compose.render import Picture
from compose.scoring import Scores, concept, effect, judged

REFERENCE = 0.1
"""A concept alone that scores less counts as that much."""


def scorer(base: Base, triggers: Sequence[str], model: Clip | None) -> str:
    """Which one it is for a stack that is called like this."""
    if base.family == "pocket" and all(concept(trigger) for trigger in triggers):
        return "judge"
    return "clip" if model else "effect"


@dataclass(frozen=True, slots=True)
class Left:
    """What is left in pictures `[n]`: of each adapter, by place, and of the prompt where that is seen."""

    adapters: tuple[Scores, ...]
    prompt: Scores | None = None

    def least(self) -> Scores:
        """`[n]`: of whatever is kept worst in each."""
        prompt = () if self.prompt is None else (self.prompt,)
        found: Scores = np.min([*self.adapters, *prompt], axis=0)
        return found


@dataclass(slots=True)
class Scorer:
    """Scores pictures of a stack on the same prompts and seeds; `alone` are those of each adapter by
    itself.
    """

    base: Base
    triggers: Sequence[str]
    prompts: Sequence[str]
    model: Clip | None
    without: Sequence[Picture]
    alone: Sequence[Sequence[Picture]]
    kind: str = ""
    _own: list[Scores] = field(default_factory=list)
    _seen: list[clip.Embeddings] = field(default_factory=list)
    _told: list[clip.Embeddings] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Takes as long as scoring all of these pictures."""
        self.kind = scorer(self.base, self.triggers, self.model)
        if self.kind == "clip" and self.model:
            self._seen = [self.model.pictures(p) for p in (self.without, *self.alone)]
            self._told = [self.model.texts(self.prompts), self.model.texts([""])]
        for place, pictures in enumerate(self.alone):
            seen = self._seen[place + 1] if self._seen else None
            self._own.append(np.maximum(self._score(place, pictures, seen), REFERENCE))

    def left(self, pictures: Sequence[Picture]) -> Left:
        """Of a candidate."""
        seen = self.model.pictures(pictures) if self._seen and self.model else None
        kept = tuple(
            np.minimum(1.0, self._score(place, pictures, seen) / own) for place, own in enumerate(self._own)
        )
        if seen is None:
            return Left(kept)
        return Left(kept, clip.prompt_kept(seen, self._seen[1:], *self._told))

    def _score(self, place: int, pictures: Sequence[Picture], seen: clip.Embeddings | None) -> Scores:
        if seen is not None:
            return clip.concept(seen, self._seen[0], self._seen[place + 1])
        name = concept(self.triggers[place]) if self.base.family == "pocket" else ""
        return judged(pictures, name) if name else effect(pictures, self.without, self.alone[place])
