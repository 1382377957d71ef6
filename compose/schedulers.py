"""Schedulers by their names in diffusers: those a base's own is compatible with, fresh for each render."""

import functools
from typing import Any

import diffusers

from compose.bases import Base
from compose.errors import InvalidRequest


@functools.cache
def schedulers(base: Base) -> dict[str, Any]:
    """The schedulers that a base can be rendered with, by name; the base's own is the first."""
    own = getattr(diffusers, base.scheduler)
    names = (getattr(kind, "__name__", kind) for kind in own._compatibles)
    kinds = {name: getattr(diffusers, name, None) for name in sorted(map(str, names))}
    here = {n: kind for n, kind in kinds.items() if isinstance(kind, type) and not hasattr(kind, "_backends")}
    return {base.scheduler: own} | here


def scheduler(base: Base, config: dict[str, Any], name: str = "") -> Any:
    """A fresh scheduler; "" is the base's own. Raises InvalidRequest for one that does not fit the base."""
    known = schedulers(base)
    if name and name not in known:
        raise InvalidRequest(
            f"the scheduler {name[:80]!r} cannot be used with {base.name}; there are {', '.join(known)}",
            field="scheduler",
        )
    return known[name or base.scheduler].from_config(config)
