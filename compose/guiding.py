"""What steers a render besides its prompt and its stack: pictures for ControlNets, and pictures to resemble.

    with guided(warm, guides, kind="", seed=7) as (pipeline, told):
        pipeline(…, **told)

Without guides it is the base's own pipeline and nothing else; with them, whatever is changed for them is put
back at the end, however that comes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from compose.bases import Base
from compose.controls import Control, controlled
from compose.controls import check as check_controls
from compose.controls import find as find_control
from compose.errors import InvalidRequest
from compose.warm import WarmPipeline


@dataclass(frozen=True, slots=True)
class Guides:
    """The controls of a render."""

    controls: tuple[Control, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.controls)

    def check(self, base: Base, kind: str) -> None:
        """Raises InvalidRequest, IncompatibleBase; `kind` is what the render starts from: "" for nothing,
        "image" or "mask".
        """
        check_controls(base, self.controls, kind)

    def told(self, base: Base) -> Mapping[str, Any]:
        """For a manifest."""
        return {"controls": [control.told(base) for control in self.controls]} if self.controls else {}

    def nbytes(self) -> int:
        """Of the pictures."""
        return sum(control.picture.nbytes for control in self.controls)


UNGUIDED = Guides()


def attached(bases: Sequence[Base], *, controls: Sequence[str] = ()) -> list[Base]:
    """The bases with the ControlNets that `BASE:NAME=DIRECTORY` say. Raises InvalidRequest,
    IncompatibleBase.
    """
    known = {base.name: base for base in bases}
    for text in controls:
        base, net = find_control(text, known.values())
        if net.name in {other.name for other in base.controls}:
            raise InvalidRequest(f"{base.name} has two ControlNets {net.name}; rename one", field="control")
        known[base.name] = replace(base, controls=(*base.controls, net))
    return list(known.values())


@contextmanager
def guided(
    warm: WarmPipeline, guides: Guides, *, kind: str, seed: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The pipeline to render with, and what it is called with besides. Raises IncompatibleBase."""
    if guides.controls:
        yield controlled(warm, kind, guides.controls, seed)
    else:
        yield warm.variant(kind), {}
