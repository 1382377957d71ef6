"""The bases a server holds, and which of them an adapter belongs on: the one that is named, else the first of
the adapter's family.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compose.bases import Base
from compose.errors import IncompatibleBase
from server.errors import BadRequest
from server.pinned import Pinned


@dataclass(frozen=True, slots=True)
class Served:
    """Every base of a server, its first one first."""

    bases: tuple[Base, ...]

    def named(self, name: str) -> Base:
        """Raises BadRequest for a name that is none of them."""
        found = next((base for base in self.bases if base.name == name), None)
        if found is None:
            have = ", ".join(base.name for base in self.bases)
            raise BadRequest(f"this server has no base {name[:80]!r}; it has {have}", field="base")
        return found

    def of_family(self, family: str) -> Base | None:
        """The first base of a family, of any for ""."""
        return next((base for base in self.bases if family in {"", base.family}), None)

    def option(self, base: Base) -> str:
        """What a command line says to mean this base; nothing where it is meant anyway."""
        return "" if self.of_family(base.family) == base else f" --base {base.name}"

    def under(self, stack: Sequence[Pinned], name: str = "") -> Base:
        """The base of that name, else the first that a stack fits. Raises BadRequest, and IncompatibleBase
        when they do not go together, or no base of the stack's family is here.
        """
        made_for: dict[str, str] = {}
        for pinned in stack:
            if family := pinned.version.facts["family"]:
                made_for.setdefault(family, pinned.version.ref)
        base = self.named(name) if name else self.of_family(next(iter(made_for), ""))
        if base is None:
            (family, ref), *_ = made_for.items()
            have = ", ".join(f"{b.name} ({b.family})" for b in self.bases)
            raise IncompatibleBase(
                f"{ref} is for {family}, and this server has no base of that family, but {have}; start it "
                "with one (atelier serve --base)",
                field="base",
            )
        for family, ref in made_for.items():
            if family != base.family:
                raise IncompatibleBase(
                    f"{ref} is for {family}, and {base.name} is a base of {base.family}; take it out of the "
                    "stack, or name a base that it fits",
                    field="base",
                )
        return base


def served(bases: Iterable[Base]) -> Served:
    """Of any bases in their order."""
    return Served(tuple(bases))
