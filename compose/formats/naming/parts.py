"""What a spelling stands for."""

from collections.abc import Sequence
from dataclasses import dataclass

from compose.families import Table


@dataclass(frozen=True, slots=True)
class Part:
    """A base layer, and the file's rows that are its: ranges in the order of the base, () for all."""

    name: str
    rows: tuple[tuple[int, int], ...] = ()


def fused(names: Sequence[str], layers: Table) -> tuple[Part, ...]:
    """The parts of one projection that holds several layers, one after the other."""
    parts, row = [], 0
    for name in names:
        end = row + layers[name].d
        parts.append(Part(name, ((row, end),)))
        row = end
    return tuple(parts)


def swapped(name: str, layers: Table) -> tuple[Part, ...]:
    """A modulation the first code writes as shift, scale, and diffusers as scale, shift."""
    d = layers[name].d
    return (Part(name, ((d // 2, d), (0, d // 2))),)
