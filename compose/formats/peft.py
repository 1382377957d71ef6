"""PEFT: `base_model.model.<module>.lora_A.weight`, with the scale in adapter_config.json.

scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732); rank_pattern and
alpha_pattern override both for the modules whose path ends in their key. `lora_adapter_metadata` of diffusers
is the same, a component at a time.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compose.errors import UnsupportedLayout
from compose.formats.sketch import Entry, Shapes, Sketch, pair

PAIRS = [(r"(?P<module>.+)\.lora_A(\.\w+)?\.weight", r"(?P<module>.+)\.lora_B(\.\w+)?\.weight")]
_ALPHA_LIMIT = 1e6
_PREFIX = "base_model.model."


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None. Raises UnsupportedLayout without a configuration: nobody knows the scale."""
    del metadata
    if not any(key.startswith(_PREFIX) for key in shapes):
        return None
    if not adapter_config:
        raise UnsupportedLayout(
            "a PEFT adapter's scale is in its adapter_config.json, which was not given; check in the "
            "directory, or put the file beside the weights"
        )
    config = parse(adapter_config, "adapter_config.json")
    entries, leftovers = pair(shapes, PAIRS)
    return Sketch("peft", tuple(_named(scaled(entry, config)) for entry in entries), leftovers)


def _named(entry: Entry) -> Entry:
    """A PEFT file is of one model and does not say which: UNet and text encoder paths never look alike."""
    path = entry.spelling.removeprefix(_PREFIX)
    text = f"text_encoder.{path}"
    component = text if re.match(r"(text_model\.)?encoder\.layers\.", path) else f"unet.{path}"
    return replace(entry, spelling=component)


def parse(text: str, what: str) -> dict[str, Any]:
    """A LoRA configuration as written by PEFT. Raises UnsupportedLayout for what is not one."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsupportedLayout(f"{what} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UnsupportedLayout(f"{what} is not a JSON object")
    return config


def scaled(entry: Entry, config: Mapping[str, Any]) -> Entry:
    """The entry with the scale its configuration gives it. Raises UnsupportedLayout."""
    if config.get("use_dora"):
        raise UnsupportedLayout("this is a DoRA adapter, which Atelier does not read yet; train a plain LoRA")
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha", entry.rank)
    if not isinstance(patterns, dict):
        raise UnsupportedLayout("alpha_pattern must be a JSON object")
    for pattern, value in patterns.items():
        if _matches(pattern, entry.spelling):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _ALPHA_LIMIT:
        raise UnsupportedLayout(f"lora_alpha of {entry.spelling!r} must be a number, not {str(alpha)[:40]!r}")
    return replace(entry, scale=alpha / (math.sqrt(entry.rank) if config.get("use_rslora") else entry.rank))


def _matches(pattern: str, module: str) -> bool:
    # peft.utils.get_pattern_key's rule, without the repetitions through which a hostile pattern could take
    # for ever.
    if re.search(r"[*+?{}()\[\]]", pattern):
        raise UnsupportedLayout(f"alpha_pattern {pattern[:80]!r} is too intricate; write plain module paths")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise UnsupportedLayout(f"alpha_pattern {pattern[:80]!r} is no pattern: {error}") from None
