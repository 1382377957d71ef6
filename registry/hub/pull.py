"""Taking a version from a repository: a revision becomes a commit, a commit a list of files, and only those
of known kinds come, each byte compared with what the list says, through the ordinary gate.
"""

import json
import re
from dataclasses import dataclass, replace

from registry.cards import CARD_LIMIT, front_matter
from registry.digests import DigestStream
from registry.errors import Conflict, Damaged, InvalidFile, Moved, NotFound, Renamed, Untrusted
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
    tree = exchange.hub.tree(repo, head.commit)
    found = files.sort(tree)
    return Found(head, found, files.choose(found, repo, file, files.left_out(tree, found)))


def pull(
    exchange: Exchange,
    repo: str,
    *,
    revision: str = "",
    name: str = "",
    file: str = "",
    without_card: bool = False,
) -> Pulled:
    """Takes a version, as the next of `name` (that of the repository when not said, and then of no asset from
    elsewhere). What is at the head of `main` stays linked with it, for syncs; a pinned revision does not, nor
    what was taken without its card, in whose place one would be published. Raises RegistryError.
    """
    check_repo(repo)
    taken = check_name(name or name_of(repo))
    with exchange.claims.of(taken):
        newest = _free(exchange, repo, revision, taken, chosen=bool(name))
        try:
            found = look(exchange, repo, revision or "main", file)
        except Renamed as error:
            at = f"@{revision}" if revision else ""
            told = f"{error}: `atelier hub pull {error.new}{at}`"
            raise Renamed(told, new=error.new, field="repo") from None
        if without_card:
            found = replace(found, files=replace(found.files, card=None))
        try:
            return _pulled(exchange, found, taken, newest, follow=not revision and not without_card)
        except Moved:
            raise Moved(
                f"{taken} was changed here meanwhile, so nothing was taken; look at it, then pull again, or "
                "choose another --name",
                field="name",
            ) from None


def _free(exchange: Exchange, repo: str, revision: str, name: str, *, chosen: bool) -> Version | None:
    """The version that a pull goes on top of, None for a new asset. Raises Conflict when what is there would
    become the newest version of something else.
    """
    newest = exchange.newest(name)
    if link := exchange.links.find(name):
        if (link.repo, link.endpoint) != (repo, exchange.endpoint):
            raise Conflict(f"{name} is linked with {link.repo} already; choose another --name", field="name")
        if revision:
            raise Conflict(
                f"{name} is linked with {repo}, and {repo}@{revision[:60]} would become its newest version; "
                "choose another --name for it",
                field="name",
            )
        if link.commit or link.pushing or link.tags:  # a push that nobody heard the end of may have been made
            raise Conflict(f"{name} is linked with {repo} already; `atelier hub sync {name}`", field="name")
    elif not chosen and newest:
        origin = newest.facts.get("origin", {})
        if (origin.get("hub"), origin.get("repo")) != (exchange.endpoint, repo):
            raise Conflict(
                f"{newest.ref} is here already and is not from {repo}; choose another --name, or say "
                f"--name {name} to put it on top of that",
                field="name",
            )
    return newest


def _pulled(exchange: Exchange, found: Found, name: str, newest: Version | None, *, follow: bool) -> Pulled:
    """Takes what was found, on top of `newest`. Raises RegistryError (Moved when that is another by now)."""
    repo = found.head.repo
    if newest and same(exchange, newest, found, None):
        version, created = newest, False
    else:
        card = card_of(exchange, found)
        version, created = take(exchange, name, found, card, seen=newest, first=newest is None), True
    pictures, notes = gallery(exchange, version, found, {})
    if follow:
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
    if told and not beside:
        return False
    if beside and not as_published and beside.oid != oid(told, large=beside.oid.startswith("sha256:")):
        return False
    large = found.entry.oid.startswith("sha256:")
    if large and not stripped:
        return found.entry.oid == version.digest
    if link and stripped and version.digest == link.here.digest:  # what it is without its header is known
        return found.entry.oid == link.oids.get(link.file)
    return not stripped and found.entry.oid == oid(exchange.catalog.blobs.path(version.digest), large=large)


def card_of(exchange: Exchange, found: Found, before: Version | None = None) -> bytes:
    """The card that is there, if it can be one here; where there is none, that of `before`: what is gone
    there is not taken away here. Raises RegistryError.
    """
    card, repo = card_there(exchange, found, before), found.head.repo
    try:
        front_matter(card)
    except InvalidFile as error:
        instead = "" if before else f", or take its weights alone: `atelier hub pull {repo} --without-card`"
        raise InvalidFile(
            f"the README.md of {repo} cannot be a card here, so nothing was taken: "
            f"{' '.join(str(error).split())}. Correct it there{instead}",
            field="card",
        ) from None
    return card


def card_there(exchange: Exchange, found: Found, before: Version | None = None) -> bytes:
    """The same, whatever it is. Raises RegistryError."""
    if not found.files.card:
        return exchange.catalog.card(before) if before else b""
    if found.files.card.size > CARD_LIMIT:
        raise InvalidFile(
            f"the README.md of {found.head.repo} has {found.files.card.size} bytes, a card's limit is "
            f"{CARD_LIMIT}; shorten it there",
            field="card",
        )
    return exchange.hub.read(found.head.repo, found.head.commit, found.files.card)


def take(
    exchange: Exchange,
    name: str,
    found: Found,
    card: bytes,
    *,
    alias: str = "",
    before: Version | None = None,
    seen: Version | None = None,
    first: bool = False,
) -> Version:
    """Makes what is there a version, with this card. `before` is one whose declarations go on; `seen` has to
    be the asset's newest still when it is made, and to be its `first` it has to have none. Raises
    RegistryError (Moved when that is not so).
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
        seen=seen,
        first=first,
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
    places = {path: place for place, path in enumerate(captions)}
    seen, notes, have = dict(known), list[str](), set(known.values())
    fresh = [path for path in found.files.pictures if path not in have]
    fresh.sort(key=lambda path: (places.get(path, len(places)), path))
    room = max(0, PICTURES_LIMIT - len(exchange.catalog.previews(version)))
    for path in fresh[:room]:
        try:
            image = exchange.hub.read(found.head.repo, found.head.commit, found.files.pictures[path])
            digest = exchange.door.add_preview(version, image, captions.get(path, ""), exchange.actor)
        except (InvalidFile, Conflict, Damaged, NotFound, Untrusted) as error:
            notes.append(f"{path}: {error}")
        else:
            seen[digest] = path
    if len(fresh) > room:
        notes.append(f"{len(fresh) - room} pictures there were left, {PICTURES_LIMIT} are shown here")
    return seen, notes


def _check_config(text: str) -> None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidFile("the adapter_config.json there is no JSON object", field="file")
