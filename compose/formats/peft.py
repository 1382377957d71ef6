"""PEFT: `base_model.model.<module>.lora_A.weight`, with the scale in adapter_config.json.

scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732); rank_pattern and
alpha_pattern override both for the modules whose path ends in their key. LoHa and LoKr are named as in
LyCORIS, and their alpha is `alpha`. `lora_adapter_metadata` of diffusers is the same, a component at a time.

fal's trainer names BFL's modules this way and writes no configuration: its alpha is the rank.

Some initialisations (PiSSA, OLoRA, …) move a part of the base's weights into the adapter, which is then an
update of what was left of them, and no update of the base.
"""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import regex

from compose.errors import UnsupportedLayout
from compose.formats.gather import gather, unwrapped
from compose.formats.sketch import ALPHA_LIMIT, Entry, Shapes, Sketch

_PATTERN_LIMIT, _PATTERN_SECONDS, _ANYWHERE = 2000, 10.0, r"(.*\.)?"
_PREFIX = "base_model.model."
_FAL = re.compile(r"base_model\.model\.(double|single)_blocks\.")
_READ = ("LORA", "LOHA", "LOKR")
_UNSAID = 8
"""PEFT's own rank and alpha."""

_TAKES_FROM_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_VARIANTS = {
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "Arrow",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
}
"""More than scale * B A, or a B A of another shape, though the tensors have a LoRA's names."""


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None. Raises UnsupportedLayout without a configuration: nobody knows the scale, but for
    fal's.
    """
    del metadata
    names = [unwrapped(key) for key in shapes]
    if not any(name.startswith(_PREFIX) for name in names):
        return None
    if not adapter_config and not any(map(_FAL.match, names)):
        raise UnsupportedLayout(
            "a PEFT adapter's scale is in its adapter_config.json, which was not given; check in the "
            "directory, or put the file beside the weights"
        )
    config = parse(adapter_config or "{}", "adapter_config.json")
    scale = scaler(config)
    entries, leftovers = gather(shapes)
    bare = [replace(entry, spelling=entry.spelling.removeprefix(_PREFIX)) for entry in entries]
    if config.get("use_dora") and not any(entry.magnitude for entry in bare):
        raise UnsupportedLayout("adapter_config.json says DoRA, but the file holds no lora_magnitude_vector")
    return Sketch("peft", tuple(scale(entry, entry.spelling) for entry in bare), leftovers)


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
    if (kind := config.get("peft_type") or "LORA") not in _READ:
        raise UnsupportedLayout(
            f"a PEFT adapter of type {str(kind)[:40]!r} is no low-rank update; train a LoRA"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_TAKES_FROM_BASE):
        raise UnsupportedLayout(
            f"init_lora_weights {start[:40]!r} changed the base that this adapter was trained on, too; save "
            "it as an update of the base itself, with peft's path_initial_model_for_weight_conversion"
        )
    if variant := next((v for name, v in _VARIANTS.items() if config.get(name) not in (None, False)), ""):
        raise UnsupportedLayout(
            f"the configuration says {variant}, which adds more to the base than a LoRA; train a LoRA"
        )
    alphas = _Patterns(config, "alpha_pattern")
    ranks = _Patterns(config if kind == "LOKR" else {}, "rank_pattern")

    def scaled(entry: Entry, path: str) -> Entry:
        # A LoKr of two whole matrices does not show its rank, and PEFT divides by it all the same.
        told = ranks.of(path, config.get("r", _UNSAID))
        rank = entry.dim or (told if isinstance(told, int) and told > 0 else 1)
        usual = config.get("lora_alpha", config.get("alpha", _UNSAID if config else rank))
        alpha = alphas.of(path, usual)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < ALPHA_LIMIT:
            raise UnsupportedLayout(
                f"lora_alpha of {path!r} must be a number below {ALPHA_LIMIT:g}, not {str(alpha)[:40]!r}"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return entry if scale == entry.scale else replace(entry, scale=scale)

    return scaled


class _Patterns:
    """The values of a rank_pattern or an alpha_pattern by module path: the first that matches, by
    peft.utils.get_pattern_key's rule. Raises UnsupportedLayout.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        told = config.get(name) or {}
        if not isinstance(told, dict) or len(told) > _PATTERN_LIMIT:
            raise UnsupportedLayout(f"{name} must be a JSON object of at most {_PATTERN_LIMIT} entries")
        self._name, self._seconds = name, _PATTERN_SECONDS
        self._told = [(self._compiled(pattern), value) for pattern, value in told.items()]

    def of(self, path: str, otherwise: object) -> Any:
        """The value for a path."""
        start = time.monotonic()
        if self._told and self._seconds <= 0:  # one hostile pattern could take for ever, and so could many
            raise UnsupportedLayout(f"the {len(self._told)} entries of {self._name} take too long to look up")
        try:
            for pattern, value in self._told:
                if pattern.match(path, timeout=self._seconds):
                    return value
        except TimeoutError:
            raise self._intricate(pattern.pattern[len(_ANYWHERE) + 1 : -2]) from None
        finally:
            self._seconds -= time.monotonic() - start
        return otherwise

    def _compiled(self, pattern: str) -> Any:
        if len(pattern) > 256 or re.search(r"\{|\(\?(?!:)", pattern):  # "((a{999}){999}){999}" is gigabytes
            raise self._intricate(pattern)
        try:
            return regex.compile(f"{_ANYWHERE}({pattern})$")
        except (regex.error, OverflowError, RecursionError) as error:
            raise UnsupportedLayout(f"{self._name} {pattern[:80]!r} is no pattern: {error}") from None

    def _intricate(self, pattern: str) -> UnsupportedLayout:
        return UnsupportedLayout(f"{self._name} {pattern[:80]!r} is too intricate; write plain module paths")
