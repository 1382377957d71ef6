"""A file on its way into the catalog: gate, recognise, bind, look for NaN, and only then a version.

What is found is kept with the version as facts:

    {"family", "layout", "rank", "components": […], "targets": […],
     "coverage": {"base", "bound", "total", "unbound": […]}, "triggers": [{"word", "source"}…],
     "about": {…} (`registry.about`), "file_name", "declared": {"base", "triggers", "adapter_config"}}

`declared` is what the artist said besides the bytes and the card; with those two it is the version's
identity.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from compose import formats
from compose.formats.sketch import Binding, Sketch
from registry import triggers
from registry.about import about
from registry.blobs import Upload
from registry.cards import front_matter
from registry.catalog import Catalog, Version
from registry.digests import digests
from registry.errors import InvalidFile
from registry.headers import Header, read_header
from registry.refs import check_alias, check_name

LORA, TEXTUAL_INVERSION, STACK = "lora", "textual_inversion", "stack"
CONFIG_LIMIT = 1 << 20
UNBOUND_SHOWN = 8
_KIND = re.compile(r"\.(ff\.net\.\d+(?:\.proj)?|[a-z]\w*)(?:\.\d+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What comes with the bytes. `base` is "" to infer the family; `adapter_config` is PEFT's."""

    name: str
    base: str = ""
    card: bytes = b""
    triggers: tuple[str, ...] = ()
    alias: str = ""
    file_name: str = ""
    adapter_config: str = ""
    request_id: str = ""
    actor: str = ""

    def check(self) -> None:
        """Raises InvalidName, InvalidFile: what can be refused before the first byte is."""
        check_name(self.name)
        if self.alias:
            check_alias(self.alias)
        front_matter(self.card)
        if len(self.adapter_config) > CONFIG_LIMIT:
            raise InvalidFile(
                f"adapter_config.json is longer than {CONFIG_LIMIT} bytes", field="adapter_config"
            )


def check_in(catalog: Catalog, upload: Upload, declared: Declared) -> tuple[Version, bool]:
    """Makes the uploaded bytes a version; the version, and whether it is new. Raises RegistryError,
    ComposeError.
    """
    declared.check()
    upload.finish()
    header = read_header(upload.path)
    sketch = recognise(header, declared.adapter_config)
    if declared.base:
        binding = formats.require(sketch, declared.base, what=declared.file_name or "the file")
    else:
        binding = formats.infer(sketch)
    formats.check_numbers(upload.path, binding)
    return catalog.add(
        upload,
        name=declared.name,
        kind=TEXTUAL_INVERSION if sketch.is_words else LORA,
        facts=_facts(header, sketch, binding, declared),
        card=declared.card,
        alias=declared.alias,
        request_id=declared.request_id,
        digests=digests(upload.path, header),
        actor=declared.actor,
    )


def recognise(header: Header, adapter_config: str = "") -> Sketch:
    """The layout of a checked header."""
    shapes = {name: info.shape for name, info in header.tensors.items()}
    return formats.recognise(shapes, header.metadata, adapter_config)


def _facts(header: Header, sketch: Sketch, binding: Binding, declared: Declared) -> dict[str, Any]:
    found = triggers.find(
        said=declared.triggers,
        card=declared.card,
        metadata=header.metadata,
        token=sketch.token,
        fallback=declared.name if sketch.is_words else "",
    )
    return {
        "family": binding.family,
        "layout": sketch.layout,
        "rank": sketch.rank,
        **changes(binding.bound if not sketch.is_words else ["text_encoder"]),
        "coverage": {
            "base": binding.family if binding.bound else "",
            "bound": len(binding.bound),
            "total": binding.total,
            "unbound": list(binding.unbound[:UNBOUND_SHOWN]),
        },
        "triggers": [asdict(trigger) for trigger in found],
        "about": about(declared.card, header.metadata),
        "file_name": "".join(c for c in declared.file_name if c.isprintable())[:255],
        "declared": {
            "base": declared.base,
            "triggers": list(declared.triggers),
            "adapter_config": declared.adapter_config,
        },
    }


def changes(layers: Iterable[str]) -> dict[str, list[str]]:
    """The components and the kinds of layer among canonical layer names."""
    names = list(layers)
    kinds = {found[1] for name in names if (found := _KIND.search(name))}
    return {"components": sorted({name.split(".", 1)[0] for name in names}), "targets": sorted(kinds)}
