"""A file on its way into the catalog: gate, recognise, bind, look for NaN, and only then a version.

What is found is kept with the version as facts:

    {"family", "layout", "rank", "components": […], "targets": […],
     "coverage": {"base", "bound", "total", "unbound": […]}, "triggers": [{"word", "source", "group"}…],
     "about": {…} (`registry.about`), "file_name", "origin": {…}, "words": […], "dora": true,
     "declared": {"base", "triggers", "adapter_config", "commit"}}

`words` are those a file brings under their own names: a LoRA's, or several. `declared` is what the artist
said besides the bytes and the card; with those two it is the version's identity. `commit` is there for what
was pulled: a Hub may go back to earlier bytes, which are a new version then.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compose import formats
from compose.factors import Factors
from compose.formats.sketch import Binding, Sketch
from compose.projection import projection
from registry import triggers
from registry.about import REVIEW, about, plain
from registry.blobs import Upload
from registry.cards import front_matter
from registry.catalog import Catalog
from registry.digests import DigestStream
from registry.errors import InvalidFile
from registry.headers import Header, read_header
from registry.nearest import Projection
from registry.records import Version
from registry.refs import check_alias, check_name
from server.arriving import Arriving, Gated

LORA, TEXTUAL_INVERSION, STACK = "lora", "textual_inversion", "stack"
CONFIG_LIMIT, ORIGIN_LIMIT, ORIGIN_DEPTH = 1 << 20, 1 << 16, 32
UNBOUND_SHOWN = 64
_KIND = re.compile(r"\.(ff(?:_context)?\.net\.\d+(?:\.proj)?|[a-z]\w*)(?:\.\d+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What comes with the bytes. `base` is "" to infer the family; `adapter_config` is PEFT's; `origin` is
    JSON that whoever brings the file says of where it was, `commit` the Hub's that it was pulled from, `seen`
    the version that has to be the newest still; none may be there if it has to be the `first`.
    """

    name: str
    base: str = ""
    card: bytes = b""
    triggers: tuple[str, ...] = ()
    alias: str = ""
    file_name: str = ""
    adapter_config: str = ""
    request_id: str = ""
    actor: str = ""
    origin: str = ""
    commit: str = ""
    seen: Version | None = None
    first: bool = False

    def check(self) -> None:
        """Raises InvalidName, InvalidFile: what can be refused before the first byte is."""
        check_name(self.name)
        if self.alias:
            check_alias(self.alias)
        triggers.find(said=self.triggers, card=self.card, metadata={})
        if len(self.adapter_config) > CONFIG_LIMIT:
            raise InvalidFile(
                f"adapter_config.json is longer than {CONFIG_LIMIT} bytes", field="adapter_config"
            )
        if self.adapter_config and not _is_object(self.adapter_config):
            raise InvalidFile(
                "adapter_config.json is no JSON object; give the one that PEFT wrote, or none",
                field="adapter_config",
            )
        _origin(self.origin)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def check_in(
    catalog: Catalog,
    upload: Upload,
    declared: Declared,
    digests: DigestStream,
    arrived: Arriving | None = None,
) -> tuple[Version, bool]:
    """Makes the uploaded bytes, which `digests` and `arrived` have seen too, a version; the version, and
    whether it is new. Raises RegistryError, ComposeError.
    """
    declared.check()
    upload.finish()
    upload.settle()
    found = arrived.found() if arrived else None
    seen, vector = found or _looked_at(upload.path, declared)
    kind, family = TEXTUAL_INVERSION if seen.sketch.is_words else LORA, seen.binding.family
    return catalog.add(
        upload,
        name=declared.name,
        kind=kind,
        facts=_facts(seen.header, seen.sketch, seen.binding, declared),
        card=declared.card,
        alias=declared.alias,
        request_id=declared.request_id,
        digests=digests.finish(seen.header),
        projection=Projection(f"{kind}/{family}", vector if family else b""),
        seen=declared.seen,
        first=declared.first,
        actor=declared.actor,
    )


def arriving(declared: Declared, size: int) -> Arriving:
    """To be told of the bytes of a file of `size` as they come, for `check_in`; 0 where nobody said."""
    return Arriving(size, lambda header: _gated(header, declared))


def _gated(header: Header, declared: Declared) -> Gated:
    sketch = recognise(header, declared.adapter_config)
    if declared.base:
        what = declared.file_name or "the file"
        return Gated(header, sketch, formats.require(sketch, declared.base, what=what))
    return Gated(header, sketch, formats.infer(sketch))


def _looked_at(path: Path, declared: Declared) -> tuple[Gated, bytes]:
    """What the header of a whole file says, and the projection. Raises RegistryError, ComposeError."""
    seen = _gated(read_header(path), declared)
    binding = replace(seen.binding, bound={}) if seen.sketch.is_words else seen.binding
    with formats.layers(path, binding) as layers:
        layers.check_others()
        vector = projection(layers)  # reads every layer
    if seen.sketch.is_words:
        vector = projection(as_layers(formats.load_words(path, seen.sketch)))
    return seen, vector


def as_layers(words: Sequence[formats.LoadedWord]) -> dict[str, Factors]:
    """Word vectors as if they were a layer's update, one for every text encoder, to compare them."""
    kinds = dict.fromkeys(kind for word in words for kind in word.vectors)
    found = {kind: torch.cat([w.vectors[kind] for w in words if kind in w.vectors]) for kind in kinds}
    first = next(iter(kinds))
    return {
        "words" if kind == first else f"words.{kind}": Factors(vectors.mT, torch.eye(len(vectors)))
        for kind, vectors in found.items()
    }


def recognise(header: Header, adapter_config: str = "") -> Sketch:
    """The layout of a checked header."""
    shapes = {name: info.shape for name, info in header.tensors.items()}
    return formats.recognise(shapes, header.metadata, adapter_config)


def _facts(header: Header, sketch: Sketch, binding: Binding, declared: Declared) -> dict[str, Any]:
    origin = _origin(declared.origin)
    told = _told(header, sketch, declared.card, declared.triggers, declared.name)
    if origin.get("recipe") and isinstance(origin.get("licence"), str):  # a merge of another catalog
        told |= _inheriting(told["about"], plain(origin["licence"]) or REVIEW)
    return {
        "family": binding.family,
        "layout": sketch.layout,
        "rank": sketch.rank,
        **changes(binding.bound if not sketch.is_words else ["text_encoder"]),
        "coverage": {
            "base": binding.family if binding.bound else "",
            "bound": len(binding.bound),
            "total": binding.total,
            "unbound": folded(binding.unbound),
        },
        **({"words": _named(sketch, declared.name)} if sketch.tokens else {}),
        **({"dora": True} if any(entry.magnitude for entry in sketch.entries) else {}),
        **told,
        "file_name": "".join(c for c in declared.file_name if c.isprintable())[:255],
        "declared": {
            "base": declared.base,
            "triggers": list(declared.triggers),
            "adapter_config": declared.adapter_config,
            **({"commit": declared.commit} if declared.commit else {}),
        },
        **({"origin": origin} if origin else {}),
    }


def folded(names: Sequence[str]) -> list[str]:
    """Names of layers and tensors, those that differ in their numbers alone as one with how many they are."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    told = [f"{kind} ({len(own)})" if len(own) > 1 else own[0] for kind, own in alike.items()]
    if len(told) <= UNBOUND_SHOWN:
        return told
    rest = sum(len(own) for own in [*alike.values()][UNBOUND_SHOWN - 1 :])
    return [*told[: UNBOUND_SHOWN - 1], f"and {rest} more"]


def _told(header: Header, sketch: Sketch, card: bytes, said: Sequence[str], name: str) -> dict[str, Any]:
    """What the card and the header say; the user's own words come before both."""
    found = triggers.find(
        said=said,
        card=card,
        metadata=header.metadata,
        token=sketch.token,
        bundle=_named(sketch, name),
        fallback=name if sketch.is_words else "",
    )
    return {"triggers": [asdict(trigger) for trigger in found], "about": about(card, header.metadata)}


def _named(sketch: Sketch, name: str) -> list[str]:
    """The words a file brings, the asset's name for one without any."""
    return [token or name for token in sketch.tokens]


def _origin(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # refuses what no JSON or text can be
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or len(text) > ORIGIN_LIMIT or _deeper(found, ORIGIN_DEPTH):
        raise InvalidFile(
            f"origin_json must be a JSON object of at most {ORIGIN_LIMIT} bytes and {ORIGIN_DEPTH} levels",
            field="origin_json",
        )
    return found


def _deeper(value: object, limit: int) -> bool:
    """Whether a JSON value is nested deeper than `limit`."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def facts_with(catalog: Catalog, version: Version, card: bytes) -> dict[str, Any]:
    """The facts of a version that come from its card, were it this one. Raises InvalidFile, Damaged."""
    front_matter(card)
    if version.recipe or version.kind == STACK:
        entries = version.recipe["parents"] if version.recipe else version.facts["stack"]["members"]
        made = dict.fromkeys(word for entry in entries for word in entry["words"])
        found = [asdict(trigger) for trigger in triggers.find(said=(), card=card, metadata={})]
        licence = version.facts.get("about", {}).get("licence", {}).get("value", REVIEW)
        words = found or [{"word": word, "source": "recipe"} for word in made]
        return {
            "triggers": words,
            **_inheriting(about(card, {}), version.facts.get("inherited_licence", licence)),
        }
    path = catalog.blobs.verified(version.digest)
    declared, header = version.facts.get("declared", {}), read_header(path)
    sketch = recognise(header, str(declared.get("adapter_config", "")))
    told = _told(header, sketch, card, declared.get("triggers", ()), version.name)
    if inherited := version.facts.get("inherited_licence"):
        told |= _inheriting(told["about"], inherited)
    return told


def _inheriting(told: dict[str, Any], inherited: str) -> dict[str, Any]:
    """What a card says of a merge: not its licence, when the parents' is known; one that needs review is
    settled by the card.
    """
    if inherited != REVIEW or "licence" not in told:
        told = told | {"licence": {"value": inherited, "source": "recipe"}}
    return {"about": told, "inherited_licence": inherited}


def changes(layers: Iterable[str]) -> dict[str, list[str]]:
    """The components and the kinds of layer among canonical layer names."""
    names = list(layers)
    kinds = {found[1] for name in names if (found := _KIND.search(name))}
    return {"components": sorted({name.split(".", 1)[0] for name in names}), "targets": sorted(kinds)}
