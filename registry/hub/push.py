"""Publishing a version: one commit with weights, card and pictures, and a tag for its number.

In order: everything is worked out, and refused if it has to be, before anything changes anywhere (a dry run
ends there); the card as it will be shown becomes the version's card here; what is about to be pushed is
written down; the commit is made on top of what was last seen there, or not at all; the link is written; the
commit is tagged. A crash anywhere leaves something that the next push or sync reads back and goes on from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from registry.errors import Conflict, Denied, InvalidName, NotFound, Renamed
from registry.hub import files, tags
from registry.hub.client import Entry, Head, new_push_id, oid
from registry.hub.endpoint import check_repo
from registry.hub.exchange import Exchange, Step, check_kind, digest_of, here
from registry.hub.plan import Plan, Shot, gone, planned
from registry.hub.state import Link, Pulling, Pushing
from registry.records import Version

_STAYS = "the tag {tag} names another commit of {repo}, with other weights, and stays there"
__all__ = ["Published", "gone", "push", "recover", "recovered", "send"]


@dataclass(frozen=True, slots=True)
class Published:
    """How a push went: the plan, the commit (in a dry run ""), whether it was made now, what to tell, and the
    version's tag: "" where that is another commit's.
    """

    plan: Plan
    commit: str
    made: bool
    notes: tuple[str, ...]
    tag: str


def push(
    exchange: Exchange,
    ref: str,
    *,
    repo: str = "",
    private: bool = False,
    strip: bool | None = None,
    dry_run: bool = False,
    relink: bool = False,
    shot: Shot | None = None,
) -> Published:
    """Publishes a version, with one more preview if there is a `shot`. A dry run refuses what a push refuses,
    and changes nothing. Raises RegistryError: Conflict when the repository was changed since it was last
    seen, holds something else, has a newer version already, or is not the asset's (unless `relink`).
    """
    version = exchange.catalog.resolve(ref)
    check_kind(version)
    with exchange.claims.of(version.name):
        link = _linked(exchange, version, repo, strip, relink=relink)
        if not dry_run and link.commit and exchange.links.of(link.name).repo != link.repo:
            exchange.links.keep(link)  # it is the same repository by its new name, whatever comes of this
        link = recovered(exchange, link) if dry_run else recover(exchange, link)
        if version.number < link.here.number:
            raise Conflict(
                f"{version.name}:{link.here.number} is published at {link.repo} already, and {version.ref} "
                "would take its place at the head",
                field="ref",
            )
        head = _head(exchange, link)
        if head and private and not head.private:
            raise Conflict(
                f"{link.repo} is there and public, and --private makes only a new repository private; make "
                "it private in its settings, or leave --private out",
                field="private",
            )
        tree = exchange.hub.tree(link.repo, head.commit) if head else {}
        _check_unchanged(exchange, link, head, tree)
        with planned(exchange, version, link, tree, shot=shot) as plan:
            if dry_run:
                tag, told = (plan.tag, ()) if not head else _tagged(exchange, plan, link)
                return Published(plan, "", made=False, notes=(*plan.notes, *told), tag=tag)
            if not head:
                exchange.hub.create(link.repo, private=private)
                head = exchange.hub.head(link.repo)
                if private and not head.private:  # somebody else has made it meanwhile, or the Hub makes none
                    raise Conflict(
                        f"{link.repo} is there now and public, so nothing was published; make it private in "
                        "its settings, or leave --private out",
                        field="private",
                    )
                tree = exchange.hub.tree(link.repo, head.commit)
                _check_unchanged(exchange, link, head, tree)
            if shot:
                exchange.door.add_preview(version, shot.png, shot.caption, exchange.actor)
            return _sent(exchange, plan, link, head.commit, tree)


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
        return _sent(exchange, plan, link, parent, tree)


def _sent(exchange: Exchange, plan: Plan, link: Link, parent: str, tree: Mapping[str, Entry]) -> Published:
    version = plan.version
    if digest_of(plan.card) != version.card_digest:
        version = exchange.door.set_card(version, plan.card, exchange.actor)
    pushing = Pushing(new_push_id(), here(version), plan.pictures, parent)
    link = exchange.links.keep(replace(link, pushing=pushing))
    add, commit = plan.add, parent
    if made := bool(add or plan.delete):
        moving = exchange.moving(version.name, link.repo, "uploading", plan.total)
        title = f"{version.name} version {version.number}"
        done = moving.commit(
            link.repo, add=add, delete=plan.delete, title=title, parent=parent, push_id=pushing.id
        )
        commit, tree = done.commit, done.tree
        exchange.told(Step(version.name, link.repo, "uploading", plan.total, plan.total))
    link = _kept(exchange, _settled(link, pushing, commit, tree))
    link, elsewhere = tags.made(exchange, link, tree)
    told = [_STAYS.format(tag=tag, repo=link.repo) for tag in elsewhere]
    tag = "" if plan.tag in elsewhere else plan.tag
    return Published(plan, commit, made=made, notes=(*plan.notes, *told), tag=tag)


def _tagged(exchange: Exchange, plan: Plan, link: Link) -> tuple[str, tuple[str, ...]]:
    """The tag that a push would leave at its commit, "" where that is another's, and what to tell."""
    at = exchange.hub.tags(link.repo).get(plan.tag)
    there = exchange.hub.tree(link.repo, at).get(link.file) if at else None
    if not at or (there and there.oid == oid(plan.sources[link.file], large=there.oid.startswith("sha256:"))):
        return plan.tag, ()
    return "", (_STAYS.format(tag=plan.tag, repo=link.repo),)


def recover(exchange: Exchange, link: Link, *, there: bool = True) -> Link:
    """What became of a push or a pull that nobody heard the end of. Unless `there`, nothing is written on the
    Hub, and tags that are owed stay so. Raises RegistryError.
    """
    if link.pulling or link.pushing:
        known = recovered(exchange, link)
        link = _kept(exchange, known) if known.tags != link.tags else exchange.links.keep(known)
    try:
        return tags.made(exchange, link)[0] if there else link
    except Denied:  # who may only read has nothing else to do there
        return link


def recovered(exchange: Exchange, link: Link) -> Link:
    """The same, written down nowhere. Raises RegistryError."""
    if pulling := link.pulling:
        newest = exchange.newest(link.name)
        link = replace(link, pulling=None)
        if newest and _finished(pulling, link, newest):
            # The commit stays the one before: what else came with this one has to be looked at still.
            now = replace(here(newest), card_digest=pulling.card_digest)  # another one is edited here since
            now = link.here if pulling.both else now  # what is between the two has to be published still
            link = replace(link, here=now, oids={**link.oids, **pulling.oids})
    if not (pushing := link.pushing):
        return link
    try:
        commit = exchange.hub.made(link.repo, pushing.id, pushing.parent or link.commit)
    except NotFound:
        commit = ""
    if not commit:
        return replace(link, pushing=None)
    return _settled(link, pushing, commit, exchange.hub.tree(link.repo, commit))


def _finished(pulling: Pulling, link: Link, newest: Version) -> bool:
    """Whether a pull has made what it was to make: the newest version, or that one's card."""
    if pulling.card_only:
        return link.here.card_digest != pulling.card_digest == newest.card_digest
    commit = newest.facts.get("origin", {}).get("commit", "")
    return newest.number > pulling.number and bool(commit == pulling.commit)


def _settled(link: Link, pushing: Pushing, commit: str, tree: Mapping[str, Entry]) -> Link:
    """The link once both sides hold what was pushed; the commit's tag is owed."""
    found, sent = files.sort(tree), set(pushing.pictures.values())
    return replace(
        link,
        here=pushing.here,
        commit=commit,
        oids=link.seen(found.oids(link.file), {*found.content(link.file), *sent}),
        pictures=pushing.pictures,
        pushing=None,
        tags={**link.tags, tags.tag_of(pushing.here.number): commit},
    )


def _kept(exchange: Exchange, link: Link) -> Link:
    return exchange.links.keep(link, actor=exchange.actor, action="publish")


def _head(exchange: Exchange, link: Link) -> Head | None:
    """What is there; None where a repository has yet to be made. One that is gone is not made again: it may
    have been private. Raises RegistryError.
    """
    try:
        return exchange.hub.head(link.repo)
    except Renamed as error:
        follow = f"`atelier hub push {link.name} --repo {error.new}"
        follow += " --relink` follows it" if link.commit else "` publishes there"
        raise Renamed(f"{error}. {follow}", new=error.new, field="repo") from None
    except NotFound as error:
        if not link.commit:
            return None
        raise NotFound(
            f"{error}. {link.name}:{link.here.number} was published there, and a repository that is gone is "
            "not made again: publish it elsewhere with --repo ORG/NAME --relink",
            field="repo",
        ) from None


def _linked(exchange: Exchange, version: Version, repo: str, strip: bool | None, *, relink: bool) -> Link:
    """The asset's link with the repository, a new one if it has none there yet. Raises RegistryError."""
    known = exchange.links.find(version.name)
    if not repo and not known:
        raise InvalidName(f"where to? {version.name} has no repository yet; --repo ORG/NAME", field="repo")
    strip = strip if strip is not None else bool(known and known.strip)
    if known and repo in {"", known.repo} and known.endpoint == exchange.endpoint:
        return replace(known, strip=strip)
    if not repo:
        raise InvalidName(
            f"{version.name} is published on {known.endpoint if known else ''}, not on {exchange.endpoint}; "
            "say --repo ORG/NAME --relink to publish it here from now on",
            field="repo",
        )
    check_repo(repo)
    if others := [n for n in exchange.links.users(exchange.endpoint, repo) if n != version.name]:
        raise Conflict(f"{repo} is the repository of {others[0]}; choose another --repo", field="repo")
    if known and (known.commit or known.pushing):
        if not relink:
            raise Conflict(
                f"{version.name} is published at {known.repo} on {known.endpoint}, and syncs with that; "
                f"--relink leaves that as it is and publishes at {repo} from now on",
                field="repo",
            )
        if known.endpoint == exchange.endpoint and _renamed(exchange, known.repo) == repo:
            return replace(known, repo=repo, strip=strip)
    return Link(version.name, exchange.endpoint, repo, files.name(version), strip=strip)


def _renamed(exchange: Exchange, repo: str) -> str:
    """The name that a repository has now, "" when it has its own or is gone."""
    try:
        exchange.hub.head(repo)
    except Renamed as error:
        return error.new
    except NotFound:
        pass
    return ""


def _check_unchanged(exchange: Exchange, link: Link, head: Head | None, tree: Mapping[str, Entry]) -> None:
    found = files.sort(tree)
    if head is None or link.commit == head.commit:
        return
    if link.commit:
        if found.oids(link.file) != dict(link.oids):
            raise Conflict(
                f"{link.repo} was changed on the Hub since it was last seen; `atelier hub sync {link.name}` "
                "shows how, and brings both together",
                field="repo",
            )
    elif found.weights or found.card:
        take = f"take it first: atelier hub pull {link.repo} --name {link.name}"
        known = exchange.links.find(link.name)
        if known and (known.repo, known.endpoint) != (link.repo, link.endpoint):  # which a pull would refuse
            take = "choose a --repo that is empty, or not there yet"
        raise Conflict(f"{link.repo} holds something already; {take}", field="repo")
