"""Every version that is published has its tag, at a commit that holds it, whatever happened on the way."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from registry.errors import RegistryError
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from registry.hub.tags import made
from tests.hub.conftest import Open, Studio, impatient
from tests.hub.repos import File, Repo
from tests.hub.standin import StandIn, Trouble
from tests.hub.test_round_trip import CARD

FILE = WEIGHTS["lora"]


def digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def theirs(standin: StandIn, studio: Studio, card: str = "") -> str:
    """Somebody else commits weights; their digest."""
    path = studio.weights()
    files: dict[str, File | None] = {FILE: standin.storage.put(path.read_bytes())}
    if card:
        files["README.md"] = File.regular(card.encode())
    standin.repo("ann/milo").write(files, "theirs")
    return digest(path)


def held(repo: Repo) -> dict[str, str]:
    """The weights at every tag."""
    return {tag: f"sha256:{repo.at(tag).files[FILE].sha256}" for tag in repo.tags}  # type: ignore[union-attr]


def versions(studio: Studio) -> dict[str, str]:
    return {f"v{version.number}": version.digest for version in studio.catalog.history("milo")}


@pytest.fixture
def milo(standin: StandIn, studio: Studio) -> Studio:
    """A studio that has published milo."""
    studio.check_in("milo", card=CARD)
    push(studio.exchange, "milo", repo="ann/milo")
    return studio


def test_a_pulled_version_gets_its_tag_with_the_next_one(standin: StandIn, milo: Studio) -> None:
    repo = standin.repo("ann/milo")
    for _ in range(2):
        theirs(standin, milo)
        commit = repo.head.oid
        assert [outcome.action for outcome in milo.sync()] == ["pulled"]
    assert list(repo.tags) == ["v1"]  # who only pulls may have no right to write
    milo.check_in("milo")
    milo.sync()
    assert held(repo) == versions(milo)
    assert repo.tags["v3"] == commit
    assert repo.tags["v4"] == repo.head.oid


def test_a_new_card_of_a_pulled_version_is_tagged_as_that(standin: StandIn, milo: Studio) -> None:
    repo = standin.repo("ann/milo")
    theirs(standin, milo)
    milo.sync()
    milo.set_card("milo", b"---\nlicense: mit\n---\n# Ours\n")
    assert push(milo.exchange, "milo").tag == "v2"
    assert held(repo) == versions(milo)
    assert repo.tags["v2"] == repo.head.oid
    tagged = dict(repo.tags)
    milo.set_card("milo", b"---\nlicense: mit\n---\n# Ours again\n")
    done = push(milo.exchange, "milo")  # and another card moves no tag
    assert (done.made, done.tag, done.notes) == (True, "v2", ())
    assert repo.tags == tagged


def test_a_version_that_was_pulled_and_is_pushed_as_it_is_gets_its_tag(
    standin: StandIn, milo: Studio
) -> None:
    theirs(standin, milo)
    milo.sync()
    milo.set_card("milo", milo.card("milo:1"))
    milo.sync()
    for _ in range(2):
        push(milo.exchange, "milo")
        assert held(standin.repo("ann/milo")) == versions(milo)


def test_a_number_that_is_another_studios_is_told_of_and_names_no_tag(
    standin: StandIn, milo: Studio, studios: Open
) -> None:
    milo.check_in("milo")
    push(milo.exchange, "milo")
    repo, other = standin.repo("ann/milo"), studios()
    assert pull(other.exchange, "ann/milo").version.number == 1
    other.check_in("milo")  # their second is not the second there
    tags = dict(repo.tags)
    done = push(other.exchange, "milo")
    assert (done.made, done.tag) == (True, "")
    assert "the tag v2 names another commit of ann/milo, with other weights, and stays there" in done.notes
    assert repo.tags == tags
    milo.sync()
    milo.check_in("milo")
    milo.sync()  # here theirs is the third, and that is what its commit is called
    assert held(repo) == versions(milo)
    assert len(repo.tags) == 4


def test_keeping_both_publishes_every_version_of_ours_below_theirs(standin: StandIn, milo: Studio) -> None:
    for _ in range(3):
        milo.check_in("milo", card=b"---\nlicense: mit\n---\n# Ours\n")
    other = theirs(standin, milo, card="# Theirs")
    (outcome,) = milo.sync(keep="both")
    assert (outcome.action, outcome.number) == ("both", 5)
    repo = standin.repo("ann/milo")
    assert held(repo) == versions(milo)
    assert versions(milo)["v5"] == other
    assert [c.title for c in repo.commits[2:]] == ["theirs", *(f"milo version {n}" for n in (2, 3, 4, 5))]
    assert [outcome.action for outcome in milo.sync()] == ["unchanged"]


@contextmanager
def dying(standin: StandIn, after: int, trouble: Trouble) -> Iterator[None]:
    """From some request on nobody answers any more."""
    left = [after]

    def dead(request: str) -> Trouble | None:
        left[0] -= 1
        return trouble if left[0] == -1 else Trouble.CUT_BEFORE if left[0] < -1 else None

    standin.dead = dead
    yield
    standin.dead = None


def test_keeping_both_is_finished_after_a_crash_at_any_request(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    hub = impatient(standin)
    hub._pauses = ()
    crashes = [(n, t) for n in range(40) for t in (Trouble.CUT_BEFORE, Trouble.CUT_AFTER)]
    for after, trouble in crashes:
        standin.repos.clear()
        side = studios(hub)
        side.check_in("milo", card=CARD)
        push(side.exchange, "milo", repo="ann/milo")
        for _ in range(2):
            side.check_in("milo", card=CARD)
        theirs(standin, side)
        with dying(standin, after, trouble):
            (outcome,) = side.sync(keep="both")
        finished = outcome.action == "both"
        (outcome,) = side.sync(keep="both")
        assert held(standin.repo("ann/milo")) == versions(side), (after, trouble)
        assert [o.action for o in side.sync()] == ["unchanged"]
        if finished:
            return
    pytest.fail("it needs more requests than were cut")


def test_a_tag_that_was_not_made_is_made_by_the_next_sync(standin: StandIn, milo: Studio) -> None:
    milo.check_in("milo")
    standin.trouble("POST .*/tag/", Trouble.CUT_BEFORE, times=9)
    (outcome,) = milo.sync()
    assert outcome.action == "failed"
    standin._planned.clear()
    assert list(standin.repo("ann/milo").tags) == ["v1"]
    assert [o.action for o in milo.sync()] == ["unchanged"]
    assert held(standin.repo("ann/milo")) == versions(milo)
    with standin.counted() as seen:
        milo.sync()
    assert len(seen) == 1


def test_a_pull_only_sync_writes_nothing_there(standin: StandIn, milo: Studio) -> None:
    repo = standin.repo("ann/milo")
    milo.check_in("milo")
    gone: list[str] = []

    def cut(request: str) -> Trouble | None:  # ours is committed, and nobody here learns it
        first = "/commit/" in request and not gone
        gone.extend([request] if first else [])
        return Trouble.CUT_AFTER if first else Trouble.CUT_BEFORE if gone else None

    standin.dead = cut
    milo.sync()
    standin.dead = None
    mine = repo.head.oid
    theirs(standin, milo)
    with standin.counted() as seen:
        (outcome,) = milo.sync(direction="pull")
    assert (outcome.action, outcome.number) == ("pulled", 3)
    assert {request.method for request in seen} == {"GET"}
    assert list(repo.tags) == ["v1"]
    milo.sync()  # this one may
    assert repo.tags["v2"] == mine
    assert milo.catalog.resolve("milo").number == 3


@pytest.mark.parametrize("keep", ["", "ours", "theirs", "both"])
def test_a_pull_only_sync_of_a_conflict_writes_nothing_there(
    standin: StandIn, milo: Studio, keep: str
) -> None:
    repo = standin.repo("ann/milo")
    mine = [milo.check_in("milo").digest for _ in range(2)]
    theirs(standin, milo)
    with standin.counted() as seen:
        (outcome,) = milo.sync(direction="pull", keep=keep)
    assert {request.method for request in seen} == {"GET"}
    assert outcome.action == {"": "conflict", "ours": "ahead"}.get(keep, "pulled")
    if keep == "both":  # ours waits here for a sync that may publish it
        milo.sync()
        assert held(repo) == versions(milo)
        assert [version.digest for version in milo.catalog.history("milo")][1:3] == mine[::-1]


def test_who_may_not_tag_may_pull_still(standin: StandIn, milo: Studio, studios: Open) -> None:
    milo.check_in("milo")
    standin.trouble("POST .*/tag/", Trouble.CUT_BEFORE, times=9)
    milo.sync()  # the commit is made, its tag is owed
    standin._planned.clear()
    reader = Studio(
        milo.catalog,
        type(milo.exchange)(milo.catalog, impatient(standin, ""), milo.exchange.door),
        milo.folder,
    )
    other = theirs(standin, milo)
    (outcome,) = reader.sync()
    assert (outcome.action, milo.catalog.resolve("milo").digest) == ("pulled", other)
    milo.sync()
    assert held(standin.repo("ann/milo")).items() <= versions(milo).items()
    assert "v2" in standin.repo("ann/milo").tags


def test_a_history_that_was_squashed_stops_no_push(standin: StandIn, milo: Studio) -> None:
    repo = standin.repo("ann/milo")
    theirs(standin, milo)
    milo.sync()
    milo.check_in("milo")
    standin.trouble("POST .*/tag/", Trouble.CUT_BEFORE, times=9)
    milo.sync()  # v3 is owed, and v2 that was pulled
    standin._planned.clear()
    repo.write({}, "squashed")
    repo.commits[:] = repo.commits[-1:]
    repo.tags.clear()
    assert [outcome.action for outcome in milo.sync()] == ["unchanged"]
    milo.check_in("milo")
    assert push(milo.exchange, "milo").tag == "v4"
    assert repo.tags == {"v4": repo.head.oid}


def test_tags_that_were_owed_for_long_are_each_compared_with_their_own_commit(
    standin: StandIn, milo: Studio
) -> None:
    repo = standin.repo("ann/milo")
    for _ in range(2):
        milo.check_in("milo")
        milo.sync()
    _, _, second, third = repo.commits
    between = repo.write({"note.txt": File.regular(b"by hand")}, "theirs")
    repo.tags = {"v2": third.oid, "v3": between.oid}  # another's weights, and the same
    link = replace(milo.exchange.links.of("milo"), tags={"v2": second.oid, "v3": third.oid})
    tree = milo.exchange.hub.tree("ann/milo", third.oid)
    after, elsewhere = made(milo.exchange, link, tree)
    assert (dict(after.tags), elsewhere) == ({}, ["v2"])
    assert repo.tags == {"v2": third.oid, "v3": between.oid}


def test_the_same_change_on_both_sides_has_its_tag(standin: StandIn, milo: Studio) -> None:
    path = milo.weights()
    standin.repo("ann/milo").write({FILE: standin.storage.put(path.read_bytes())}, "theirs")
    milo.check_in("milo", path=path, card=milo.card("milo"))
    assert [outcome.action for outcome in milo.sync()] == ["unchanged"]
    milo.sync()
    assert held(standin.repo("ann/milo")) == versions(milo)


def test_a_link_of_before_tags_were_owed_is_read(milo: Studio) -> None:
    pushing = {"id": "x", "here": {"number": 1, "digest": "", "card_digest": ""}, "pictures": {}}
    with milo.catalog.database.write():
        milo.catalog.database.tables.execute(
            "update hub_links set under_way = ?", json.dumps({"push": pushing, "pull": None})
        )
    link = milo.exchange.links.of("milo")
    assert link.pushing is not None
    assert (link.pushing.parent, link.tags) == ("", {})
    with pytest.raises(RegistryError):
        milo.exchange.links.of("nobody")
