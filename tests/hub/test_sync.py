"""Two sides that both change lose nothing, and come together."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.errors import NotFound
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Open, Studio
from tests.hub.repos import File
from tests.hub.standin import StandIn
from tests.hub.test_round_trip import png, show

WEIGHTS_FILE = WEIGHTS["lora"]


def theirs(standin: StandIn, studio: Studio, *, card: str = "", weights: bool = False) -> Path:
    """Somebody else commits a card, weights, or both; the file."""
    path = studio.weights()
    files: dict[str, File | None] = {}
    if card:
        files["README.md"] = File.regular(card.encode())
    if weights:
        files[WEIGHTS_FILE] = standin.storage.put(path.read_bytes())
    standin.repo("ann/milo").write(files, "theirs")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def milo(standin: StandIn, studio: Studio) -> Studio:
    """A studio that has published milo."""
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n")
    push(studio.exchange, "milo", repo="ann/milo")
    return studio


def same_on_both_sides(standin: StandIn, studio: Studio) -> None:
    files = standin.repo("ann/milo").head.files
    version = studio.catalog.resolve("milo")
    assert studio.catalog.card(version) == files["README.md"].data
    assert version.digest == f"sha256:{files[WEIGHTS_FILE].sha256}"
    (outcome,) = studio.sync()
    assert outcome.action == "unchanged"


def test_what_is_unchanged_costs_one_request_each(standin: StandIn, milo: Studio) -> None:
    milo.check_in("luna")
    push(milo.exchange, "luna", repo="ann/luna")
    with standin.counted() as seen:
        assert [outcome.action for outcome in milo.sync()] == ["unchanged", "unchanged"]
    assert sorted(request.path for request in seen) == [
        f"/api/models/ann/{name}/revision/main" for name in ("luna", "milo")
    ]


def test_new_versions_here_are_published_each_with_its_tag(standin: StandIn, milo: Studio) -> None:
    milo.check_in("milo")
    milo.check_in("milo")
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.number) == ("published", 3)
    repo = standin.repo("ann/milo")
    assert [c.title for c in repo.commits] == ["initial", *(f"milo version {n}" for n in (1, 2, 3))]
    assert list(repo.tags) == ["v1", "v2", "v3"]
    same_on_both_sides(standin, milo)


def test_other_weights_there_are_a_new_version_and_another_card_is_a_card(
    standin: StandIn, milo: Studio
) -> None:
    theirs(standin, milo, card="# Edited there")
    (outcome,) = milo.sync("milo")
    assert (outcome.action, outcome.number) == ("pulled", 1)
    assert milo.card("milo:1") == b"# Edited there"
    path = theirs(standin, milo, weights=True)
    (outcome,) = milo.sync("milo")
    assert (outcome.action, outcome.number) == ("pulled", 2)
    assert milo.catalog.resolve("milo").digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert milo.card("milo:2") == b"# Edited there"
    same_on_both_sides(standin, milo)


def test_a_hub_that_goes_back_to_earlier_bytes_makes_a_new_version_of_them(
    standin: StandIn, milo: Studio
) -> None:
    repo = standin.repo("ann/milo")
    first = repo.head.files
    milo.check_in("milo")
    milo.sync()
    repo.write({path: first[path] for path in ("README.md", WEIGHTS_FILE)}, "back")
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.number) == ("pulled", 3)
    assert milo.catalog.resolve("milo:3").digest == milo.catalog.resolve("milo:1").digest
    same_on_both_sides(standin, milo)


def test_changes_on_both_sides_are_a_conflict_shown_with_both_differences(
    standin: StandIn, milo: Studio
) -> None:
    base = milo.card("milo").decode()
    milo.set_card("milo", base.replace("# Milo", "# Ours").encode())
    theirs(standin, milo, card=base.replace("# Milo", "# Theirs"), weights=True)
    commits = len(standin.repo("ann/milo").commits)
    for _ in range(2):
        (outcome,) = milo.sync()
        assert outcome.action == "conflict"
        assert "milo was changed here and there; choose --keep ours, theirs, or both" in outcome.notes[0]
        assert "-# Milo\n+# Ours" in outcome.ours
        assert "weights" not in outcome.ours
        assert "-# Milo\n+# Theirs" in outcome.theirs
        assert outcome.theirs.startswith("weights sha256:")
    assert len(standin.repo("ann/milo").commits) == commits
    assert b"# Ours" in milo.card("milo")


@pytest.mark.parametrize("keep", ["ours", "theirs", "both"])
def test_a_conflict_is_resolved_and_nothing_is_lost(standin: StandIn, milo: Studio, keep: str) -> None:
    mine = milo.check_in("milo", card=b"---\nlicense: mit\n---\n# Ours\n").digest
    path = theirs(standin, milo, card="# Theirs", weights=True)
    other = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    (outcome,) = milo.sync(keep=keep)
    assert outcome.action == {"ours": "published", "theirs": "pulled", "both": "both"}[keep]
    same_on_both_sides(standin, milo)
    repo = standin.repo("ann/milo")
    assert [version.digest for version in milo.catalog.history("milo")][:2] == (
        [mine, milo.catalog.resolve("milo:1").digest] if keep == "ours" else [other, mine]
    )
    held_there = {commit.files[WEIGHTS_FILE].sha256 for commit in repo.commits[1:]}
    assert other[7:] in held_there
    if keep != "theirs":
        assert mine[7:] in held_there
        assert repo.at("v2").files[WEIGHTS_FILE].sha256 == mine[7:]
    if keep == "both":
        assert milo.catalog.resolve("milo@theirs").digest == other
        assert repo.head.files[WEIGHTS_FILE].sha256 == other[7:]


@pytest.mark.parametrize("keep", ["ours", "theirs", "both"])
def test_a_conflict_of_cards_is_resolved_and_every_card_is_kept(
    standin: StandIn, milo: Studio, keep: str
) -> None:
    milo.set_card("milo", b"---\nlicense: mit\n---\n# Ours\n")
    theirs(standin, milo, card="# Theirs")
    milo.sync(keep=keep)
    same_on_both_sides(standin, milo)
    cards = [r.card for v in milo.catalog.history("milo") for r in milo.catalog.card_revisions(v)]
    there = [commit.files["README.md"].data for commit in standin.repo("ann/milo").commits[1:]]
    assert b"# Theirs" in there
    assert any(b"# Ours" in card for card in cards)
    assert keep == "ours" or b"# Theirs" in [card[:8] for card in cards]


def meanwhile(standin: StandIn, request: str, work: Callable[[], object]) -> None:
    """Does something here while the first request that fits is under way."""

    def asked(came: str) -> None:
        if re.match(request, came):
            standin.dead = None
            work()

    standin.dead = asked


@pytest.mark.parametrize("keep", ["", "theirs", "both"])
def test_what_is_checked_in_while_theirs_downloads_is_not_buried(
    standin: StandIn, milo: Studio, keep: str
) -> None:
    path = theirs(standin, milo, weights=True)
    other = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    meanwhile(standin, r"GET .*/resolve/.*safetensors", lambda: milo.check_in("milo", card=b"# Ours"))
    (outcome,) = milo.sync(keep=keep)
    digests = [version.digest for version in milo.catalog.history("milo")]
    mine = milo.catalog.resolve("milo:2").digest
    assert (mine == other, digests[1:] if keep else digests) == (
        False, [mine, milo.catalog.resolve("milo:1").digest],
    )  # fmt: skip
    assert outcome.notes[0] == "milo was changed here meanwhile, so both sides were looked at again"
    assert outcome.action == {"": "conflict", "theirs": "pulled", "both": "both"}[keep]
    (outcome,) = milo.sync(keep="ours")
    assert outcome.action == ("unchanged" if keep else "published")
    same_on_both_sides(standin, milo)


@pytest.mark.parametrize("what", ["version", "card"])
def test_what_is_changed_here_while_their_card_comes_is_a_conflict(
    standin: StandIn, milo: Studio, what: str
) -> None:
    theirs(standin, milo, card="# Theirs")
    before = milo.card("milo")
    ours = milo.check_in if what == "version" else milo.set_card
    meanwhile(standin, r"GET .*/resolve/.*README", lambda: ours("milo", card=b"# Ours"))
    (outcome,) = milo.sync()
    assert outcome.action == "conflict"
    assert "+# Ours" in outcome.ours
    assert "+# Theirs" in outcome.theirs
    assert milo.card("milo") == b"# Ours"
    assert milo.card("milo:1") == (before if what == "version" else b"# Ours")


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_keeping_both_publishes_every_version_of_ours_below_theirs(
    standin: StandIn, milo: Studio, first: str
) -> None:
    repo, there = standin.repo("ann/milo"), list[Path]()

    def mine() -> None:
        milo.set_card("milo", b"---\nlicense: mit\n---\n# Ours 1\n")
        for number in (2, 3):
            milo.check_in("milo", card=b"---\nlicense: mit\n---\n# Ours %d\n" % number)
            show(milo, "milo", ("red", "blue")[number - 2])

    def others() -> None:
        there.extend(theirs(standin, milo, card=f"# Theirs {n}", weights=True) for n in (1, 2))

    for edit in (mine, others) if first == "ours" else (others, mine):
        edit()
    lost = [sha256(path) for path in there]
    before = len(repo.commits)
    (outcome,) = milo.sync(keep="both")
    assert (outcome.action, outcome.number) == ("both", 4)
    same_on_both_sides(standin, milo)
    history = milo.catalog.history("milo")
    assert [version.number for version in history] == [4, 3, 2, 1]
    assert (history[0].digest[7:], b"# Theirs 2" in milo.card("milo")) == (lost[1], True)
    assert milo.catalog.resolve("milo@theirs").number == 4
    above = repo.commits[before:]
    assert [commit.title for commit in above] == [f"milo version {n}" for n in (1, 2, 3, 4)]
    for number in (2, 3, 4):  # each with its weights, its card and its tag
        commit, version = repo.at(f"v{number}"), milo.catalog.resolve(f"milo:{number}")
        assert (commit, f"sha256:{commit.files[WEIGHTS_FILE].sha256}") == (above[number - 1], version.digest)
        assert commit.files["README.md"].data == milo.catalog.card(version)
    assert b"# Ours 1" in above[0].files["README.md"].data
    assert [b"# Ours %d" % n in milo.card(f"milo:{n}") for n in (2, 3)] == [True, True]
    assert lost == [commit.files[WEIGHTS_FILE].sha256 for commit in repo.commits[before - 2 : before]]


@pytest.mark.parametrize("direction", ["pull", "both"])
def test_keeping_both_while_only_pulling_publishes_ours_with_the_next_sync(
    standin: StandIn, milo: Studio, direction: str
) -> None:
    mine = [milo.check_in("milo").digest for _ in range(2)]
    theirs(standin, milo, card="# Theirs", weights=True)
    commits = len(standin.repo("ann/milo").commits)
    (outcome,) = milo.sync(keep="both", direction="pull")
    assert (outcome.action, milo.catalog.resolve("milo@theirs").number) == ("pulled", 4)
    assert len(standin.repo("ann/milo").commits) == commits
    milo.sync(direction=direction)
    milo.sync()
    same_on_both_sides(standin, milo)
    assert [f"sha256:{c.files[WEIGHTS_FILE].sha256}" for c in standin.repo("ann/milo").commits[commits:]][
        :2
    ] == mine


def test_the_same_change_on_both_sides_is_none(standin: StandIn, milo: Studio) -> None:
    path = theirs(standin, milo, weights=True)
    milo.check_in("milo", path=path, card=milo.card("milo"))
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.number) == ("unchanged", 2)
    same_on_both_sides(standin, milo)


def test_pictures_are_added_on_both_sides_and_gone_on_neither(standin: StandIn, milo: Studio) -> None:
    red = show(milo, "milo", "red")
    standin.repo("ann/milo").write({"blue.png": File.regular(png("blue"))}, "a picture")
    milo.sync()
    pictures = [p.digest for p in milo.catalog.previews(milo.catalog.resolve("milo"))]
    assert (len(pictures), pictures[0]) == (2, red)
    files = standin.repo("ann/milo").head.files
    assert {p for p in files if p.endswith(".png")} == {"blue.png", f"images/{red[7:23]}.png"}
    milo.catalog.remove_preview("milo", red)
    standin.repo("ann/milo").write({"blue.png": None}, "taken away")
    (outcome,) = milo.sync()
    assert outcome.action == "unchanged"
    assert f"images/{red[7:23]}.png" in standin.repo("ann/milo").head.files
    assert [p.digest for p in milo.catalog.previews(milo.catalog.resolve("milo"))] == pictures[1:]
    milo.sync(delete=True)
    assert not [p for p in standin.repo("ann/milo").head.files if p.endswith(".png")]
    same_on_both_sides(standin, milo)


def test_a_picture_that_an_older_version_shows_is_not_taken_away_there(
    standin: StandIn, milo: Studio
) -> None:
    red = show(milo, "milo:1", "red")
    milo.sync()
    milo.check_in("milo", card=milo.card("milo"))
    (outcome,) = milo.sync(delete=True)
    assert (outcome.action, outcome.number) == ("published", 2)
    assert f"images/{red[7:23]}.png" in standin.repo("ann/milo").head.files
    same_on_both_sides(standin, milo)
    milo.catalog.remove_preview("milo:1", red)
    milo.sync(delete=True)
    assert f"images/{red[7:23]}.png" not in standin.repo("ann/milo").head.files


def test_of_many_pictures_there_as_many_are_taken_as_are_shown(standin: StandIn, milo: Studio) -> None:
    files = {f"{n}.png": File.regular(png(f"#0000{n:02x}")) for n in range(11)}
    standin.repo("ann/milo").write({**files}, "pictures")
    (outcome,) = milo.sync()
    assert outcome.notes == ("3 pictures there were left, 8 are shown here",)
    assert len(milo.catalog.previews(milo.catalog.resolve("milo"))) == 8
    standin.repo("ann/milo").write({"more.png": File.regular(png("red"))}, "one more")
    (outcome,) = milo.sync()
    assert outcome.notes == ("1 pictures there were left, 8 are shown here",)
    same_on_both_sides(standin, milo)


def test_another_configuration_there_is_another_version(standin: StandIn, milo: Studio) -> None:
    standin.repo("ann/milo").write({"adapter_config.json": File.regular(b'{"peft_type": "LORA"}')}, "theirs")
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.number) == ("pulled", 2)
    assert milo.catalog.resolve("milo:2").facts["declared"]["adapter_config"] == '{"peft_type": "LORA"}'
    same_on_both_sides(standin, milo)


def test_a_direction_leaves_the_other_side_alone(standin: StandIn, milo: Studio) -> None:
    milo.check_in("milo")
    (outcome,) = milo.sync(direction="pull")
    assert outcome.action == "ahead"
    milo.sync(direction="push")
    same_on_both_sides(standin, milo)
    theirs(standin, milo, weights=True)
    (outcome,) = milo.sync(direction="push")
    assert outcome.action == "behind"
    assert milo.catalog.resolve("milo").number == 2
    milo.sync(direction="pull")
    same_on_both_sides(standin, milo)


def test_a_dry_run_says_what_would_happen(standin: StandIn, milo: Studio) -> None:
    milo.check_in("milo")
    (outcome,) = milo.sync(dry_run=True)
    assert outcome.action == "ahead"
    theirs(standin, milo, weights=True)
    (outcome,) = milo.sync(dry_run=True)
    assert outcome.action == "conflict"
    assert {seen.method for seen in standin.requests[-4:]} == {"GET"}


def test_deletions_are_propagated_to_nobody(standin: StandIn, milo: Studio) -> None:
    milo.check_in("milo")
    milo.sync()
    milo.catalog.delete("milo:2")
    (outcome,) = milo.sync()
    assert outcome.action == "unchanged"
    assert list(standin.repo("ann/milo").tags) == ["v1", "v2"]
    theirs(standin, milo, weights=True)
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.notes[0]) == (
        "behind", "milo:2 was deleted here; what is there is left as it is",
    )  # fmt: skip
    standin.repos.clear()
    (outcome,) = milo.sync()
    assert outcome.action == "failed"
    assert "there is no ann/milo" in outcome.notes[0]
    assert milo.catalog.resolve("milo").number == 1


def test_a_repository_that_moved_or_went_is_told_of_with_what_to_do(standin: StandIn, milo: Studio) -> None:
    standin.repos["ann/new"] = standin.repos.pop("ann/milo")
    standin.repos["ann/new"].id = "ann/new"
    standin.renamed["ann/milo"] = "ann/new"
    (outcome,) = milo.sync()
    assert outcome.notes[0].endswith(
        "it is ann/new now; `atelier hub push milo --repo ann/new --relink` follows it"
    )
    push(milo.exchange, "milo", repo="ann/new", relink=True)
    assert [outcome.action for outcome in milo.sync()] == ["unchanged"]
    del standin.repos["ann/new"]
    (outcome,) = milo.sync()
    assert outcome.notes[0].endswith(
        "What is here stays; `atelier hub push milo --repo ORG/NAME --relink` publishes it elsewhere"
    )
    assert push(milo.exchange, "milo", repo="ann/again", relink=True).made


def test_two_studios_pass_an_adapter_to_and_fro(standin: StandIn, milo: Studio, studios: Open) -> None:
    other = studios()
    pull(other.exchange, "ann/milo")
    for side, there in ((other, milo), (milo, other), (other, milo)):
        digest = side.check_in("milo").digest
        assert [o.action for o in side.sync()] == ["published"]
        assert [o.action for o in there.sync()] == ["pulled"]
        assert there.catalog.resolve("milo").digest == digest
    same_on_both_sides(standin, milo)
    assert milo.card("milo") == other.card("milo")


def test_one_that_fails_stops_no_other(standin: StandIn, milo: Studio) -> None:
    milo.check_in("luna")
    push(milo.exchange, "luna", repo="ann/luna")
    standin.repo("ann/luna").write({WEIGHTS_FILE: standin.storage.put(b"no adapter")}, "broken")
    milo.check_in("milo")
    assert [(o.name, o.action) for o in milo.sync()] == [("luna", "failed"), ("milo", "published")]
    with pytest.raises(NotFound, match=r"'stray' has no repository on a Hub; `atelier hub push stray"):
        milo.sync("stray")
