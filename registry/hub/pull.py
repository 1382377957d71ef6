"""Taking a version from a repository: a revision becomes a commit, a commit a list of files, and only those
of known kinds come, each byte compared with what the list says, through the ordinary gate.
"""

import json
import re
from dataclasses import dataclass

from registry.digests import DigestStream
from registry.errors import Conflict, Damaged, InvalidFile, NotFound
from registry.hub import card as cards
from registry.hub import files
from registry.hub.client import Entry, Head, oid
from registry.hub.endpoint import check_repo
from registry.hub.exchange import Arrival, Exchange, here
from registry.hub.state import Link
from registry.records import Version
from registry.refs import check_name

PICTURES_LIMIT = 8
_TITLE = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Pulled:
    """How a pull went: the version that holds what is there, whether it is new, and what to tell."""

    version: Version
    head: Head
    file: str
    created: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a pull would take."""

    head: Head
    files: files.Files
    entry: Entry

    @property
    def content(self) -> dict[str, str]:
        """What is compared, pictures aside."""
        return self.files.content(self.entry.path)

    @property
    def oids(self) -> dict[str, str]:
        """What is compared."""
        return self.files.oids(self.entry.path)


def look(exchange: Exchange, repo: str, revision: str = "main", file: str = "") -> Found:
    """What a revision holds. Raises RegistryError."""
    head = exchange.hub.head(repo, revision)
    found = files.sort(exchange.hub.tree(repo, head.commit))
    return Found(head, found, files.choose(found, repo, file))


def pull(exchange: Exchange, repo: str, *, revision: str = "", name: str = "", file: str = "") -> Pulled:
    """Takes a version, as the next of `name` (that of the repository when not said, and then of no asset from
    elsewhere). What is at the head of `main` stays linked with it, for syncs; a pinned revision does not.
    Raises RegistryError.
    """
    check_repo(repo)
    taken = check_name(name or name_of(repo))
    with exchange.claims.of(taken):
        _check_free(exchange, repo, revision, taken, chosen=bool(name))
        return _pulled(exchange, repo, revision, taken, file)


def _check_free(exchange: Exchange, repo: str, revision: str, name: str, *, chosen: bool) -> None:
    """Raises Conflict when what is there would become the newest version of something else."""
    if link := exchange.links.find(name):
        if (link.repo, link.endpoint) != (repo, exchange.endpoint):
            raise Conflict(f"{name} is linked with {link.repo} already; choose another --name", field="name")
        if revision:
            raise Conflict(
                f"{name} is linked with {repo}, and {repo}@{revision[:60]} would become its newest version; "
                "choose another --name for it",
                field="name",
            )
        if link.commit:
            raise Conflict(f"{name} is linked with {repo} already; `atelier hub sync {name}`", field="name")
    elif not chosen and (newest := exchange.newest(name)):
        origin = newest.facts.get("origin", {})
        if (origin.get("hub"), origin.get("repo")) != (exchange.endpoint, repo):
            raise Conflict(
                f"{newest.ref} is here already and is not from {repo}; choose another --name, or say "
                f"--name {name} to put it on top of that",
                field="name",
            )


def _pulled(exchange: Exchange, repo: str, revision: str, name: str, file: str) -> Pulled:
    found = look(exchange, repo, revision or "main", file)
    newest = exchange.newest(name)
    if newest and same(exchange, newest, found, None):
        version, created = newest, False
    else:
        version, created = take(exchange, name, found, card_of(exchange, found)), True
    pictures, notes = gallery(exchange, version, found, {})
    if not revision:
        fresh = Link(
            name, exchange.endpoint, repo, found.entry.path,
            here=here(version), commit=found.head.commit, oids=found.oids, pictures=pictures,
        )  # fmt: skip
        exchange.links.keep(fresh, actor=exchange.actor, action="pull")
    return Pulled(exchange.catalog.resolve(version.ref), found.head, found.entry.path, created, tuple(notes))


def name_of(repo: str) -> str:
    """An asset's name made of a repository's."""
    return _TITLE.sub("-", repo.rpartition("/")[2].lower()).strip("-")


def same(exchange: Exchange, version: Version, found: Found, link: Link | None) -> bool:
    """Whether a version is what is there: weights, what belongs to them, and card."""
    card, stripped = found.files.card, link.strip if link else False
    if card and card.oid != oid(exchange.catalog.card(version), large=card.oid.startswith("sha256:")):
        return False
    if not card and version.card_digest:
        return False
    beside, config = found.files.config(found.entry.path), version.facts.get("declared", {})
    told = str(config.get("adapter_config", "")).encode()
    as_published = link is not None and stripped and beside and link.oids.get(beside.path) == beside.oid
    if beside and not as_published and beside.oid != oid(told, large=beside.oid.startswith("sha256:")):
        return False
    large = found.entry.oid.startswith("sha256:")
    if large and not stripped:
        return found.entry.oid == version.digest
    if link and stripped and version.digest == link.here.digest:  # what it is without its header is known
        return found.entry.oid == link.oids.get(link.file)
    return not stripped and found.entry.oid == oid(exchange.catalog.blobs.path(version.digest), large=large)


def card_of(exchange: Exchange, found: Found, before: Version | None = None) -> bytes:
    """The card that is there; where there is none, that of `before`: what is gone there is not taken away
    here. Raises RegistryError.
    """
    if not found.files.card:
        return exchange.catalog.card(before) if before else b""
    return exchange.hub.read(found.head.repo, found.head.commit, found.files.card)


def take(
    exchange: Exchange,
    name: str,
    found: Found,
    card: bytes,
    *,
    alias: str = "",
    before: Version | None = None,
) -> Version:
    """Makes what is there a version, with this card. `before` is the asset's newest, whose declarations go
    on, and which has to be that still when it is made. Raises RegistryError (Moved when it is not).
    """
    repo, commit, entry = found.head.repo, found.head.commit, found.entry
    hub = exchange.moving(name, repo, "downloading", entry.size)
    beside = found.files.config(entry.path)
    config = hub.read(repo, commit, beside).decode(errors="replace") if beside else ""
    if config:
        _check_config(config)
    arrival = Arrival(
        name,
        card,
        file_name=entry.path.rpartition("/")[2],
        origin={"hub": exchange.endpoint, "repo": repo, "commit": commit, "file": entry.path},
        commit=commit,
        alias=alias,
        base=str(before.facts.get("declared", {}).get("base", "")) if before else "",
        adapter_config=config,
        seen=before,
    )

    def received() -> Version:
        local, digests = entry.oid if entry.oid.startswith("sha256:") else "", DigestStream()
        have = bool(local) and exchange.catalog.blobs.path(local).exists()
        with exchange.catalog.blobs.upload() as upload:
            pieces = exchange.catalog.blobs.chunks(local) if have else hub.chunks(repo, commit, entry)
            for piece in pieces:
                upload.write(piece)
                digests.update(piece)
            return exchange.door.check_in(upload, digests, arrival, exchange.actor)

    return hub.patiently(received)


def gallery(
    exchange: Exchange, version: Version, found: Found, known: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Shows the pictures that are there, and not in `known` (by digest here, the path there), with a version;
    `known` with them, and what to tell. A picture that cannot be taken stops nothing. Raises RegistryError
    when the Hub does.
    """
    captions = cards.gallery(exchange.catalog.card(version))
    seen, notes = dict(known), list[str]()
    fresh = [path for path in found.files.pictures if path not in known.values()]
    fresh.sort(key=lambda path: (list(captions).index(path) if path in captions else len(captions), path))
    room = max(0, PICTURES_LIMIT - len(exchange.catalog.previews(version)))
    for path in fresh[:room]:
        try:
            image = exchange.hub.read(found.head.repo, found.head.commit, found.files.pictures[path])
            digest = exchange.door.add_preview(version, image, captions.get(path, ""), exchange.actor)
        except (InvalidFile, Conflict, Damaged, NotFound) as error:
            notes.append(f"{path}: {error}")
        else:
            seen[digest] = path
    if len(fresh) > room:
        notes.append(f"{len(fresh) - room} pictures there were left, {PICTURES_LIMIT} are shown here")
    return seen, notes


def _check_config(text: str) -> None:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidFile("the adapter_config.json there is not JSON", field="file") from None
