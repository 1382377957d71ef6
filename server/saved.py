"""Stacks as assets: a pinned list of adapters with weights, kept as a version of kind `stack`.

Its bytes are this document, canonically written, and `facts["stack"]` holds it too:

    {"asked": [[ref, weight, {part: factor}?]…],    what the artist wrote, for `stack update` to ask again
     "members": [{"ref", "digest", "adapter_config", "weight", "words"}…],   pinned; no stacks among them
     "prompt", "negative_prompt", "steps", "guidance"}                       only those that were said

What a member is never depends on a name again: aliases may move and assets may grow versions.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compose.errors import IncompatibleBase
from compose.weights import Weight
from registry.about import strictest
from registry.catalog import Catalog
from registry.records import Version
from server.checkin import STACK
from server.pinned import Pinned, entries


def document(
    asked: Sequence[tuple[str, Weight]], stack: Sequence[Pinned], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of a stack. Raises IncompatibleBase when two members are for different families."""
    families = {family for p in stack if (family := p.version.facts["family"])}
    if len(families) > 1:
        made_for = ", ".join(f"{p.version.ref} for {p.version.facts['family'] or 'any'}" for p in stack)
        raise IncompatibleBase(f"no base takes all of these: {made_for}", field="stack")
    told = [[ref, w.value, *([dict(w.parts)] if w.parts else [])] for ref, w in asked]
    return {"asked": told, "members": entries(stack), **settings}


def save(
    catalog: Catalog, told: dict[str, Any], stack: Sequence[Pinned], *, name: str, alias: str, actor: str
) -> tuple[Version, bool]:
    """Keeps a document as the next version of `name`. Raises InvalidName, Conflict."""
    with catalog.blobs.upload() as upload:
        upload.write(json.dumps(told, sort_keys=True, ensure_ascii=False, indent=1).encode() + b"\n")
        return catalog.add(upload, name=name, kind=STACK, facts=_facts(told, stack), alias=alias, actor=actor)


def _facts(told: dict[str, Any], stack: Sequence[Pinned]) -> dict[str, Any]:
    versions = [p.version for p in stack]
    words = dict.fromkeys(word for p in stack for word in p.triggers)
    licences = [v.facts.get("about", {}).get("licence", {}).get("value", "") for v in versions]
    covered = [v.facts["coverage"] for v in versions]
    return {
        "family": next((family for v in versions if (family := v.facts["family"])), ""),
        "layout": "stack",
        "rank": sum(v.facts["rank"] for v in versions),
        "components": sorted({part for v in versions for part in v.facts["components"]}),
        "targets": sorted({target for v in versions for target in v.facts.get("targets", ())}),
        "coverage": {
            "base": next((c["base"] for c in covered if c["base"]), ""),
            "bound": sum(c["bound"] for c in covered),
            "total": sum(c["total"] for c in covered),
            "unbound": [],
        },
        "triggers": [{"word": word, "source": "recipe"} for word in words],
        "about": {"licence": {"value": strictest(licences), "source": "recipe"}},
        "file_name": "",
        "members": sorted({v.digest for v in versions}),
        "stack": told,
    }
