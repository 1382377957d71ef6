"""What versions are made of: a saved stack of its members, a merge of its parents, by digest.

A member cannot be deleted while the stack is there, which is nothing without it, nor is a stack made, or
brought back, of members that are not there. A merge has its own bytes, so its parents can; but only with them
can it be made again, so while the merge is there no collection takes them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from registry.errors import Conflict
from registry.writer import Writer


def note(db: Writer, version: int, facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Notes what a version, by its rowid, is made of."""
    told = dict.fromkeys((parent["digest"] for parent in recipe.get("parents", ())), "parent")
    told |= dict.fromkeys(facts.get("members", ()), "member")
    for digest, what in told.items():
        db.insert("needs", {"digest": digest, "version": version, "what": what}, clash="ignore")


def check_members(query: Callable[..., Iterable[Any]], facts: Mapping[str, Any]) -> None:
    """Within the transaction that makes a version, or brings one back. Raises Conflict when a version that it
    is made of is not there.
    """
    for digest in facts.get("members", ()):
        rows = list(query("select name, number, deleted_at from versions where digest = ?", digest))
        if all(row["deleted_at"] for row in rows):
            gone = f"{rows[0]['name']}:{rows[0]['number']}" if rows else digest
            raise Conflict(
                f"{gone}, which the stack is made of, is deleted; `atelier undelete {gone}` brings it back",
                field="stack",
            )


def held_by_merges(query: Callable[..., Iterable[Any]], moment: str) -> dict[str, str]:
    """The versions deleted before a moment that a merge, not deleted before that moment, was made of, when no
    version that is there could stand in; each with the first such merge.
    """
    rows = query(_HELD, moment, moment)
    return {f"{row['name']}:{row['number']}": row["merge"] for row in rows}


_HELD = (
    "select v.name, v.number, m.name || ':' || m.number as merge from versions v"
    " join needs n on n.digest = v.digest and n.what = 'parent' join versions m on m.rowid = n.version"
    " where v.deleted_at < ? and v.purged_at is null and m.purged_at is null"
    " and (m.deleted_at is null or m.deleted_at >= ?) and not (m.name = v.name and m.number = v.number)"
    " and not exists (select 1 from versions w where w.digest = v.digest and w.deleted_at is null"
    " and json_extract(w.facts, '$.declared') is json_extract(v.facts, '$.declared'))"
    " group by v.rowid having m.rowid = min(m.rowid)"
)
