"""Errors in the words of the command line: the contract's `axes[0].seed.values` was typed `--over seed=1:3`.

An error's message begins with the field it is about, where it is about one; the details that the status
carries name that field for programs, and stay as they are.
"""

import re
from collections.abc import Mapping
from typing import Any

_FIELD = re.compile(
    r"(?P<the>the )?(?P<common>common\.)?(?P<name>[a-z_]+)(\[(?P<place>\d+)\])?(?P<rest>(\.[a-z_]+|\[\d+\])*)"
    r"(?P<colon>:?)(?= )"
)
_OPTIONS = {
    "negative_prompt": "negative",
    "scheduler_options": "scheduler",
    "request_id": "request-id",
    "control_images": "control",
    "reference_images": "reference",
}


def as_typed(message: str, told: Mapping[str, Any]) -> str:
    """The message of a command that was told this, by parameter."""
    found = _FIELD.match(message)
    if found is None:
        return message
    name, rest = found["name"], message[found.end() :]
    if found["place"] is not None:
        words = _said(name, int(found["place"]), told)
        part = found["rest"].rpartition(".")[2] if name in {"controls", "references"} else ""
        if not words:
            return rest.lstrip() if found["colon"] else message
        if part:
            return f"{words}: the {part}{rest}"
        return f"{words}{found['colon']}{rest}"
    if found["common"] or name in _OPTIONS:
        return f"--{_OPTIONS.get(name, name)}{found['colon']}{rest}"
    return message


def _said(name: str, place: int, told: Mapping[str, Any]) -> str:
    """What was typed for the entry of a list; "" for nothing."""
    match name:
        case "stack":
            stack = told.get("stack") or told.get("what") or ""
            entries = [part.strip() for part in stack.split(",")] if isinstance(stack, str) else stack
            entries = [entry for entry in entries if entry]
            return entries[place].partition("=")[0] if place < len(entries) else ""
        case "axes":
            option = ("over", "by")[place]
            specs = told.get(option) or []
            if not specs:
                return ""
            return f"--{option} {specs[0]}" if len(specs) == 1 else f"--{option}"
        case "controls" | "references":
            option = name.removesuffix("s")
            entries = told.get(option) or ()
            return f"--{option} {entries[place]}" if place < len(entries) else ""
        case _:
            return ""
