"""A Hub that stalls, cuts, is busy or broken: every call ends, and what was done is read back."""

import time
from pathlib import Path

import pytest

from registry.errors import Conflict, Damaged, Stopped, Unavailable, Untrusted
from registry.hub.answers import translated
from registry.hub.client import Hub
from registry.hub.endpoint import Endpoint
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Open, Studio, impatient
from tests.hub.repos import File
from tests.hub.routes import Answer
from tests.hub.standin import TOKEN, StandIn, Trouble
from tests.hub.test_round_trip import png

ANY = ".*"


@pytest.fixture
def milo(standin: StandIn, studio: Studio) -> Studio:
    """A studio that has published milo once, and has a second version."""
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n")
    push(studio.exchange, "milo", repo="ann/milo")
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo 2\n")
    return studio


@pytest.mark.parametrize(
    "call", ["GET .*/revision/", "GET .*/tree/", "POST .*/preupload/", "POST .*/commit/"]
)
def test_stall_times_out(standin: StandIn, milo: Studio, call: str) -> None:
    standin.trouble(call, Trouble.STALL, times=9)
    client = Hub(Endpoint(standin.url, TOKEN), silent=0.2, pauses=(0.01,))
    (outcome,) = type(milo)(milo.catalog, exchange_with(milo, client), milo.folder).sync()
    assert outcome.action == "failed"
    assert outcome.notes == (f"{standin.url} said nothing for 0.2 s; try again later",)
    standin._planned.clear()
    (outcome,) = milo.sync()
    assert (outcome.action, len(standin.repo("ann/milo").commits)) == ("published", 3)


def exchange_with(studio: Studio, client: Hub):  # type: ignore[no-untyped-def]
    old = studio.exchange
    return type(old)(studio.catalog, client, old.door, actor=old.actor)


def test_commit_applied_but_response_lost(standin: StandIn, milo: Studio) -> None:
    standin.trouble("POST .*/commit/", Trouble.CUT_AFTER)
    (outcome,) = milo.sync()
    repo = standin.repo("ann/milo")
    assert (outcome.action, outcome.commit, repo.tags["v2"]) == ("published", repo.head.oid, repo.head.oid)
    assert len(repo.commits) == 3  # exactly one more


@pytest.mark.parametrize("tag", [{"name": 5}, {"targetCommit": ["x"]}, {"targetCommit": "main"}])
def test_what_names_no_commit_is_no_tag(standin: StandIn, hub: Hub, tag: dict[str, object]) -> None:
    told = {"name": "v1", "ref": "refs/tags/v1", "targetCommit": "a" * 40}
    answer = {"branches": [], "converts": [], "tags": [told, {**told, "name": "v2", **tag}]}
    standin.trouble("GET .*/refs", Answer(200, answer))
    standin.repo("ann/milo")
    assert hub.tags("ann/milo") == {"v1": "a" * 40}


@pytest.mark.parametrize("error", [IndexError, AssertionError, ZeroDivisionError])
def test_whatever_an_answer_does_to_its_reader_is_the_hubs(hub: Hub, error: type[Exception]) -> None:
    with pytest.raises(Untrusted, match=f"no Hub's answer .{error.__name__}"), translated(hub.endpoint, "x"):
        raise error
    with pytest.raises(OSError, match="no space"), translated(hub.endpoint, "x"):  # here, not there
        raise OSError("no space")


def test_a_500_with_the_commit_made_is_no_second_commit(standin: StandIn, milo: Studio) -> None:
    standin.trouble("POST .*/commit/", Trouble.CUT_AFTER)
    standin.trouble("GET .*/revision/", Answer(500, {"error": "internal"}))
    milo.sync()
    milo.sync()
    assert len(standin.repo("ann/milo").commits) == 3


def test_a_lost_commit_under_somebody_elses_is_found_in_the_history(standin: StandIn, milo: Studio) -> None:
    repo, gone = standin.repo("ann/milo"), list[str]()

    def meanwhile(request: str) -> Trouble | None:
        if gone:
            return Trouble.CUT_BEFORE  # nobody learns what became of it
        gone.extend([request] if "/commit/" in request else [])
        return Trouble.CUT_AFTER if gone else None

    standin.dead = meanwhile
    (outcome,) = milo.sync()
    assert outcome.action == "failed"
    standin.dead, mine = None, repo.head.oid
    repo.write({"README.md": File.regular(b"# Edited on top")}, "theirs")
    (outcome,) = milo.sync()
    assert outcome.action == "pulled"  # no conflict: ours had arrived before
    assert repo.tags["v2"] == mine
    assert milo.card("milo:2") == b"# Edited on top"


def test_what_a_cut_pull_has_taken_is_no_change_of_ours(standin: StandIn, milo: Studio) -> None:
    milo.sync()
    repo = standin.repo("ann/milo")
    weights = standin.storage.put(milo.weights().read_bytes())
    repo.write({WEIGHTS["lora"]: weights, "red.png": File.regular(png("red"))}, "theirs")
    standin.trouble("GET .*/resolve/.*png", Trouble.CUT_BEFORE, times=9)
    (outcome,) = milo.sync()
    assert (outcome.action, milo.catalog.resolve("milo").number) == ("failed", 3)
    standin._planned.clear()
    repo.write({"README.md": File.regular(b"# Edited on top")}, "theirs")
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.number) == ("pulled", 3)
    assert milo.card("milo:3") == b"# Edited on top"
    assert len(milo.catalog.previews(milo.catalog.resolve("milo:3"))) == 1


def cut_while_downloading(standin: StandIn, studio: Studio, file: str, theirs: File) -> None:
    """Somebody else writes a file, and a sync of it is cut before that has come."""
    standin.repo("ann/milo").write({file: theirs}, "theirs")
    standin.trouble(f"GET .*/resolve/.*{file}", Trouble.CUT_BEFORE, times=9)
    (outcome,) = studio.sync()
    assert outcome.action == "failed"
    standin._planned.clear()


def test_weights_whose_download_was_cut_are_pulled_by_the_next_sync_of_a_stripped_asset(
    standin: StandIn, studio: Studio
) -> None:
    told = {"ss_dataset_dirs": '{"10_secret": 1}'}
    studio.check_in("milo", path=studio.weights(metadata=told))
    push(studio.exchange, "milo", repo="ann/milo", strip=True)
    theirs = standin.storage.put(studio.weights().read_bytes())
    cut_while_downloading(standin, studio, WEIGHTS["lora"], theirs)
    (outcome,) = studio.sync()
    assert (outcome.action, outcome.number) == ("pulled", 2)
    assert studio.catalog.resolve("milo").digest == f"sha256:{theirs.sha256}"
    assert [o.action for o in studio.sync()] == ["unchanged"]


def test_a_configuration_whose_download_was_cut_is_pulled_by_the_next_sync(
    standin: StandIn, milo: Studio
) -> None:
    milo.sync()
    config = b'{"peft_type": "LORA"}'
    cut_while_downloading(standin, milo, "adapter_config.json", File.regular(config))
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.number) == ("pulled", 3)
    assert milo.catalog.resolve("milo:3").facts["declared"]["adapter_config"] == config.decode()


def test_a_card_written_on_what_a_cut_pull_has_taken_is_published(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo", path=studio.weights(metadata={"ss_dataset_dirs": '{"10_secret": 1}'}))
    push(studio.exchange, "milo", repo="ann/milo", strip=True)
    repo = standin.repo("ann/milo")
    theirs = standin.storage.put(studio.weights().read_bytes())
    repo.write({WEIGHTS["lora"]: theirs, "blue.png": File.regular(png("blue"))}, "theirs")
    standin.trouble("GET .*/resolve/.*png", Trouble.CUT_BEFORE, times=9)
    (outcome,) = studio.sync()
    assert (outcome.action, studio.catalog.resolve("milo").number) == ("failed", 2)
    standin._planned.clear()
    studio.set_card("milo", b"---\nlicense: mit\n---\n# Ours\n")
    (outcome,) = studio.sync()
    assert (outcome.action, outcome.number) == ("published", 2)
    assert b"# Ours" in repo.head.files["README.md"].data
    assert repo.head.files[WEIGHTS["lora"]].sha256 == theirs.sha256


def test_a_busy_branch_is_waited_for_and_a_moved_one_is_a_conflict(standin: StandIn, milo: Studio) -> None:
    standin.trouble("POST .*/commit/", Answer(409, {"error": "Another commit operation is in progress"}))
    assert [o.action for o in milo.sync()] == ["published"]
    milo.check_in("milo")
    repo = standin.repo("ann/milo")

    def first(request: str) -> Trouble | None:
        if "/commit/" in request:
            standin.dead = None
            repo.write({"README.md": File.regular(b"# First")}, "theirs")
        return None

    standin.dead = first
    (outcome,) = milo.sync()
    assert outcome.action == "failed"
    assert "ann/milo was changed on the Hub meanwhile" in outcome.notes[0]
    assert repo.head.files["README.md"].data == b"# First"
    (outcome,) = milo.sync()
    assert outcome.action == "conflict"


def test_a_commit_that_changes_nothing_does_not_pass_for_ours(standin: StandIn, hub: Hub) -> None:
    repo = standin.repo("ann/milo")
    parent = repo.head.oid
    repo.write({"README.md": File.regular(b"# Same")}, "theirs")
    # The Hub's client says it is done, on a parent that is no head any more: somebody else has done it.
    assert (
        hub.commit("ann/milo", add={"README.md": b"# Same"}, title="x", parent=parent).commit == repo.head.oid
    )


def test_the_head_that_such_a_commit_returns_is_looked_at(standin: StandIn, hub: Hub) -> None:
    repo = standin.repo("ann/milo")
    repo.write({"README.md": File.regular(b"# Same")}, "theirs")
    parent = repo.head.oid

    def meanwhile(request: str) -> None:
        if request.startswith("GET") and request.endswith("/revision/main"):  # it asks what to return
            standin.dead = None
            repo.write({"README.md": File.regular(b"# Other")}, "theirs")

    standin.dead = meanwhile
    with pytest.raises(Conflict, match="was changed on the Hub meanwhile"):
        hub.commit("ann/milo", add={"README.md": b"# Same"}, title="x", parent=parent)
    with pytest.raises(Conflict, match="was changed on the Hub meanwhile"):
        hub.commit("ann/milo", add={"README.md": b"# Mine"}, title="x", parent=parent)


def test_hub_500_is_unavailable_not_stale(standin: StandIn, milo: Studio, studios: Open) -> None:
    other = studios()
    pull(other.exchange, "ann/milo")
    milo.sync()
    standin.trouble(ANY, Answer(500, {"error": "internal"}), times=99)
    (outcome,) = other.sync()
    assert outcome.action == "failed"
    assert isinstance(outcome.error, Unavailable)
    assert outcome.notes == (f"{standin.url} answered 500; try again later",)
    with pytest.raises(Unavailable):
        pull(other.exchange, "ann/milo", name="more")
    assert not other.catalog.newest(after="milo")


def test_a_hub_that_asks_to_wait_is_waited_for_or_told_of(standin: StandIn, hub: Hub) -> None:
    standin.repo("ann/milo")
    standin.trouble("GET .*/revision/", Answer(429, {}, {"Retry-After": "1"}))
    before = time.monotonic()
    hub.head("ann/milo")
    assert time.monotonic() - before >= 1
    standin.trouble("GET .*/revision/", Answer(429, {}, {"Retry-After": "86400"}))
    with pytest.raises(Unavailable, match=r"asks to wait 3600 s") as caught:
        hub.head("ann/milo")
    assert caught.value.seconds == 3600
    with standin.counted() as seen, pytest.raises(Unavailable, match=r"asks to wait 3(600|599) s"):
        hub.head("ann/milo")
    assert seen == []  # nobody asks it again before


def test_same_size_corruption(standin: StandIn, studio: Studio, studios: Open) -> None:
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n")
    push(studio.exchange, "milo", repo="ann/milo")
    other = studios()
    for path in (WEIGHTS["lora"], "README.md"):
        standin.corrupt = {path}
        with pytest.raises(Damaged, match=rf"{path} of ann/milo is not what the Hub lists.*nothing was kept"):
            pull(other.exchange, "ann/milo")
        assert list(other.catalog.blobs.files()) == []
        assert not other.catalog.newest()
        assert list(other.catalog.blobs.incoming.iterdir()) == []


def test_a_damaged_picture_stops_nothing(standin: StandIn, studio: Studio, studios: Open) -> None:
    version = studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n")
    studio.exchange.door.add_preview(version, png("red"), "on red", "ann")
    push(studio.exchange, "milo", repo="ann/milo")
    (path,) = (name for name in standin.repo("ann/milo").head.files if name.endswith(".png"))
    standin.corrupt = {path}
    other = studios()
    pulled = pull(other.exchange, "ann/milo")
    assert pulled.created
    assert any(note.startswith(path) for note in pulled.notes)
    assert not other.catalog.previews(pulled.version)


def test_a_download_that_is_cut_is_made_again(standin: StandIn, milo: Studio, studios: Open) -> None:
    standin.trouble("GET .*/resolve/.*safetensors", Trouble.CUT_BEFORE)
    assert pull(studios().exchange, "ann/milo").created


def test_a_caller_that_gives_up_ends_it(standin: StandIn, milo: Studio) -> None:
    standin.trouble("GET .*/revision/", Answer(503, {}, {"Retry-After": "20"}), times=9)
    calls: list[int] = []
    hub = impatient(standin).watched(lambda size: None, lambda: len(calls) > 2 or bool(calls.append(1)))
    before = time.monotonic()
    with pytest.raises(Stopped):
        hub.head("ann/milo")
    assert time.monotonic() - before < 20


@pytest.mark.parametrize(
    "body",
    [
        b"no json", [], {}, {"id": "ann/milo"}, {"id": "ann/milo", "sha": "main"}, {"sha": "a" * 40, "id": 7},
        {"id": "ann/milo", "sha": "a" * 40, "lastModified": "yesterday"},
        {"id": "ann/milo", "sha": "a" * 40, "siblings": 7},
    ],
)  # fmt: skip
def test_an_answer_that_is_no_hubs_is_said_to_be_none(standin: StandIn, hub: Hub, body: object) -> None:
    standin.trouble(ANY, Answer(200, body), times=9)
    with pytest.raises(Untrusted):
        hub.head("ann/milo")


def test_a_slow_answer_ends(standin: StandIn, tmp_path: Path) -> None:
    standin.repo("ann/milo")
    hub = Hub(Endpoint(standin.url, TOKEN), answer=0.0, pauses=())
    with pytest.raises(Unavailable, match="took more than 0 s to answer"):
        hub.head("ann/milo")
