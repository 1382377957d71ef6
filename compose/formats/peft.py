"""PEFT: `base_model.model.<module>.lora_A.weight`, with the scale in adapter_config.json.

scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732); rank_pattern and
alpha_pattern override both for the modules whose path ends in their key. `lora_adapter_metadata` of diffusers
is the same, a component at a time.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from compose.errors import UnsupportedLayout
from compose.formats.sketch import ALPHA_LIMIT, Entry, Shapes, Sketch, pair

PAIRS = [(r"(?P<module>.+)\.lora_A(\.\w+)?\.weight", r"(?P<module>.+)\.lora_B(\.\w+)?\.weight")]
_PATTERN_LIMIT = 2000
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
    scale = scaler(parse(adapter_config, "adapter_config.json"))
    entries, leftovers = pair(shapes, PAIRS)
    bare = [replace(entry, spelling=entry.spelling.removeprefix(_PREFIX)) for entry in entries]
    return Sketch("peft", tuple(_named(scale(entry, entry.spelling)) for entry in bare), leftovers)


def _named(entry: Entry) -> Entry:
    """A PEFT file is of one model and does not say which: UNet and text encoder paths never look alike."""
    text = re.match(r"(text_model\.)?encoder\.layers\.", entry.spelling)
    return replace(entry, spelling=f"{'text_encoder' if text else 'unet'}.{entry.spelling}")


def parse(text: str, what: str) -> dict[str, Any]:
    """A LoRA configuration as written by PEFT. Raises UnsupportedLayout for what is not one."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsupportedLayout(f"{what} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UnsupportedLayout(f"{what} is not a JSON object")
    return config


def scaler(config: Mapping[str, Any]) -> Callable[[Entry, str], Entry]:
    """A function of an entry and its module's path in the model: the entry with the scale the configuration
    gives.

    Raises UnsupportedLayout here or when called.
    """
    if config.get("use_dora"):
        raise UnsupportedLayout("this is a DoRA adapter, which Atelier does not read yet; train a plain LoRA")
    told = config.get("alpha_pattern") or {}
    if not isinstance(told, dict) or len(told) > _PATTERN_LIMIT:
        raise UnsupportedLayout(f"alpha_pattern must be a JSON object of at most {_PATTERN_LIMIT} entries")
    patterns = [(_compiled(pattern), alpha) for pattern, alpha in told.items()]

    def scaled(entry: Entry, path: str) -> Entry:
        chosen = (alpha for pattern, alpha in patterns if pattern.match(path))
        alpha = next(chosen, config.get("lora_alpha", entry.rank))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < ALPHA_LIMIT:
            raise UnsupportedLayout(
                f"lora_alpha of {path!r} must be a number below {ALPHA_LIMIT:g}, not {str(alpha)[:40]!r}"
            )
        return replace(
            entry, scale=alpha / (math.sqrt(entry.rank) if config.get("use_rslora") else entry.rank)
        )

    return scaled


def _compiled(pattern: str) -> re.Pattern[str]:
    # peft.utils.get_pattern_key's rule, without the repetitions through which a hostile pattern could take
    # for ever.
    if len(pattern) > 256 or re.search(r"[*+?{}()\[\]]", pattern):
        raise UnsupportedLayout(f"alpha_pattern {pattern[:80]!r} is too intricate; write plain module paths")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise UnsupportedLayout(f"alpha_pattern {pattern[:80]!r} is no pattern: {error}") from None
