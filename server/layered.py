"""Which stacks have layers that can be looked at, written or merged without a base's weights, and what of
their files is in no layer: words that a LoRA brings, biases, norms.
"""

from collections.abc import Sequence

from compose.errors import IncompatibleBase, InvalidRequest
from compose.families import families
from registry.records import Version
from server.checkin import LORA
from server.pinned import Pinned, is_dora


def layered(stack: Sequence[Pinned]) -> str:
    """The family of a stack of LoRAs. Raises InvalidRequest, IncompatibleBase."""
    if words := next((p for p in stack if p.version.kind != LORA), None):
        raise InvalidRequest(
            f"{words.version.ref} is a textual inversion: it has words and no layers; "
            "stack it when you render",
            field="stack",
        )
    family = next((family for p in stack if (family := p.version.facts["family"])), "")
    if family not in families():
        raise IncompatibleBase(
            f"the layers of {family or 'the base'} for {stack[0].version.ref} are not known here, "
            "so nothing can be made of them",
            field="stack",
        )
    return family


def comparable(stack: Sequence[Pinned]) -> str:
    """The family of a stack whose updates are products of factors. Raises as `layered` does."""
    family = layered(stack)
    if dora := next((p for p in stack if is_dora(p)), None):
        raise InvalidRequest(
            f"{dora.version.ref} is a DoRA: its effect depends on the base's weights, so it is not "
            "merged into a file, nor measured beside others; render it in a stack with the method naive",
            field="stack",
        )
    return family


def mergeable(stack: Sequence[Pinned]) -> str:
    """The family of a stack that can become a file. Raises as `layered` does."""
    family = comparable(stack)
    if bundle := next((p for p in stack if p.version.facts.get("words")), None):
        raise InvalidRequest(
            f"{bundle.version.ref} brings the words {', '.join(bundle.version.facts['words'][:3])} "
            "along, and a merge has layers alone; render it in a stack, or merge its layers: "
            f"atelier save-as diffusers {bundle.version.ref} -o FILE, then check that in",
            field="stack",
        )
    return family


def unmergeable(stack: Sequence[Pinned]) -> str:
    """Why a stack cannot become a file; "" for one that can."""
    try:
        mergeable(stack)
    except (InvalidRequest, IncompatibleBase) as error:
        return str(error)
    return ""


def left_out(version: Version) -> tuple[str, ...]:
    """What of a version's file is in no layer of its base: its words, and what check-in named."""
    return (*version.facts.get("words", ()), *version.facts.get("coverage", {}).get("unbound", ()))
