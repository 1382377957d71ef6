"""References: `hero` (newest), `hero:3`, `hero@stable`, `sha256:<64 hex digits>`.

Names follow the OCI repository grammar, aliases the OCI tag grammar; neither ever becomes part of a path.
"""

import re
from dataclasses import dataclass

from registry.errors import InvalidName

NAME_LIMIT = 128
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_ALIAS = re.compile(r"[a-zA-Z_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True, slots=True)
class Ref:
    """A parsed reference. A digest stands alone; else `name`, with at most one of `number`, `alias`."""

    name: str = ""
    number: int | None = None
    alias: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.digest:
            return self.digest
        if self.number is not None:
            return f"{self.name}:{self.number}"
        return f"{self.name}@{self.alias}" if self.alias else self.name


def check_name(name: str) -> str:
    """The name itself. Raises InvalidName with the rule it breaks."""
    if len(name) > NAME_LIMIT:
        raise InvalidName(
            f"the name has {len(name)} characters, the limit is {NAME_LIMIT}; choose a shorter one",
            field="name",
        )
    if not _NAME.fullmatch(name) or name == "sha256":  # `sha256:1` would be read as a digest
        raise InvalidName(
            f"{name!r} is not a name: use lower-case letters and digits, joined by single '.', '_' or '-'",
            field="name",
        )
    return name


def check_alias(alias: str) -> str:
    """The alias itself. Raises InvalidName with the rule it breaks."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidName(
            f"{alias[:140]!r} is not an alias: a letter, then up to 127 letters, digits, '.', '_' or '-'",
            field="alias",
        )
    return alias


def parse(text: str) -> Ref:
    """A reference as typed. Raises InvalidName."""
    if text.startswith("sha256:"):
        if not _DIGEST.fullmatch(text):
            raise InvalidName(f"{text[:80]!r} is not a digest: sha256: takes 64 hex digits", field="ref")
        return Ref(digest=text)
    if "@" in text:
        name, alias = text.split("@", 1)
        return Ref(name=check_name(name), alias=check_alias(alias))
    if ":" in text:
        name, number = text.split(":", 1)
        check_name(name)
        if not _NUMBER.fullmatch(number):
            raise InvalidName(f"{number[:40]!r} is not a version number; write {name}:3", field="ref")
        return Ref(name=name, number=int(number))
    return Ref(name=check_name(text))
