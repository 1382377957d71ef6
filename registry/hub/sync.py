"""Bringing an asset and its repository together: what both held when they were last the same, what is here,
what is there.

    here changed | there changed
    no           | no              nothing is done, after one request
    yes          | no              published, every newer version as its own commit
    no           | yes             pulled: other weights are a new version, another card alone is its new card
    yes          | yes, the same   nothing is sent; both are noted as the same
    yes          | yes, otherwise  a conflict, shown with both differences; `keep` resolves it

`keep`: `ours` goes on top of theirs, whose commits stay in the history there; `theirs` becomes the newest
version, ours stays below it; `both` makes theirs the newest version under the alias `theirs` and publishes
ours below it. Pictures are added on both sides. What is gone on one side stays on the other; with `delete`
pictures that are gone here go there.
"""

import difflib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Literal

from registry.catalog import Catalog
from registry.errors import Conflict, Moved, NotFound, Renamed, Stopped
from registry.hub import push
from registry.hub.client import Head
from registry.hub.exchange import Exchange, digest_of, here
from registry.hub.files import CARD, beside
from registry.hub.pull import Found, card_of, card_there, gallery, look, same, take
from registry.hub.state import Here, Link, Pictures, Pulling
from registry.hub.tags import tag_of
from registry.records import Version

Direction = Literal["both", "push", "pull"]
Keep = Literal["", "ours", "theirs", "both"]
DIFF_LINES, ROUNDS, AT_ONCE = 120, 4, 4
THEIRS = "theirs"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a sync may do."""

    direction: Direction = "both"
    keep: Keep = ""
    delete: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went with an asset. `action`: `unchanged`, `published`, `pulled`, `both`, `conflict`, `ahead`
    and `behind` (the direction, or a dry run, leaves it), `failed`. Differences are from what both held.
    """

    name: str
    repo: str
    action: str
    number: int = 0
    commit: str = ""
    notes: tuple[str, ...] = ()
    ours: str = ""
    theirs: str = ""
    error: Exception | None = None


def sync(
    exchange: Exchange,
    links: Sequence[Link],
    wish: Wish = Wish(),  # it is frozen
) -> Iterator[Outcome]:
    """Syncs assets, a few at once, and tells of each as it is done; one that fails stops no other."""
    with ThreadPoolExecutor(AT_ONCE, "hub-sync") as pool:
        todo = [pool.submit(copy_context().run, _one, exchange, link, wish) for link in links]
        try:
            for work in as_completed(todo):
                yield work.result()
        finally:
            for work in todo:
                work.cancel()


def _one(exchange: Exchange, link: Link, wish: Wish) -> Outcome:
    try:
        with exchange.claims.of(link.name):
            return one(exchange, exchange.links.of(link.name), wish)
    except Stopped:
        raise
    except Renamed as error:
        follow = f"{error}; `atelier hub push {link.name} --repo {error.new} --relink` follows it"
        return Outcome(
            link.name,
            link.repo,
            "failed",
            link.here.number,
            notes=(follow,),
            error=Renamed(follow, new=error.new),
        )
    except Exception as error:  # one that fails stops no other
        return Outcome(link.name, link.repo, "failed", link.here.number, notes=(str(error),), error=error)


def one(exchange: Exchange, link: Link, wish: Wish) -> Outcome:
    """Syncs one asset. Raises RegistryError, and what its door raises."""
    done, notes = set[str](), list[str]()
    if wish.dry_run:
        link = push.recovered(exchange, link)
    else:
        link = push.recover(exchange, link, there=wish.direction != "pull")
    for _ in range(ROUNDS):  # each does one thing, and looks again at what became of it
        state = _look(exchange, link, wish)
        if outcome := _refused(exchange, link, state, wish):
            action = next(iter(done)) if done and outcome.action == "ahead" else outcome.action
            return replace(outcome, action=action, notes=(*notes, *outcome.notes))
        if state.same_already or (state.found and not state.theirs):
            link = _noted(exchange, link, state, wish, notes)
        elif state.theirs:
            link = _resolved(exchange, link, state, wish, notes, done)
        elif state.ours:
            link = _published(exchange, link, state.head.commit, wish, notes)
            done.add("published")
        else:
            break
    action = "both" if len(done) == 2 else next(iter(done), "unchanged")
    return Outcome(link.name, link.repo, action, link.here.number, link.commit, tuple(notes))


@dataclass(frozen=True, slots=True)
class _State:
    """What differs from the link. `found` is what is there, if the head moved; `mine` the newest version."""

    head: Head
    found: Found | None
    mine: Version | None
    edited: bool
    """Whether the content here is another."""
    ours: bool
    """Whether there is something to publish: that, or pictures."""
    theirs: bool
    """Whether there is other content to pull."""
    same_already: bool
    """Whether both changed to the same."""


def _look(exchange: Exchange, link: Link, wish: Wish) -> _State:
    head, mine = _head(exchange, link), exchange.newest(link.name)
    if mine and mine.number < link.here.number:  # what was published is deleted here
        mine = None
    edited = mine is not None and here(mine) != link.here
    ours = ahead(exchange.catalog, link)
    ours = ours or (wish.delete and mine is not None and bool(push.gone(exchange, mine, link)))
    waiting = link.waiting and mine is not None and wish.direction != "push"
    if head.commit == link.commit and not waiting:
        return _State(head, None, mine, edited, ours, theirs=False, same_already=False)
    found = _files(exchange, link, head)
    theirs = any(link.oids.get(path) != oid for path, oid in found.content.items())
    # A configuration that is gone makes other weights of the same file; a card that is gone is only gone.
    theirs = theirs or _config(link, found) in link.oids.keys() - found.content.keys()
    both = theirs and mine is not None and same(exchange, mine, found, link)
    return _State(head, found, mine, edited, ours, theirs=theirs and not both, same_already=both)


def _head(exchange: Exchange, link: Link) -> Head:
    """What is there. Raises RegistryError: NotFound says what to do where that is gone."""
    try:
        return exchange.hub.head(link.repo)
    except Renamed:
        raise
    except NotFound as error:
        again = f"`atelier hub push {link.name} --repo ORG/NAME --relink` publishes it elsewhere"
        raise NotFound(f"{error}. What is here stays; {again}", field="repo") from None


def _config(link: Link, found: Found) -> str:
    """Where PEFT's configuration is, if the weights are still where they were; else ""."""
    return beside(link.file) if link.file == found.entry.path else ""


def ahead(catalog: Catalog, link: Link) -> bool:
    """Whether there is something here that was not published: a version, a card, a picture."""
    newest = next((v for v in catalog.history(link.name) if not v.deleted_at), None)
    if newest is None or newest.number < link.here.number:
        return False
    return here(newest) != link.here or any(p.digest not in link.pictures for p in catalog.previews(newest))


def _files(exchange: Exchange, link: Link, head: Head) -> Found:
    try:
        return look(exchange, link.repo, head.commit, link.file)
    except NotFound as error:
        if error.field != "file":
            raise
        return look(exchange, link.repo, head.commit)  # the file may have another name now


def _refused(exchange: Exchange, link: Link, state: _State, wish: Wish) -> Outcome | None:
    """What ends it here: a conflict, a direction, a dry run."""
    plain = Outcome(link.name, link.repo, "unchanged", link.here.number, state.head.commit)
    if state.theirs and state.mine is None:
        note = f"{link.name}:{link.here.number} was deleted here; what is there is left as it is"
        return replace(plain, action="behind", notes=(note,))
    if state.theirs and state.edited and not wish.keep:
        ours, theirs = _differences(exchange, link, state)
        note = (
            f"{link.name} was changed here and there; choose --keep ours, theirs, or both (theirs becomes a "
            f"version with the alias {THEIRS!r})"
        )
        return replace(plain, action="conflict", notes=(note,), ours=ours, theirs=theirs)
    on_top = state.edited and wish.keep == "ours"
    if state.theirs and not on_top and (wish.direction == "push" or wish.dry_run):
        note = f"{link.repo} has other content at {state.head.commit[:8]}, which is left there"
        return replace(plain, action="behind", notes=(note,))
    if ((state.ours and not state.theirs) or on_top) and not state.same_already and (
        wish.direction == "pull" or wish.dry_run
    ):  # fmt: skip
        note = f"{link.name} has something that {link.repo} has not, which is left here"
        return replace(plain, action="ahead", notes=(note,))
    return plain if wish.dry_run else None


def _pictures(exchange: Exchange, link: Link, found: Found, at: Version, notes: list[str]) -> Pictures:
    """Takes the pictures that are new there; which is which afterwards."""
    mapped = _still(link, found)
    # Those that were looked at before and not taken are known, too.
    left = {path for path, oid in link.oids.items() if found.oids.get(path) == oid} - set(mapped.values())
    known = mapped | {f"left:{path}": path for path in left}
    seen, more = gallery(exchange, at, found, known)
    notes += more
    return {digest: path for digest, path in seen.items() if not digest.startswith("left:")}


def _still(link: Link, found: Found) -> dict[str, str]:
    """The pictures that were there, "" for one that is not any more."""
    return {
        digest: path if path in found.oids and link.oids.get(path) == found.oids[path] else ""
        for digest, path in link.pictures.items()
    }


def _noted(exchange: Exchange, link: Link, state: _State, wish: Wish, notes: list[str]) -> Link:
    """The content is the same; pictures that came are taken."""
    found = state.found
    if found is None:
        raise AssertionError  # the head moved
    pictures: Pictures = _still(link, found)
    taken = state.mine is not None and wish.direction != "push"
    if state.mine and taken:
        pictures = _pictures(exchange, link, found, state.mine, notes)
    fresh = replace(
        link,
        here=here(state.mine) if state.mine and state.same_already else link.here,
        file=found.entry.path,
        commit=found.head.commit,
        oids=found.oids if taken else link.seen(found.oids, found.content),
        pictures=pictures,
    )
    if state.mine and state.same_already:
        fresh = replace(fresh, tags={**link.tags, tag_of(state.mine.number): found.head.commit})
    return exchange.links.keep(fresh, actor=exchange.actor, action="pull" if state.same_already else "")


def _resolved(
    exchange: Exchange, link: Link, state: _State, wish: Wish, notes: list[str], done: set[str]
) -> Link:
    """Takes what is there, or puts ours on top of it."""
    found, mine = state.found, state.mine
    if found is None or mine is None:
        raise AssertionError  # theirs changed, so it was looked at; nothing here was refused
    at = replace(link, file=found.entry.path, commit=found.head.commit, oids=found.oids)
    if state.edited and wish.keep == "ours":
        done.add("published")
        # What is there is what both hold only when ours is on top of it: until then the link stays as it is.
        at = replace(link, file=at.file, pictures=_pictures(exchange, link, found, mine, notes))
        return _published(exchange, at, found.head.commit, wish, notes)
    card = card_of(exchange, found, mine)
    weights = {path: oid for path, oid in found.content.items() if path != CARD}
    known = {path: oid for path, oid in link.oids.items() if path in {*weights, _config(link, found)}}
    both = state.edited and wish.keep == "both"
    as_linked = (mine.number, mine.digest) == (link.here.number, link.here.digest)
    card_only = weights == known and not both and as_linked
    pulling = Pulling(found.head.commit, digest_of(card), found.content, mine.number, card_only, both)
    exchange.links.keep(replace(link, pulling=pulling))
    try:
        if card_only:
            version = exchange.door.set_card(mine, card, exchange.actor, newest=True)
        else:
            alias = THEIRS if both else ""
            version = take(exchange, link.name, found, card, alias=alias, before=mine, seen=mine)
    except Moved:
        again = f"{link.name} was changed here meanwhile, so both sides were looked at again"
        link = exchange.links.keep(replace(link, pulling=None))
        if again in notes:  # and again: whoever works there is not waited for
            raise
        notes.append(again)
        return link
    done.add("pulled")
    pictures = _pictures(exchange, link, found, version, notes)
    if not both:
        at = replace(at, here=here(exchange.catalog.resolve(version.ref)), pictures=pictures)
        return exchange.links.keep(at, actor=exchange.actor, action="pull")
    at = exchange.links.keep(replace(at, pictures=pictures), actor=exchange.actor, action="pull")
    if wish.direction == "pull":
        return at
    done.add("published")  # ours, each version of it, and theirs on top again
    return _published(exchange, at, found.head.commit, wish, notes)


def _published(exchange: Exchange, link: Link, commit: str, wish: Wish, notes: list[str]) -> Link:
    """Publishes every version newer than the linked one, oldest first, below them the linked one's card if it
    is another; or the linked one's card, pictures.
    """
    live = [v for v in exchange.catalog.history(link.name) if not v.deleted_at]
    newer = sorted((v for v in live if v.number > link.here.number), key=lambda v: v.number)
    linked = [v for v in live if v.number == link.here.number and (not newer or here(v) != link.here)]
    for version in (*linked, *newer):
        tree = exchange.hub.tree(link.repo, commit)
        sent = push.send(exchange, version, link, commit, tree, delete=wish.delete)
        notes += sent.notes
        commit, link = sent.commit, exchange.links.of(link.name)
    return link


def _differences(exchange: Exchange, link: Link, state: _State) -> tuple[str, str]:
    """Ours and theirs, each against what both held."""
    found, mine = state.found, state.mine
    if found is None or mine is None:
        raise AssertionError  # a conflict has both
    card = card_there(exchange, found, mine)
    base = exchange.card(link.name, link.here.card_digest)
    file = found.entry.path
    ours = _difference(link.here, here(mine).digest, base, exchange.catalog.card(mine))
    was, now = link.oids.get(link.file, ""), found.oids.get(file, "")
    theirs = [f"weights {was[:19]} -> {now[:19]}"] if was != now else []
    return ours, "\n".join([*theirs, *_lines(base, card)])


def _difference(was: Here, digest: str, base: bytes, card: bytes) -> str:
    weights = [f"weights {was.digest[:19]} -> {digest[:19]}"] if was.digest != digest else []
    return "\n".join([*weights, *_lines(base, card)])


def _lines(before: bytes, after: bytes) -> list[str]:
    old, new = (text.decode(errors="replace").splitlines() for text in (before, after))
    lines = list(difflib.unified_diff(old, new, "card", "card", lineterm="", n=1))
    return lines[:DIFF_LINES] + (["…"] if len(lines) > DIFF_LINES else [])


def linked(exchange: Exchange, names: Sequence[str]) -> list[Link]:
    """The links of these assets, or of all that are of this Hub. Raises NotFound, Conflict."""
    if not names:
        return [link for link in exchange.links.all() if link.endpoint == exchange.endpoint]
    found = [exchange.links.of(name) for name in dict.fromkeys(names)]
    for link in found:
        if link.endpoint != exchange.endpoint:
            raise Conflict(
                f"{link.name} is published on {link.endpoint}, not on {exchange.endpoint}; say --hub"
            )
    return found
