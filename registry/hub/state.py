"""Which asset is which repository, and what both held when they were last the same: the third point of a
three-way comparison. A row of `hub_links` an asset:

    here    number, digest, card_digest    the version that was the newest then, and its card
    there   commit_id, oids                the head of main, and what its files hold: {path: oid}, "" for
                                           pictures that have yet to be looked at
    both    pictures                       [[digest here, path there]…]

A row is written after what it says is true on both sides, so a crash leaves one that is out of date, never
one that is wrong. `under_way` (push, pull, tags that are owed) is written before a commit is made, or a
version: when nobody learned whether it was, the id of the push is looked for in the history there, what the
pull makes in the newest version.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from registry.catalog import Catalog
from registry.errors import NotFound
from registry.records import now


@dataclass(frozen=True, slots=True)
class Here:
    """A version as it is compared. `digest` is of its weights, `card_digest` of its card."""

    number: int
    digest: str
    card_digest: str


NOWHERE = Here(0, "", "")
Pictures = Mapping[str, str]
"""By digest here, the path there; "" for one that was taken away or replaced there, and is not sent again."""


@dataclass(frozen=True, slots=True)
class Pushing:
    """A push under way: its id, what it publishes, the pictures that are there afterwards, and the commit on
    top of which its own goes ("" where that was not written down).
    """

    id: str
    here: Here
    pictures: Pictures
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Pulling:
    """A pull under way: the commit, the card that the newest version will have then, what its files hold,
    pictures aside, and the newest `number` before; `card_only` when it makes no version of its own, `both`
    when what is here is published below it.
    """

    commit: str
    card_digest: str
    oids: Mapping[str, str]
    number: int = 0
    card_only: bool = False
    both: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """An asset and its repository. `file` holds the weights there; with `strip` those are without what
    headers tell of a training. `commit` is "" before anything was published or pulled. `tags` are owed to
    the repository: by name, the commit.
    """

    name: str
    endpoint: str
    repo: str
    file: str = ""
    strip: bool = False
    here: Here = NOWHERE
    commit: str = ""
    oids: Mapping[str, str] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=dict)
    pushing: Pushing | None = None
    pulling: Pulling | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    synced_at: str = ""

    def seen(self, oids: Mapping[str, str], more: Collection[str]) -> dict[str, str]:
        """These files there, "" for each that is neither among what was looked at before nor among `more`."""
        return {p: oid if p in more or self.oids.get(p) == oid else "" for p, oid in oids.items()}

    @property
    def waiting(self) -> bool:
        """Whether something there has yet to be looked at."""
        return "" in self.oids.values()


class Links:
    """The links of a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._db = catalog.database

    def of(self, name: str) -> Link:
        """An asset's. Raises NotFound."""
        if link := self.find(name):
            return link
        raise NotFound(
            f"{name!r} has no repository on a Hub; `atelier hub push {name} --repo ORG/NAME` makes one, "
            f"`atelier hub pull ORG/NAME --name {name}` takes one",
            field="name",
        )

    def find(self, name: str) -> Link | None:
        """An asset's, if it has one."""
        rows = self._db.query("select * from hub_links where name = ?", name)
        return _link(rows[0]) if rows else None

    def all(self) -> list[Link]:
        """Every link, by name."""
        return [_link(row) for row in self._db.query("select * from hub_links order by name")]

    def repos(self, digests: Mapping[str, object]) -> dict[str, str]:
        """Where versions with these digests are published: repositories by digest."""
        links = self.all() if digests else ()
        return {link.here.digest: link.repo for link in links if link.here.digest in digests}

    def users(self, endpoint: str, repo: str) -> list[str]:
        """The assets whose repository this is."""
        rows = self._db.query(
            "select name from hub_links where endpoint = ? and repo = ? order by name", endpoint, repo
        )
        return [row["name"] for row in rows]

    def keep(self, link: Link, *, actor: str = "", action: str = "") -> Link:
        """Writes a link down; with an `action` (`publish`, `pull`) as an event of its version, too."""
        link = replace(link, synced_at=now())
        row = {
            "name": link.name,
            "endpoint": link.endpoint,
            "repo": link.repo,
            "file": link.file,
            "strip": int(link.strip),
            "number": link.here.number,
            "digest": link.here.digest,
            "card_digest": link.here.card_digest,
            "commit_id": link.commit,
            "oids": json.dumps(dict(link.oids), sort_keys=True),
            "pictures": json.dumps(list(link.pictures.items())),
            "under_way": json.dumps(
                {
                    "push": asdict(link.pushing) if link.pushing else None,
                    "pull": asdict(link.pulling) if link.pulling else None,
                    "tags": dict(link.tags),
                }
            ),
            "synced_at": link.synced_at,
        }
        with self._db.write():
            self._db.tables.upsert("hub_links", row, key=["name"])
            if action:
                told = {"endpoint": link.endpoint, "repo": link.repo, "commit": link.commit}
                self._db.event(actor, action, link.name, link.here.number, told)
        return link

    def forget(self, name: str) -> None:
        """The asset has no repository any more; nothing changes there."""
        with self._db.write():
            self._db.tables.execute("delete from hub_links where name = ?", name)


def _link(row: Mapping[str, Any]) -> Link:
    under_way = json.loads(row["under_way"])
    push, pull = under_way["push"], under_way["pull"]
    return Link(
        name=row["name"],
        endpoint=row["endpoint"],
        repo=row["repo"],
        file=row["file"],
        strip=bool(row["strip"]),
        here=Here(row["number"], row["digest"], row["card_digest"]),
        commit=row["commit_id"],
        oids=json.loads(row["oids"]),
        pictures=dict(json.loads(row["pictures"])),
        pushing=Pushing(**{**push, "here": Here(**push["here"])}) if push else None,
        pulling=Pulling(**{key: pull[key] for key in pull if key != "digest"}) if pull else None,
        tags=under_way.get("tags", {}),
        synced_at=row["synced_at"],
    )
