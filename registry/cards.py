"""Model cards: kept byte for byte, read only to index.

A card is Markdown that may begin with a YAML block between two `---` lines. Values are read as strings (YAML
would make `no` false and `1.10` a number), "" for YAML's null, which templates write where nobody says
anything; aliases, duplicate keys and deep nesting are refused, since nobody needs them in a card and they are
how a small file becomes a large one.
"""

from typing import Any

import yaml

from registry.errors import InvalidFile

CARD_LIMIT = 256 << 10
BLOCK_LIMIT = 32 << 10
_DEPTH_LIMIT = 12
_NULLS = {"~", "null", "Null", "NULL"}
"""YAML 1.1, null: these, and nothing at all."""


class _Strict(yaml.BaseLoader):
    """Strings only, each key once, no aliases."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise InvalidFile(
                "the card's front matter uses a YAML alias (*name); write the value out", field="card"
            )
        self.depth += 1
        if self.depth > _DEPTH_LIMIT:
            raise InvalidFile(f"the card's front matter is nested deeper than {_DEPTH_LIMIT}", field="card")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        plain = node.style is None and node.value in _NULLS
        return "" if plain else str(super().construct_scalar(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise InvalidFile("the card's front matter has a key that is not plain text", field="card")
            if key.value in seen:
                raise InvalidFile(f"the card's front matter names {key.value[:80]!r} twice", field="card")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def front_matter(card: bytes) -> dict[str, Any]:
    """The card's YAML block; {} when it has none. Raises InvalidFile."""
    block, _ = _split(card)
    if len(block) > BLOCK_LIMIT:
        raise InvalidFile(
            f"the card's front matter has {len(block)} characters, the limit is {BLOCK_LIMIT}", field="card"
        )
    try:
        found = yaml.load(block, Loader=_Strict)  # a BaseLoader builds strings, lists and dicts only
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 2 if error.problem_mark else 1  # below the first ---
        raise InvalidFile(
            f"the card's front matter is not YAML: {error.problem} in line {line}", field="card"
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # chr() and int() of escapes
        raise InvalidFile(f"the card's front matter is not YAML: {error}", field="card") from None
    return found if isinstance(found, dict) else {}


def body(card: bytes) -> str:
    """The card's Markdown, without the YAML block. Raises InvalidFile."""
    return _split(card)[1]


def _split(card: bytes) -> tuple[str, str]:
    if len(card) > CARD_LIMIT:
        raise InvalidFile(
            f"the card has {len(card)} bytes, the limit is {CARD_LIMIT}; shorten it", field="card"
        )
    try:
        text = card.decode("utf-8-sig").lstrip()
    except UnicodeDecodeError:
        raise InvalidFile("the card is not UTF-8 text", field="card") from None
    lines = text.splitlines()
    closing = [line.rstrip() for line in lines[1:]]
    if not lines or lines[0].rstrip() != "---" or "---" not in closing:
        return "", text
    end = 1 + closing.index("---")
    return "\n".join(lines[1:end]), "\n".join(lines[end + 1 :])
