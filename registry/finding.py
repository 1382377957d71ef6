"""How a version is found again: what its asset is searched and filtered by, and what a question becomes in
SQL.

Only the newest version of an asset is in `heads` and `search`, since lists and searches ask for no other. A
head's `place` is its row in `search`, and places are in the order of names (`registry.places`), so that the
full text gives its rows as they are wanted and stops with the page: a word that 5,000 assets share costs no
more than one that 100 do. A label is a word of its own in the full text, which nobody can type.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from registry.cards import body
from registry.places import place
from registry.writer import Writer

FIELDS = ("kind", "base", "tag", "trigger", "author", "licence")
_MARK = "\ue000"
"""Begins the words that are labels: FTS5 takes it for a letter, `match` does not, and no text keeps it."""


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
        source, where, order, parameters = "heads h", "h.name > ?", "h.name", list[object]([after])
        if self.text.strip() or self.labels:
            source, order = "search s cross join heads h on h.place = s.rowid", "s.rowid"
            behind = "select place from heads where name <= ? order by name desc limit 1"
            where = f"s.rowid > coalesce(({behind}), 0) and search match ?"
            parameters.append(self._match())
        for moment, comparison in ((self.made_after, ">="), (self.made_before, "<")):
            if moment:
                where += f" and h.created_at {comparison} ?"
                parameters.append(moment.astimezone(UTC).isoformat())
        return f"select h.version from {source} where {where} order by {order} limit ?", [*parameters, limit]

    def _match(self) -> str:
        text = match(self.text)
        if self.text.strip() and not text:
            return '""'  # nothing
        return " ".join(filter(None, [text, *(f'"{_word(field, value)}"' for field, value in self.labels)]))


def labels(kind: str, facts: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What a version can be filtered by: (field, folded value)."""
    told = facts.get("about", {})
    found = {("kind", kind), ("base", facts.get("family", ""))}
    found |= {("tag", tag) for tag in told.get("tags", {}).get("value", ())}
    found |= {("trigger", trigger["word"]) for trigger in facts.get("triggers", ())}
    found |= {(field, told[field]["value"]) for field in ("author", "licence") if field in told}
    return {(field, fold(value)) for field, value in found if value}


def fold(value: str) -> str:
    """What is compared: look-alikes of one letter (wide, composed) and cases are the same."""
    return unicodedata.normalize("NFKC", value).casefold()


def _word(field: str, value: str) -> str:
    """A label as a word of the full text."""
    told = f"{field}\0{fold(value)}".encode(errors="surrogatepass")
    return _MARK + hashlib.blake2b(told, digest_size=16).hexdigest()


def words(name: str, facts: Mapping[str, Any], card: bytes) -> str:
    """The text a version is found by: its name and parts of it, triggers, tags, title, author, card."""
    told = facts.get("about", {})
    parts = [name, *re.split(r"[._-]+", name), *(trigger["word"] for trigger in facts.get("triggers", ()))]
    parts += [told[field]["value"] for field in ("title", "author") if field in told]
    parts += told.get("tags", {}).get("value", ())
    return composed("\n".join([*parts, facts.get("file_name", ""), body(card)]))


def composed(text: str) -> str:
    """Letters and their accents in one: where these follow, as in file names of macOS, FTS5 parts a word."""
    return unicodedata.normalize("NFC", text)


def match(text: str) -> str:
    """The FTS5 query for what a person typed: every word, the last as a prefix; "" when there is none.

    Words are quoted one by one: FTS5's own syntax would raise on a lone quote.
    """
    found = re.findall(r"[\w\u0300-\u036f]+", composed(text))  # some accents no letter is composed with
    return " ".join(f'"{word}"' for word in found[:-1]) + f' "{found[-1]}"*' if found else ""


def head(db: Writer, name: str) -> None:
    """Makes an asset findable by its newest version that is not deleted, and by no other: `heads` has its
    rowid, `search` its words and labels.
    """
    newest = db.query(
        "select rowid as id, kind, facts, card, created_at from versions"
        " where name = ? and deleted_at is null order by number desc limit 1",
        name,
    )
    known = db.query("select place from heads where name = ?", name)
    for row in known:
        db.execute("delete from search where rowid = ?", row["place"])
        if not newest:
            db.execute("delete from heads where name = ?", name)
    for row in newest:
        facts = json.loads(row["facts"])
        text = words(name, facts, row["card"] or b"").replace(_MARK, " ")
        told = " ".join(_word(*label) for label in sorted(labels(row["kind"], facts)))
        where = known[0]["place"] if known else place(db, name)
        head = {"place": where, "version": row["id"], "name": name, "created_at": row["created_at"]}
        db.upsert("heads", head, key=["place"])
        db.insert("search", {"rowid": where, "words": f"{text}\n{told}"})
