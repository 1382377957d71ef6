"""Publishing a version: one commit with weights, card and pictures, and a tag for its number.

In order: the card as it will be shown becomes the version's card here; what is about to be pushed is written
down; the commit is made on top of what was last seen there, or not at all; it is tagged; the link is written.
A crash anywhere leaves something that the next push or sync reads back and goes on from.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from registry.errors import Conflict, InvalidName, NotFound
from registry.hub import card as cards
from registry.hub import files
from registry.hub.client import Entry, Head, Source, new_push_id, oid
from registry.hub.endpoint import check_repo
from registry.hub.exchange import Exchange, Step, check_kind, digest_of, here
from registry.hub.state import Link, Pulling, Pushing
from registry.records import Preview, Version


@dataclass(frozen=True, slots=True)
class Planned:
    """A file of the repository after the push; `fresh` when it is not there yet as it is."""

    path: str
    size: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push makes of a repository. `card` is the one published, which becomes the version's."""

    version: Version
    repo: str
    tag: str
    card: bytes
    files: tuple[Planned, ...]
    delete: tuple[str, ...]
    notes: tuple[str, ...]
    pictures: Mapping[str, str]
    sources: Mapping[str, Source]

    @property
    def add(self) -> dict[str, Source]:
        """What has to be sent."""
        return {planned.path: self.sources[planned.path] for planned in self.files if planned.fresh}


@dataclass(frozen=True, slots=True)
class Published:
    """How a push went: the plan, and the commit (in a dry run ""); whether it was made now."""

    plan: Plan
    commit: str
    made: bool
    notes: tuple[str, ...]


def push(
    exchange: Exchange,
    ref: str,
    *,
    repo: str = "",
    private: bool = False,
    strip: bool | None = None,
    dry_run: bool = False,
) -> Published:
    """Publishes a version. Raises RegistryError: Conflict when the repository was changed since it was last
    seen, holds something else, or has a newer version already.
    """
    version = exchange.catalog.resolve(ref)
    check_kind(version)
    with exchange.claims.of(version.name):
        link = _linked(exchange, version, repo, strip)
        return _tried(exchange, version, link) if dry_run else _pushed(exchange, version, link, private)


def _tried(exchange: Exchange, version: Version, link: Link) -> Published:
    head = _head(exchange, link)
    tree = exchange.hub.tree(link.repo, head.commit) if head else {}
    with planned(exchange, version, link, tree) as plan:
        return Published(plan, "", made=False, notes=plan.notes)


def _pushed(exchange: Exchange, version: Version, link: Link, private: bool) -> Published:
    hub, link = exchange.hub, recover(exchange, link)
    if version.number < link.here.number:
        raise Conflict(
            f"{version.name}:{link.here.number} is published at {link.repo} already, and {version.ref} would "
            "take its place at the head",
            field="ref",
        )
    head = _head(exchange, link)
    if not head:
        hub.create(link.repo, private=private)
        head = hub.head(link.repo)
    tree = hub.tree(link.repo, head.commit)
    _check_unchanged(link, head.commit, tree)
    return send(exchange, version, link, head.commit, tree)


def _head(exchange: Exchange, link: Link) -> Head | None:
    """What is there; None where a repository has yet to be made. One that is gone is not made again: it may
    have been private. Raises RegistryError.
    """
    try:
        return exchange.hub.head(link.repo)
    except NotFound as error:
        if not link.commit:
            return None
        raise NotFound(
            f"{error}. {link.name}:{link.here.number} was published there, and a repository that is gone is "
            "not made again: publish it elsewhere with --repo ORG/NAME",
            field="repo",
        ) from None


def send(
    exchange: Exchange,
    version: Version,
    link: Link,
    parent: str,
    tree: Mapping[str, Entry],
    *,
    delete: bool = False,
) -> Published:
    """Makes the commit, on top of `parent`, which has `tree`. Raises RegistryError."""
    with planned(exchange, version, link, tree, delete=delete) as plan:
        if digest_of(plan.card) != version.card_digest:
            version = exchange.door.set_card(version, plan.card, exchange.actor)
        push_id = new_push_id()
        link = exchange.links.keep(replace(link, pushing=Pushing(push_id, here(version), plan.pictures)))
        add, commit = plan.add, parent
        if made := bool(add or plan.delete):
            total = sum(planned.size for planned in plan.files if planned.fresh)
            moving = exchange.moving(version.name, link.repo, "uploading", total)
            title = f"{version.name} version {version.number}"
            done = moving.commit(
                link.repo, add=add, delete=plan.delete, title=title, parent=parent, push_id=push_id
            )
            commit, tree = done.commit, done.tree
            exchange.told(Step(version.name, link.repo, "uploading", total, total))
        told = _settle(exchange, link, commit, tree)
        return Published(plan, commit, made=made, notes=(*plan.notes, *told))


def recover(exchange: Exchange, link: Link) -> Link:
    """What became of a push or a pull that nobody heard the end of. Raises RegistryError."""
    if pulling := link.pulling:
        newest = exchange.newest(link.name)
        link = replace(link, pulling=None)
        if newest and _finished(pulling, link, newest):
            # The commit stays the one before: what else came with this one has to be looked at still.
            now = replace(here(newest), card_digest=pulling.card_digest)  # another one is edited here since
            link = replace(link, here=now, oids={**link.oids, **pulling.oids})
        link = exchange.links.keep(link)
    if not link.pushing:
        return link
    try:
        commit = exchange.hub.made(link.repo, link.pushing.id)
    except NotFound:
        commit = ""
    if not commit:
        return exchange.links.keep(replace(link, pushing=None))
    _settle(exchange, link, commit, exchange.hub.tree(link.repo, commit))
    return exchange.links.of(link.name)


def _finished(pulling: Pulling, link: Link, newest: Version) -> bool:
    """Whether a pull has made what it was to make: the newest version, or that one's card."""
    if pulling.card_only:
        return link.here.card_digest != pulling.card_digest == newest.card_digest
    commit = newest.facts.get("origin", {}).get("commit", "")
    return newest.number > pulling.number and bool(commit == pulling.commit)


def _settle(exchange: Exchange, link: Link, commit: str, tree: Mapping[str, Entry]) -> list[str]:
    """Tags the commit of a push and writes down that both sides are the same; what to tell."""
    if not link.pushing:
        raise AssertionError  # its callers are pushing
    tag, now = f"v{link.pushing.here.number}", link.pushing.here
    told = []
    # Another card of a version that has its tag moves no tag: `v3` is what was published as version 3.
    if now.number != link.here.number and not exchange.hub.tag(link.repo, tag, commit):
        told.append(f"the tag {tag} names another commit of {link.repo} and stays there")
    exchange.links.keep(
        replace(
            link,
            here=now,
            commit=commit,
            oids=files.sort(tree).oids(link.file),
            pictures=link.pushing.pictures,
            pushing=None,
        ),
        actor=exchange.actor,
        action="publish",
    )
    return told


def _linked(exchange: Exchange, version: Version, repo: str, strip: bool | None) -> Link:
    known, file = exchange.links.find(version.name), files.WEIGHTS[version.kind]
    if not repo and not known:
        raise InvalidName(f"where to? {version.name} has no repository yet; --repo ORG/NAME", field="repo")
    if known and repo in {"", known.repo} and known.endpoint == exchange.endpoint:
        return replace(known, strip=known.strip if strip is None else strip)
    if not repo:
        raise InvalidName(
            f"{version.name} is published on {known.endpoint if known else ''}, not on {exchange.endpoint}; "
            "say --repo ORG/NAME to publish it here",
            field="repo",
        )
    check_repo(repo)
    if others := [n for n in exchange.links.users(exchange.endpoint, repo) if n != version.name]:
        raise Conflict(f"{repo} is the repository of {others[0]}; choose another --repo", field="repo")
    return Link(version.name, exchange.endpoint, repo, file, strip=bool(strip))


def _check_unchanged(link: Link, commit: str, tree: Mapping[str, Entry]) -> None:
    if link.commit in {"", commit}:
        if not link.commit and (files.sort(tree).weights or files.sort(tree).card):
            raise Conflict(
                f"{link.repo} holds something already; take it first: "
                f"atelier hub pull {link.repo} --name {link.name}",
                field="repo",
            )
    elif files.sort(tree).oids(link.file) != dict(link.oids):
        raise Conflict(
            f"{link.repo} was changed on the Hub since it was last seen; `atelier hub sync {link.name}` "
            "shows how, and brings both together",
            field="repo",
        )


@contextmanager
def planned(
    exchange: Exchange, version: Version, link: Link, tree: Mapping[str, Entry], *, delete: bool = False
) -> Iterator[Plan]:
    """What a push would make of a repository that has `tree`. With `delete` pictures that were taken away
    here go there, too. Raises RegistryError.
    """
    catalog, notes = exchange.catalog, list[str]()
    previews = [p for p in catalog.previews(version) if link.pictures.get(p.digest) != ""]
    pictures = dict(link.pictures) | {p.digest: link.pictures.get(p.digest) or _path(p) for p in previews}
    shown = [cards.Shown(pictures[p.digest], p.caption) for p in previews if pictures[p.digest] not in tree]
    parents = {parent["digest"]: "" for parent in (version.recipe or {}).get("parents", ())}
    text = cards.published(
        catalog.card(version),
        version,
        repo=link.repo,
        weights=link.file,
        pictures=shown,
        parents=exchange.links.repos(parents),
    )
    sources: dict[str, Source] = {files.CARD: text}
    sources |= {pictures[p.digest]: catalog.blobs.verified(p.digest) for p in previews}
    if config := str(version.facts.get("declared", {}).get("adapter_config", "")):
        sources[files.CONFIG] = config.encode()
    taken = tuple(path for digest in gone(exchange, version, link) if (path := pictures.pop(digest)) in tree)
    if not delete:
        pictures, taken = dict(link.pictures) | pictures, ()
    with tempfile.TemporaryDirectory(dir=catalog.blobs.incoming) as folder:
        sources[link.file], more = _weights(exchange, version, link, Path(folder))
        if (layout := version.facts.get("layout", "")) in files.FOREIGN:
            notes.append(
                f"its layout is {layout}, which diffusers does not load by itself; `atelier save-as` makes "
                "another file of it"
            )
        if not version.facts.get("about", {}).get("licence"):
            notes.append("nobody says its licence; `license: …` in the card does")
        yield Plan(
            version,
            link.repo,
            f"v{version.number}",
            text,
            tuple(_planned(path, source, tree.get(path)) for path, source in sources.items()),
            taken,
            (*more, *notes),
            pictures,
            sources,
        )


def gone(exchange: Exchange, version: Version, link: Link) -> list[str]:
    """Pictures that are there, and were taken away here."""
    shown = {preview.digest for preview in exchange.catalog.previews(version)}
    return [digest for digest, path in link.pictures.items() if path and digest not in shown]


def _weights(exchange: Exchange, version: Version, link: Link, folder: Path) -> tuple[Path, list[str]]:
    """The file that is published, and what to tell of it."""
    path = exchange.catalog.blobs.verified(version.digest)
    telling = files.private(path)
    if not telling:
        return path, []
    listed = ", ".join(telling[:6]) + (", …" if len(telling) > 6 else "")
    if not link.strip:
        return path, [f"the file's header tells of its training ({listed}); --strip leaves that out"]
    files.stripped(path, telling, folder / link.file.split("/")[-1])
    return folder / link.file.split("/")[-1], [f"left out of the file's header: {listed}"]


def _planned(path: str, source: Source, there: Entry | None) -> Planned:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    large = there is not None and there.oid.startswith("sha256:")
    same = there is not None and there.size == size and there.oid == oid(source, large=large)
    return Planned(path, size, fresh=not same)


def _path(preview: Preview) -> str:
    return f"images/{preview.digest.removeprefix('sha256:')[:16]}.png"
