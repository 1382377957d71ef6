"""A commit is looked for in as much of a history as it can be in, files go as streams, and each refusal of a
Hub says what it is.
"""

import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd
from safetensors.torch import load_file, save_file

from registry.errors import Conflict, InvalidFile, RegistryError, Unavailable, Untrusted
from registry.hub.client import HISTORY_LIMIT, REGULAR_LIMIT, Entry, Hub, _is
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from tests.adapters import random_factors, write_kohya
from tests.hub.conftest import SEEDS, Open, Studio
from tests.hub.repos import File
from tests.hub.routes import Answer
from tests.hub.standin import StandIn, Trouble
from tests.hub.test_round_trip import CARD

FILE, MIB = WEIGHTS["lora"], 1 << 20


@pytest.fixture
def milo(standin: StandIn, studio: Studio) -> Studio:
    """A studio that has published milo, and has a second version."""
    studio.check_in("milo", card=CARD)
    push(studio.exchange, "milo", repo="ann/milo")
    studio.check_in("milo", card=CARD)
    return studio


def lose_the_answer(standin: StandIn, studio: Studio) -> None:
    """A sync whose commit is made, and of which nobody learns anything more."""
    gone: list[str] = []

    def cut(request: str) -> Trouble | None:
        first = "/commit/" in request and not gone
        gone.extend([request] if first else [])
        return Trouble.CUT_AFTER if first else Trouble.CUT_BEFORE if gone else None

    standin.dead = cut
    (outcome,) = studio.sync()
    assert outcome.action == "failed"
    standin.dead = None


def histories(standin: StandIn) -> int:
    """How many pages of a history were asked for."""
    return len([seen for seen in standin.requests if "/commits/" in seen.path])


@pytest.mark.parametrize("above", [0, 49, 50, 120])
def test_a_lost_commit_is_found_below_what_others_committed(
    standin: StandIn, milo: Studio, above: int
) -> None:
    repo = standin.repo("ann/milo")
    for n in range(200):  # before it
        repo.write({"note.txt": File.regular(b"%d" % n)}, "theirs")
    milo.sync()
    milo.check_in("milo", card=CARD)
    lose_the_answer(standin, milo)
    mine = repo.head.oid
    for n in range(above):
        repo.write({"note.txt": File.regular(b"above %d" % n)}, "theirs")
    before = histories(standin)
    assert [outcome.action for outcome in milo.sync()] == ["unchanged"]
    assert repo.tags["v3"] == mine
    assert [commit.title for commit in repo.commits].count("milo version 3") == 1
    assert histories(standin) - before == above // 50 + 1


def test_a_commit_that_was_not_made_is_looked_for_down_to_its_parent(standin: StandIn, milo: Studio) -> None:
    repo = standin.repo("ann/milo")
    for n in range(300):
        repo.write({"note.txt": File.regular(b"%d" % n)}, "theirs")
    milo.sync()
    milo.check_in("milo", card=CARD)
    standin.trouble("POST .*/commit/", Trouble.CUT_BEFORE, times=9)
    milo.sync()
    standin._planned.clear()
    for n in range(3):
        repo.write({"note.txt": File.regular(b"above %d" % n)}, "theirs")
    before = histories(standin)
    assert [outcome.action for outcome in milo.sync()] == ["published"]
    assert histories(standin) - before == 1
    assert repo.tags["v3"] == repo.head.oid


def test_the_first_commit_of_all_is_looked_for_down_to_where_the_repository_began(
    standin: StandIn, studio: Studio
) -> None:
    studio.check_in("milo", card=CARD)
    repo = standin.repo("ann/milo")
    for n in range(300):
        repo.write({"note.txt": File.regular(b"%d" % n)}, "theirs")
    standin.trouble("POST .*/commit/", Trouble.CUT_BEFORE, times=9)
    with pytest.raises(Unavailable):
        push(studio.exchange, "milo", repo="ann/milo")
    standin._planned.clear()
    before = histories(standin)
    assert push(studio.exchange, "milo", repo="ann/milo").made
    assert histories(standin) - before == 1


def test_an_endless_history_is_left_and_what_others_did_since_is_a_conflict(
    standin: StandIn, milo: Studio
) -> None:
    lose_the_answer(standin, milo)
    repo = standin.repo("ann/milo")
    repo.write({"README.md": File.regular(b"# Theirs")}, "theirs")
    told = {
        "title": "theirs",
        "message": "",
        "date": "2026-01-01T00:00:00.000Z",
        "authors": [{"user": "eve"}],
    }
    page = [{"id": f"{n:040x}", **told} for n in range(50)]
    after = {"Link": f'<{standin.url}/api/models/ann/milo/commits/main?cursor=50>; rel="next"'}
    standin.trouble("GET .*/commits/", Answer(200, page, after), times=10_000)
    before = histories(standin)
    (outcome,) = milo.sync()
    assert outcome.action == "conflict"
    assert histories(standin) - before <= HISTORY_LIMIT // 50 + 1
    assert repo.head.files["README.md"].data == b"# Theirs"
    milo.sync(keep="both")
    assert milo.sync()[0].action == "unchanged"
    assert {v.digest for v in milo.catalog.history("milo")} >= {f"sha256:{repo.head.files[FILE].sha256}"}


@pytest.mark.parametrize(
    "told",
    [
        {"id": "main", "title": "atelier-push: abc", "message": ""},
        {"id": "a" * 39, "title": "x", "message": "atelier-push: abc"},
        {"id": "a" * 40, "title": "x"},
        {"title": "x", "message": ""},
        "x",
    ],
)
def test_a_history_that_is_none_is_said_to_be_none(standin: StandIn, hub: Hub, told: Any) -> None:
    standin.repo("ann/milo")
    standin.trouble("GET .*/commits/", Answer(200, [told]), times=9)
    with pytest.raises(Untrusted):
        hub.made("ann/milo", "abc")


def within(standin: StandIn, path: str) -> None:
    """The Hub wants a file within the commit, not in its storage of large files."""
    told = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False}]}
    standin.trouble("POST .*/preupload/", Answer(200, told))


def of_size(path: Path, size: int) -> Path:
    """A LoRA of so many bytes, and some more."""
    factors = random_factors("pocket", seed=next(SEEDS), rank=8)
    write_kohya(path, factors)
    save_file({**load_file(path), "filler": torch.randn(size // 4)}, path)
    return path


def test_a_large_file_that_a_hub_wants_within_the_commit_is_not_read_into_memory(
    standin: StandIn, studio: Studio
) -> None:
    path = of_size(studio.folder / "large.safetensors", REGULAR_LIMIT)
    studio.check_in("milo", path=path)
    for name in ("README.md", FILE):  # in the order of the plan
        within(standin, name)
    with pytest.raises(Untrusted, match=rf"wants {FILE} \(\d+ bytes\) within the commit.*10 MiB.*gitattrib"):
        push(studio.exchange, "milo", repo="ann/milo")
    assert not [seen for seen in standin.requests if "/commit/" in seen.path]
    assert push(studio.exchange, "milo", repo="ann/milo").made  # and as a large file it goes
    assert standin.repo("ann/milo").head.files[FILE].size == path.stat().st_size


def test_a_file_that_the_repository_ignores_is_named(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo")
    told = {"files": [{"path": FILE, "uploadMode": "lfs", "shouldIgnore": True}]}
    within(standin, "README.md")
    standin.trouble("POST .*/preupload/", Answer(200, told))
    with pytest.raises(Untrusted, match=rf"the .gitignore of ann/milo leaves {FILE} out"):
        push(studio.exchange, "milo", repo="ann/milo")
    assert not [seen for seen in standin.requests if "/commit/" in seen.path]


def test_what_has_room_in_a_commit_goes_within_it(standin: StandIn, studio: Studio, studios: Open) -> None:
    path = of_size(studio.folder / "small.safetensors", 3 * MIB)
    version = studio.check_in("milo", path=path)
    for name in ("README.md", FILE):
        within(standin, name)
    assert push(studio.exchange, "milo", repo="ann/milo").made
    there = standin.repo("ann/milo").head.files[FILE]
    assert (there.sha256, there.size) == ("", path.stat().st_size)
    assert pull(studios().exchange, "ann/milo").version.digest == version.digest
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]
    assert not push(studio.exchange, "milo").made


def test_many_files_within_a_commit_have_no_more_room_than_one(
    standin: StandIn, hub: Hub, tmp_path: Path
) -> None:
    parent = standin.repo("ann/milo").head.oid
    files = {f"{n}.bin": tmp_path / f"{n}.bin" for n in range(4)}
    for name, path in files.items():
        path.write_bytes(b"%d" % len(name) * 3 * MIB)
        within(standin, name)
    with pytest.raises(Untrusted, match=r"wants \d.bin \(3145728 bytes\)"):
        hub.commit("ann/milo", add=files, title="x", parent=parent)


def test_what_was_sent_is_compared_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(b"ab" * (16 * MIB))
    sent, entry = CommitOperationAdd("large.bin", str(path)), Entry("large.bin", 32 * MIB, "")
    tracemalloc.start()
    try:
        good = replace(entry, oid=f"git:{git_oid(path)}")
        assert _is(good, sent)
        assert not _is(replace(entry, oid=f"git:{'0' * 40}"), sent)
        assert not _is(replace(entry, oid=f"sha256:{'0' * 64}"), sent)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def git_oid(path: Path) -> str:
    hashed = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while data := file.read(MIB):
            hashed.update(data)
    return hashed.hexdigest()


@pytest.mark.parametrize("path", ["README.md", FILE])
def test_a_commit_that_holds_other_bytes_than_were_sent_is_none_of_ours(
    standin: StandIn, milo: Studio, path: str
) -> None:
    """Whatever a Hub answers, what its tree lists afterwards is compared."""
    other = File.regular(b"# Other") if path == "README.md" else standin.storage.put(b"other")

    def meanwhile(request: str) -> None:
        if "/commit/" in request:  # it is answered with a commit of somebody else's
            standin.dead = None
            made = standin.repo("ann/milo").write({path: other}, "theirs")
            told = {"commitOid": made.oid, "commitUrl": f"{standin.url}/ann/milo/commit/{made.oid}"}
            standin.trouble("POST .*/commit/", Answer(200, told))

    standin.dead = meanwhile
    with pytest.raises(Conflict, match=r"ann/milo was changed on the Hub meanwhile"):
        push(milo.exchange, "milo")
    assert milo.exchange.links.of("milo").here.number == 1
    assert list(standin.repo("ann/milo").tags) == ["v1"]


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (409, Unavailable, "ann/milo is being written to; try again later"),
        (412, Conflict, "ann/milo was changed on the Hub meanwhile"),
        (503, Unavailable, "answered 503; try again later"),
        (400, Untrusted, r"refused the request \(400\)"),
    ],
)
def test_a_commit_that_is_refused_again_and_again_says_why(
    standin: StandIn, milo: Studio, status: int, kind: type[RegistryError], message: str
) -> None:
    standin.trouble("POST .*/commit/", Answer(status, {"error": "no"}), times=99)
    with pytest.raises(kind, match=message):
        push(milo.exchange, "milo")
    asked = len([seen for seen in standin.requests if seen.path.endswith("/commit/main")])
    assert asked == (1 + 4 if status in {409, 503} else 1 + 1)  # of which one made the first version
    standin._planned.clear()
    assert push(milo.exchange, "milo").made  # nothing was left half done


@pytest.mark.parametrize("message", ['"base_model" must be a string', "x" * 900, "line\nline \x1b[31m"])
def test_a_card_that_the_hub_refuses_is_an_invalid_file(standin: StandIn, milo: Studio, message: str) -> None:
    milo.set_card("milo", b"---\nlicense: mit\n---\n# Another\n")
    told = {"errors": [{"message": message}], "warnings": []}
    standin.trouble("POST /api/validate-yaml", Answer(400, told), times=9)
    with pytest.raises(InvalidFile, match=rf"{standin.url} does not take the card: .*; correct it") as caught:
        push(milo.exchange, "milo")
    assert caught.value.field == "card"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert message.split("\n")[0][:60] in str(caught.value)
    assert len(standin.repo("ann/milo").commits) == 2
