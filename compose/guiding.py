"""What steers a render besides its prompt and its stack: pictures for ControlNets, and pictures to resemble.

    with guided(warm, guides, kind="", settings=settings, seeds=[7]) as (pipeline, told):
        pipeline(…, **told)

Without guides it is the base's own pipeline and nothing else; with them, whatever is changed for them is put
back at the end, however that comes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from compose.bases import Base
from compose.controls import Control, controlled
from compose.controls import check as check_controls
from compose.controls import find as find_control
from compose.errors import IncompatibleBase, InvalidRequest
from compose.references import Reference, resembling
from compose.references import check as check_references
from compose.references import find as find_reference
from compose.settings import Settings
from compose.warm import WarmPipeline


@dataclass(frozen=True, slots=True)
class Guides:
    """The controls and references of a render."""

    controls: tuple[Control, ...] = ()
    references: tuple[Reference, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.controls or self.references)

    def check(self, base: Base, kind: str) -> None:
        """Raises InvalidRequest, IncompatibleBase; `kind` is what the render starts from: "" for nothing,
        "image" or "mask".
        """
        check_controls(base, self.controls, kind)
        check_references(base, self.references)
        if base.family == "flux" and kind and self.controls and self.references:
            raise IncompatibleBase(
                "diffusers has no pipeline of flux that starts from a picture and takes both controls and "
                "references; leave out one of the three",
                field="references",
            )

    def told(self, base: Base) -> Mapping[str, Any]:
        """For a manifest."""
        controls = [control.told(base) for control in self.controls]
        references = [reference.told(base) for reference in self.references]
        return {k: v for k, v in (("controls", controls), ("references", references)) if v}

    def nbytes(self) -> int:
        """Of the pictures."""
        pictures = [control.picture for control in self.controls]
        return sum(picture.nbytes for picture in (*pictures, *(one.picture for one in self.references)))

    def names(self) -> tuple[str, ...]:
        """What steers, in order."""
        return *(control.name for control in self.controls), *(one.name for one in self.references)


UNGUIDED = Guides()


def attached(
    bases: Sequence[Base], *, controls: Sequence[str] = (), references: Sequence[str] = ()
) -> list[Base]:
    """The bases with the ControlNets that `BASE:NAME=DIRECTORY` say, and the IP-Adapters that
    `BASE:NAME=FILE,ENCODER` say. Raises InvalidRequest, IncompatibleBase.
    """
    known = {base.name: base for base in bases}
    for text in controls:
        base, net = find_control(text, known.values())
        if net.name in {other.name for other in base.controls}:
            raise InvalidRequest(f"{base.name} has two ControlNets {net.name}; rename one", field="control")
        known[base.name] = replace(base, controls=(*base.controls, net))
    for text in references:
        base, adapter = find_reference(text, known.values())
        if adapter.name in {other.name for other in base.references}:
            raise InvalidRequest(
                f"{base.name} has two IP-Adapters {adapter.name}; rename one", field="ip-adapter"
            )
        known[base.name] = replace(base, references=(*base.references, adapter))
    return list(known.values())


@contextmanager
def guided(
    warm: WarmPipeline, guides: Guides, *, kind: str, settings: Settings, seeds: Sequence[int]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The pipeline to render pictures of these seeds with, and what it is called with besides. Raises
    IncompatibleBase.
    """
    with ExitStack() as stack:
        if guides.controls:
            pipeline, told = controlled(warm, kind, guides.controls, seeds)
        else:
            pipeline, told = warm.variant(kind), {}
        if guides.references:
            told |= stack.enter_context(resembling(warm, guides.references, guidance=settings.guidance))
        yield pipeline, told
