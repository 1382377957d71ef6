"""How strongly an adapter acts: a number, and factors for parts of the base.

    Weight(0.8, (("text_encoder", 0.0), ("up_blocks.1", 0.5)))

A part is a run of whole segments of a layer's name: a component (`text_encoder`), a block (`up_blocks.1`), a
kind of layer (`attn2`, `to_q`), or a whole name. The factors of all parts that a layer lies in multiply, so
their order means nothing. 1 is as trained, everywhere.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compose.errors import InvalidRequest

WEIGHT_LIMIT = 8.0
PARTS_LIMIT = 64
_PART = re.compile(r"\w{1,64}(\.\w{1,64}){0,15}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Weight:
    """`value` times the factors of the parts a layer lies in; parts sorted by name."""

    value: float = 1.0
    parts: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of_parts(cls, value: float, parts: Mapping[str, float]) -> "Weight":
        """A weight with its parts in order."""
        return cls(value, tuple(sorted(parts.items())))

    def of(self, layer: str) -> float:
        """The weight of one layer."""
        found = self.value
        for part, factor in self.parts:
            if _within(layer, part):
                found *= factor
        return found

    def parts_of(self, layer: str) -> tuple[str, ...]:
        """The parts a layer lies in."""
        return tuple(part for part, _ in self.parts if _within(layer, part))

    def scaled(self, factor: float) -> "Weight":
        """The same parts, `factor` times as strong."""
        return Weight(self.value * factor, self.parts)

    def check(self) -> None:
        """Raises InvalidRequest for a number out of range, or what names no part."""
        if len(self.parts) > PARTS_LIMIT:
            raise InvalidRequest(
                f"{len(self.parts)} parts have weights of their own, the limit is {PARTS_LIMIT}",
                field="stack.parts",
            )
        _within_limit(self.value, "stack.weight")
        for part, factor in self.parts:
            if not _PART.fullmatch(part):
                raise InvalidRequest(
                    f"{part[:80]!r} names no part of a base; write text_encoder, unet.up_blocks.1 or attn2",
                    field="stack.parts",
                )
            _within_limit(factor, "stack.parts", f" of {part}")

    def check_parts(self, layers: Iterable[str], *, what: str) -> None:
        """Raises InvalidRequest for a weight beyond the limit in a layer, and for a part in which an adapter
        has no layer: a slip of the pen would do nothing.
        """
        if not self.parts:
            return
        missing = {part for part, _ in self.parts}
        tops: set[str] = set()
        for layer in layers:
            if abs(self.of(layer)) > WEIGHT_LIMIT:
                raise InvalidRequest(
                    f"the parts of {what} make a weight of {self.of(layer):g} in {layer!r}, "
                    f"beyond {WEIGHT_LIMIT:g}",
                    field="stack.parts",
                )
            missing -= {part for part in missing if _within(layer, part)}
            tops.add(".".join(layer.split(".")[:2]))
        if missing:
            raise InvalidRequest(
                f"{what} changes no layer in {sorted(missing)[0]!r}; it changes {', '.join(sorted(tops))}",
                field="stack.parts",
            )

    def __str__(self) -> str:
        return ",".join((f"{self.value:g}", *(f"{part}={factor:g}" for part, factor in self.parts)))


def _within_limit(factor: float, field: str, of: str = "") -> None:
    if not math.isfinite(factor) or abs(factor) > WEIGHT_LIMIT:
        raise InvalidRequest(
            f"weight {factor}{of} must be a number within -{WEIGHT_LIMIT:g} and {WEIGHT_LIMIT:g}", field=field
        )


AS_TRAINED = Weight()


def _within(layer: str, part: str) -> bool:
    return f".{part}." in f".{layer}."
