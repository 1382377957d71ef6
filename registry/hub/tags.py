"""Which commit is which version: the tag `v3` names one that holds version 3.

Tags are owed first and made then: `Link.tags` has those of our commits until they are there, so that no crash
and no sync that may not write there leaves a version without one. A version that was pulled from the
repository gets its tag along with the next one that is published, where nobody has tagged its commit. A tag
is never moved: others may have pinned it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from registry.errors import NotFound
from registry.hub.client import Entry
from registry.hub.exchange import Exchange
from registry.hub.state import Link

_VERSION = re.compile(r"v(\d{1,9})")


def tag_of(number: int) -> str:
    """The tag of a version."""
    return f"v{number}"


def made(exchange: Exchange, link: Link, tree: Mapping[str, Entry] | None = None) -> tuple[Link, list[str]]:
    """Makes the tags that are owed: the link without them, and which of them stay elsewhere. `tree` is that
    of the newest commit, if it is known. Raises RegistryError.
    """
    if not link.tags:
        return link, []
    hub, there, elsewhere = exchange.hub, exchange.hub.tags(link.repo), list[str]()
    versions = {commit for name, commit in there.items() if _VERSION.fullmatch(name)}
    for name, commit in _pulled(exchange, link).items():
        if name not in there and commit not in versions:
            _put(exchange, link, name, commit)
    for name, commit in link.tags.items():
        if name not in there and not _put(exchange, link, name, commit):
            there = hub.tags(link.repo)  # somebody has made it meanwhile
        if (at := there.get(name, commit)) != commit:
            now = tree if tree and commit == link.commit else hub.tree(link.repo, commit)
            elsewhere += [] if _same(link, hub.tree(link.repo, at), now) else [name]
    return exchange.links.keep(replace(link, tags={})), elsewhere


def _put(exchange: Exchange, link: Link, name: str, commit: str) -> bool:
    """Makes a tag; False when it is there, at another commit. A commit that is gone has none."""
    try:
        return exchange.hub.tag(link.repo, name, commit)
    except NotFound as error:
        if error.field != "revision":
            raise
        return True


def _pulled(exchange: Exchange, link: Link) -> dict[str, str]:
    """The commits of versions that came from the repository, older than those whose tags are owed."""
    newest = max(int(found[1]) for name in link.tags if (found := _VERSION.fullmatch(name)))
    return {
        tag_of(version.number): str(origin["commit"])
        for version in exchange.catalog.history(link.name)
        if version.number < newest and not version.deleted_at
        and (origin := version.facts.get("origin", {})).get("commit")
        and (origin.get("hub"), origin.get("repo")) == (link.endpoint, link.repo)
    }  # fmt: skip


def _same(link: Link, then: Mapping[str, Entry], now: Mapping[str, Entry]) -> bool:
    """Whether two trees have the same weights: only card or pictures are others."""
    was, has = then.get(link.file), now.get(link.file)
    return was is not None and has is not None and was.oid == has.oid
