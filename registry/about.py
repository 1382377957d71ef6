"""What an adapter's card and header say of it, each value with its source: an artist's card before a header,
since headers are copied from file to file.

    {"title": {"value", "source"}, "author": …, "licence": …, "negative": …, "rating": …,
     "tags": {"value": […], "source"}, "weight": {"value", "low", "high", "source"}}

Sources: `card` (its front matter), `card text`, `modelspec`, `ss_output_name`. What nobody says is absent.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from registry.cards import body, front_matter

TEXT_LIMIT, TAGS_LIMIT = 300, 50
ADULT = {"not-for-all-audiences", "not-for-all-audience", "nsfw"}
PERMISSIVE = ("cc0-1.0", "unlicense", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "cc-by-4.0")
"""From the least to the most demanding."""
DEMANDING = {
    "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
}  # fmt: skip
"""Each asks for something that no other grants."""
REVIEW = "needs review"
_NUMBER = r"(?<![\d.])(-?\d{1,9}(?:\.\d{1,9})?)(?![\deE])"
_WEIGHT = re.compile(rf"recommended (?:weight|strength)\W{{1,4}}{_NUMBER}([^\n]*)", re.IGNORECASE)
_RANGE = re.compile(rf"{_NUMBER}\s*(?:to|and|-|–|…)\s*{_NUMBER}")


def about(card: bytes, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The fields above. Raises InvalidFile for a card that `front_matter` refuses."""
    front, text = front_matter(card), body(card)
    found: dict[str, dict[str, Any]] = {}
    for field, sources in {
        "title": [
            ("card", front.get("title")),
            ("modelspec", metadata.get("modelspec.title")),
            ("ss_output_name", metadata.get("ss_output_name")),
        ],
        "author": [("card", front.get("author")), ("modelspec", metadata.get("modelspec.author"))],
        "licence": [
            ("card", front.get("license_name") or _joined(front.get("license"))),
            ("modelspec", metadata.get("modelspec.license")),
        ],
        "negative": [("card", front.get("negative_prompt"))],
    }.items():
        for source, value in sources:
            if (told := plain(value)) and field not in found:
                found[field] = {"value": told, "source": source}
    for source, tags in (("card", front.get("tags")), ("modelspec", _split(metadata.get("modelspec.tags")))):
        if (listed := _tags(tags)) and "tags" not in found:
            found["tags"] = {"value": listed, "source": source}
    if adult := ADULT & set(found.get("tags", {}).get("value", ())):
        found["rating"] = {"value": sorted(adult)[0], "source": found["tags"]["source"]}
    if weight := _weight(front, text):
        found["weight"] = weight
    return found


def strictest(licences: Sequence[str]) -> str:
    """The licence of what was merged from works under `licences`: the most restrictive; "needs review" when
    one is missing or not known here, or when two ask for different things.
    """
    names = {licence.lower() for licence in licences}
    demanding = names & DEMANDING
    if not names or names - DEMANDING - set(PERMISSIVE) or len(demanding) > 1:
        return REVIEW
    return next(iter(demanding)) if demanding else max(names, key=PERMISSIVE.index)


def _weight(front: Mapping[str, Any], text: str) -> dict[str, Any] | None:
    """`recommended_weight: 0.8 (0.6 to 1.0)` in the front matter, or "Recommended weight: …" in the text."""
    told = front.get("recommended_weight")
    for source, line in (
        ("card", f"recommended weight: {told}" if isinstance(told, str) else ""),
        ("card text", text),
    ):
        if match := _WEIGHT.search(line):
            value = float(match[1])
            low, high = (
                (float(n) for n in span.groups()) if (span := _RANGE.search(match[2])) else (value, value)
            )
            if -10 <= low <= value <= high <= 10:
                return {"value": value, "low": low, "high": high, "source": source}
    return None


def plain(value: object) -> str:
    """A text's printable characters, so many at most; "" for anything else."""
    return "".join(c for c in value.strip() if c.isprintable())[:TEXT_LIMIT] if isinstance(value, str) else ""


def _joined(value: object) -> object:
    """Several licences as one text, which `strictest` leaves to somebody's review."""
    return ", ".join(filter(None, map(plain, value))) if isinstance(value, list) else value


def _split(text: str | None) -> list[str]:
    return (text or "").split(",")


def _tags(value: object) -> list[str]:
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return list(dict.fromkeys(text for tag in listed if (text := plain(tag).lower())))[:TAGS_LIMIT]
