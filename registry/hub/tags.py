"""Which commit is which version: the tag `v3` names one that holds version 3.

Tags are owed first and made then: `Link.tags` has those of our commits until they are there, so that no crash
and no sync that may not write there leaves a version without one. A version that was pulled from the
repository gets its tag along with the next one that is published, where nobody has tagged its commit. A tag
is never moved: others may have pinned it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

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
    there, elsewhere = exchange.hub.tags(link.repo), list[str]()
    versions = {commit for name, commit in there.items() if _VERSION.fullmatch(name)}
    for name, commit in _pulled(exchange, link).items():
        if name not in there and commit not in versions:
            exchange.hub.tag(link.repo, name, commit)
    for name, commit in link.tags.items():
        if name not in there and not exchange.hub.tag(link.repo, name, commit):
            there = exchange.hub.tags(link.repo)  # somebody has made it meanwhile
        at = there.get(name, commit)
        if at != commit and not _same(exchange, link, at, tree or exchange.hub.tree(link.repo, commit)):
            elsewhere.append(name)
    return exchange.links.keep(replace(link, tags={})), elsewhere


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


def _same(exchange: Exchange, link: Link, commit: str, tree: Mapping[str, Entry]) -> bool:
    """Whether a commit has the same weights as `tree`: then only card or pictures are others since."""
    then, now = exchange.hub.tree(link.repo, commit).get(link.file), tree.get(link.file)
    return then is not None and now is not None and then.oid == now.oid
