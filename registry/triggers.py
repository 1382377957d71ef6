"""The words that call an adapter, in groups, and where each was found.

Words without a group call the concept itself. Those of a group ("outfit", "pose") are opt-in: some exclude
each other, so nobody adds them unasked. A card names groups in its front matter, a user with GROUP=WORD:

    trigger_words: {"": [milo], outfit: [red scarf, top hat], pose: sitting}

Said by the user, or else in the card, or else in the file: the first source that knows wins, because headers
are copied from file to file and artists' cards are not.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.cards import front_matter
from registry.errors import InvalidName

WORD_LIMIT, WORDS_LIMIT = 200, 20
_GROUP = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Trigger:
    """A word or phrase, its source (`user`, `card`, `modelspec`, `bundle`, `ss_tag_frequency`,
    `learned_embeds`, `asset name`) and its group; "" calls the concept itself.
    """

    word: str
    source: str
    group: str = ""


def find(
    *,
    said: Sequence[str],
    card: bytes,
    metadata: Mapping[str, str],
    token: str = "",
    bundle: Sequence[str] = (),
    fallback: str = "",
) -> tuple[Trigger, ...]:
    """The triggers of a file. `token` is the word the file itself names, `bundle` those it brings along,
    `fallback` the one to use when nobody does.

    Raises InvalidName for a word said by the user that is empty, too long, or has control characters.
    """
    if len(said) > WORDS_LIMIT:
        raise InvalidName(f"{len(said)} trigger words, the limit is {WORDS_LIMIT}", field="triggers")
    grouped = [_grouped(text) for text in said]
    for (_, word), text in zip(grouped, said, strict=True):
        if not is_word(word):
            raise InvalidName(
                f"{text[:80]!r} is no trigger: 1 to {WORD_LIMIT} printable characters, without {{ or }}",
                field="triggers",
            )
    front = front_matter(card)
    sources: tuple[tuple[str, list[tuple[str, str]]], ...] = (
        ("user", grouped),
        ("card", [*_words("", front.get("instance_prompt")), *_card_groups(front.get("trigger_words"))]),
        ("modelspec", [("", metadata.get("modelspec.trigger_phrase", ""))]),
        ("learned_embeds", [("", token)]),
        ("bundle", [("", word) for word in bundle]),
        ("ss_tag_frequency", [("", _most_frequent_tag(metadata.get("ss_tag_frequency", "")))]),
        ("asset name", [("", fallback)]),
    )
    for source, words in sources:
        if found := [Trigger(word, source, group) for group, word in dict.fromkeys(words) if is_word(word)]:
            return tuple(found[:WORDS_LIMIT])
    return ()


def _grouped(text: str) -> tuple[str, str]:
    """`GROUP=WORD` -> (group, word); a text without a group is a word as it stands."""
    group, equals, word = text.partition("=")
    return (group, word.strip()) if equals and _GROUP.fullmatch(group) else ("", text.strip())


def _card_groups(value: object) -> Iterator[tuple[str, str]]:
    """A card's `trigger_words`: a word, a list, or lists by group; names that are no group's are passed
    over.
    """
    groups = value if isinstance(value, dict) else {"": value}
    for group, words in groups.items():
        if not group or _GROUP.fullmatch(group):
            yield from _words(group, words)


def _words(group: str, value: Any) -> Iterator[tuple[str, str]]:
    for word in value if isinstance(value, list) else [value]:
        if isinstance(word, str):
            yield group, word.strip()


def is_word(word: str) -> bool:
    """Whether a word can stand in a prompt: not blank, printable, not too long, without braces."""
    return bool(word.strip()) and len(word) <= WORD_LIMIT and word.isprintable() and not set(word) & set("{}")


def _most_frequent_tag(text: str) -> str:
    """kohya's `{"<folder>": {"<tag>": <count>}}`; "" for anything else, and when no tag stands out."""
    try:
        folders = json.loads(text)
        tags: Counter[str] = Counter()
        for folder in folders.values():
            tags.update({tag: int(n) for tag, n in folder.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ""
    (top, most), *rest = [*tags.most_common(2), ("", 0)]
    return top.strip() if most and (not rest or rest[0][1] < most) else ""
