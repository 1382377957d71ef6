"""How a version is found again: the labels it is filtered by, the words it is searched by, and what a
question becomes in SQL.

Every version has labels. Only the newest of an asset is in `heads` and `search`, since lists and searches ask
for no other: among 100,000 versions of 20,000 assets that is the difference between 500 ms and a few.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database

from registry.cards import body

FIELDS = ("kind", "base", "tag", "trigger", "author", "licence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What to look for; everything that is said must hold. `text` is words, the last of them may be only
    begun; `labels` are pairs of a field (`kind`, `base`, `tag`, `trigger`, `author`, `licence`) and its
    value; the dates are of the check-in.
    """

    text: str = ""
    labels: Sequence[tuple[str, str]] = ()
    made_after: datetime | None = None
    made_before: datetime | None = None

    def sql(self, after: str, limit: int) -> tuple[str, list[object]]:
        """The rows (`version`) of the newest versions that answer, by name, of assets that sort behind
        `after`; with its parameters.
        """
        source, where, parameters = "heads h", "h.name > ?", list[object]([after])
        if self.text.strip():
            source = "search s join heads h on h.version = s.rowid"
            where += " and search match ?"
            parameters.append(match(self.text) or '""')
        for field, value in self.labels:
            where += (
                " and exists (select 1 from labels where field = ? and value = ? and version = h.version)"
            )
            parameters += [field, fold(value)]
        for moment, comparison in ((self.made_after, ">="), (self.made_before, "<")):
            if moment:
                where += f" and (select created_at from versions where rowid = h.version) {comparison} ?"
                parameters.append(moment.astimezone(UTC).isoformat())
        return f"select h.version from {source} where {where} order by h.name limit ?", [*parameters, limit]


def labels(kind: str, facts: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What a version can be filtered by: (field, folded value). A `member` is the digest of another
    version that it needs.
    """
    told = facts.get("about", {})
    found = {("kind", kind), ("base", facts.get("family", ""))}
    found |= {("tag", tag) for tag in told.get("tags", {}).get("value", ())}
    found |= {("trigger", trigger["word"]) for trigger in facts.get("triggers", ())}
    found |= {(field, told[field]["value"]) for field in ("author", "licence") if field in told}
    found |= {("member", digest) for digest in facts.get("members", ())}
    return {(field, fold(value)) for field, value in found if value}


def fold(value: str) -> str:
    """What is compared: look-alikes of one letter (wide, composed) and cases are the same."""
    return unicodedata.normalize("NFKC", value).casefold()


def words(name: str, facts: Mapping[str, Any], card: bytes) -> str:
    """The text a version is found by: its name and parts of it, triggers, tags, title, author, card."""
    told = facts.get("about", {})
    parts = [name, *re.split(r"[._-]+", name), *(trigger["word"] for trigger in facts.get("triggers", ()))]
    parts += [told[field]["value"] for field in ("title", "author") if field in told]
    parts += told.get("tags", {}).get("value", ())
    return "\n".join([*parts, facts.get("file_name", ""), body(card)])


def match(text: str) -> str:
    """The FTS5 query for what a person typed: every word, the last as a prefix; "" when there is none.

    Words are quoted one by one: FTS5's own syntax would raise on a lone quote.
    """
    found = re.findall(r"\w+", text)
    return " ".join(f'"{word}"' for word in found[:-1]) + f' "{found[-1]}"*' if found else ""


def label(db: Database, version: int, kind: str, facts: Mapping[str, Any]) -> None:
    """Gives a version, by its rowid, the labels of these facts, and no others."""
    db["labels"].delete_where("version = ?", [version])
    for field, value in sorted(labels(kind, facts)):
        db["labels"].insert({"version": version, "field": field, "value": value}, ignore=True)


def head(db: Database, name: str) -> None:
    """Makes an asset findable by its newest version that is not deleted, and by no other: `heads` has its
    rowid, `search` its words.
    """
    for row in list(db.query("select version from heads where name = ?", [name])):
        db.execute("delete from search where rowid = ?", [row["version"]])
    db["heads"].delete_where("name = ?", [name])
    for row in list(
        db.query(
            "select rowid as id, facts, card from versions where name = ? and deleted_at is null"
            " order by number desc limit 1",
            [name],
        )
    ):
        db["heads"].insert({"version": row["id"], "name": name})
        text = words(name, json.loads(row["facts"]), row["card"] or b"")
        db["search"].insert({"rowid": row["id"], "words": text})
