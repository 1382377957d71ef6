"""The words that call an adapter, and where each was found.

Said by the user, or else in the card, or else in the file: the first source that knows wins, because headers
are copied from file to file and artists' cards are not.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from registry.cards import text_field
from registry.errors import InvalidName

WORD_LIMIT, WORDS_LIMIT = 200, 20


@dataclass(frozen=True, slots=True)
class Trigger:
    """A word or phrase, and its source: `user`, `card`, `modelspec`, `ss_tag_frequency`, `learned_embeds`,
    `asset name`.
    """

    word: str
    source: str


def find(
    *, said: Sequence[str], card: bytes, metadata: Mapping[str, str], token: str = "", fallback: str = ""
) -> tuple[Trigger, ...]:
    """The triggers of a file. `token` is the word the file itself names, `fallback` the one to use when
    nobody does.

    Raises InvalidName for a word said by the user that is empty, too long, or has control characters.
    """
    if len(said) > WORDS_LIMIT:
        raise InvalidName(f"{len(said)} trigger words, the limit is {WORDS_LIMIT}", field="triggers")
    for word in said:
        if not is_word(word):
            raise InvalidName(
                f"{word[:80]!r} is no trigger: 1 to {WORD_LIMIT} printable characters, without {{ or }}",
                field="triggers",
            )
    sources = (
        ("user", [word.strip() for word in said]),
        ("card", [text_field(card, "instance_prompt")]),
        ("modelspec", [metadata.get("modelspec.trigger_phrase", "")]),
        ("learned_embeds", [token]),
        ("ss_tag_frequency", [_most_frequent_tag(metadata.get("ss_tag_frequency", ""))]),
        ("asset name", [fallback]),
    )
    for source, words in sources:
        if found := tuple(Trigger(word, source) for word in dict.fromkeys(words) if is_word(word)):
            return found
    return ()


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
