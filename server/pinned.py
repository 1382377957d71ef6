"""An adapter of a stack, pinned: named by version and digest, so that what is rendered or baked now can be
made again when an alias has moved. With it its weight, and the words that call it in a prompt.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compose.emphasis import escape
from compose.errors import InvalidRequest
from compose.methods import Parameters
from compose.schedule import Schedule
from compose.weights import Weight
from registry.records import Version
from server.checkin import TEXTUAL_INVERSION


@dataclass(frozen=True, slots=True)
class Pinned:
    """A version with its weight, the words that call it, and those of its opt-in groups; `via` is the saved
    stack that named it, `moments` the digest of its calibration where the method needs one, `schedule` when
    it acts.
    """

    version: Version
    weight: Weight
    triggers: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    via: Version | None = None
    moments: str = ""
    schedule: Schedule = ()

    @property
    def content(self) -> tuple[str, str]:
        """What its effect depends on: the digests of the bytes and of PEFT's configuration beside them."""
        return content_of(self.version)


def config_of(version: Version) -> str:
    return str(version.facts.get("declared", {}).get("adapter_config", ""))


def content_of(version: Version) -> tuple[str, str]:
    text = config_of(version)
    return version.digest, hashlib.sha256(text.encode()).hexdigest() if text else ""


def order(pinned: Pinned) -> tuple[object, ...]:
    return pinned.content, pinned.weight.value, pinned.weight.parts, _phases(pinned)


def is_dora(pinned: Pinned) -> bool:
    return bool(pinned.version.facts.get("dora"))


def recipe(stack: Sequence[Pinned], method: str, parameters: Parameters) -> dict[str, Any]:
    """How a merge was made: parents pinned by version and digest, method, parameters."""
    return {
        "method": method,
        "parameters": {name: getattr(parameters, name) for name in sorted(parameters.given())},
        "parents": entries(stack),
    }


def entries(stack: Sequence[Pinned]) -> list[dict[str, Any]]:
    """A stack as JSON, for manifests and recipes."""
    return [
        {
            "ref": p.version.ref,
            "digest": p.content[0],
            "adapter_config": p.content[1],
            "weight": p.weight.value,
            "words": list(p.triggers),
            **({"parts": dict(p.weight.parts)} if p.weight.parts else {}),
            **({"phases": _phases(p)} if p.schedule else {}),
            **({"moments": p.moments} if p.moments else {}),
            **({"groups": {name: list(words) for name, words in p.groups.items()}} if p.groups else {}),
        }
        for p in stack
    ]


def _phases(pinned: Pinned) -> list[list[float]]:
    return [
        [phase.start, phase.end, phase.weight, *([] if phase.end_weight is None else [phase.end_weight])]
        for phase in pinned.schedule
    ]


def fill(prompt: str, stack: Sequence[Pinned], *, field: str = "prompt") -> str:
    """The prompt with every `{name}` replaced by the trigger of that adapter, or of that parent of a merged
    one, and `{name/group}` by the words of one of its groups.

    `{{` and `}}` are braces; `field` is what the prompt is of a request. Raises InvalidRequest for a name
    that is not in the stack, or has no trigger.
    """
    called = field.replace("_", " ")
    words: dict[str, tuple[str, ...]] = {}
    for pinned in stack:
        for parent in (pinned.version.recipe or {}).get("parents", ()):
            name = parent["ref"].split(":")[0]
            words = _callable(name, parent["words"], parent.get("groups", {})) | words
    for pinned in stack:
        words_of_file = pinned.version.facts.get("words")
        one = pinned.version.kind == TEXTUAL_INVERSION and not words_of_file  # its vectors answer to one word
        own = pinned.triggers[:1] if one else pinned.triggers
        words |= _callable(pinned.version.name, own, pinned.groups)
        if pinned.via:
            for name, more in _callable(pinned.via.name, own, pinned.groups).items():
                words[name] = (*words.get(name, ()), *more)

    def trigger(found: re.Match[str]) -> str:
        whole, name = found[0], found["name"]
        if name is None:
            if whole in {"{{", "}}"}:
                return whole[0]
            raise InvalidRequest(
                f"a lone {whole!r} in the {called}; write {whole * 2} for a brace", field=field
            )
        if name not in words:
            have = ", ".join(words) or "no adapters"
            raise InvalidRequest(f"the {called} names {whole[:80]}, but the stack has {have}", field=field)
        if not words[name]:
            raise InvalidRequest(
                f"{name!r} has no trigger word; check it in with --trigger, or write the word yourself",
                field=field,
            )
        return escape(", ".join(words[name]))  # a trigger's own brackets emphasise nothing

    return re.sub(r"\{\{|\}\}|\{(?P<name>[^{}]*)\}|[{}]", trigger, prompt)


def _callable(
    name: str, words: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """What stands for `{name}` and for `{name/group}`."""
    return {name: tuple(words)} | {f"{name}/{group}": tuple(more) for group, more in groups.items()}
