"""What a pull goes on top of, and cards that cannot be one here."""

import re
from collections.abc import Callable

import pytest

from registry.errors import Conflict, InvalidFile, Moved, Unavailable
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Open, Studio
from tests.hub.repos import File
from tests.hub.standin import StandIn, Trouble
from tests.hub.test_round_trip import png
from tests.hub.test_sync import meanwhile

FILE = WEIGHTS["lora"]


def theirs(standin: StandIn, studio: Studio, card: bytes = b"# Milo") -> str:
    """Somebody else's weights and card; the weights' digest."""
    stored = standin.storage.put(studio.weights().read_bytes())
    standin.repo("ann/milo").write({FILE: stored, "README.md": File.regular(card)}, "theirs")
    return f"sha256:{stored.sha256}"


@pytest.mark.parametrize("name", ["", "milo"])
@pytest.mark.parametrize("revision", ["", "commit"])
@pytest.mark.parametrize("moment", ["revision", "tree", "resolve/.*README", "resolve/.*safetensors"])
def test_what_is_checked_in_during_a_first_pull_is_neither_buried_nor_adopted(
    standin: StandIn, studio: Studio, moment: str, revision: str, name: str
) -> None:
    theirs(standin, studio)
    commit = standin.repo("ann/milo").head.oid if revision else ""
    meanwhile(standin, rf"GET .*/{moment}", lambda: studio.check_in("milo", card=b"# Ours"))
    with pytest.raises(Moved, match=r"milo was changed here meanwhile, so nothing was taken.*--name"):
        pull(studio.exchange, "ann/milo", revision=commit, name=name)
    (mine,) = studio.catalog.history("milo")
    assert studio.catalog.card(mine) == b"# Ours"
    assert "origin" not in mine.facts
    assert studio.exchange.links.all() == []
    assert studio.sync() == []
    assert list(studio.catalog.blobs.incoming.iterdir()) == []


@pytest.mark.parametrize("what", ["version", "card"])
def test_a_pull_goes_on_top_of_what_was_looked_at_and_nothing_else(
    standin: StandIn, studio: Studio, what: str
) -> None:
    theirs(standin, studio)
    studio.check_in("milo")
    change: Callable[..., object] = studio.check_in if what == "version" else studio.set_card
    meanwhile(standin, r"GET .*/resolve/.*safetensors", lambda: change("milo", card=b"# Ours"))
    with pytest.raises(Moved):
        pull(studio.exchange, "ann/milo", name="milo")
    assert studio.card("milo") == b"# Ours"
    assert len(studio.catalog.history("milo")) == (2 if what == "version" else 1)
    assert pull(studio.exchange, "ann/milo", name="milo").created  # it was looked at now


def test_a_pull_of_what_was_deleted_is_the_first_again(standin: StandIn, studio: Studio) -> None:
    digest = theirs(standin, studio)
    studio.check_in("milo")
    studio.catalog.delete("milo:1")
    assert pull(studio.exchange, "ann/milo").version.digest == digest
    assert studio.catalog.resolve("milo").number == 2


def test_a_first_check_in_that_comes_second_is_on_top_of_the_pull(standin: StandIn, studio: Studio) -> None:
    digest = theirs(standin, studio)
    standin.repo("ann/milo").write({"red.png": File.regular(b"no picture")}, "theirs")
    meanwhile(standin, r"GET .*/resolve/.*red.png", lambda: studio.check_in("milo", card=b"# Ours"))
    pull(studio.exchange, "ann/milo")
    mine, pulled = studio.catalog.history("milo")
    assert (pulled.digest, studio.catalog.card(mine)) == (digest, b"# Ours")


BAD_CARDS = {
    "an alias": (b"---\na: &x [1]\nb: *x\n---\n# Milo\n", r"uses a YAML alias \(\*name\); write the value"),
    "a key twice": (b"---\nlicense: mit\nlicense: cc0-1.0\n---\n", "names 'license' twice"),
    "a tab": (b"---\na:\n\t- b\n---\n", r"is not YAML: .* cannot start any token in line 3\. Correct"),
    "no YAML": (b"---\na: [\n---\n", "is not YAML"),
    "depth": (b"---\na: " + b"[" * 3000 + b"\n---\n", "is nested deeper than 12"),
    "much YAML": (b"---\na: " + b"x" * (40 << 10) + b"\n---\n", "has 40963 characters, the limit is 32768"),
    "no text": (b"---\na: \xff\n---\n", "is not UTF-8 text"),
    "keys of keys": (b"---\n? [a]\n: b\n---\n", "a key that is not plain text"),
}


@pytest.mark.parametrize("which", BAD_CARDS)
def test_a_card_that_cannot_be_one_here_stops_a_pull_and_says_what_to_do(
    standin: StandIn, studio: Studio, which: str
) -> None:
    card, why = BAD_CARDS[which]
    digest = theirs(standin, studio, card)
    with standin.counted() as seen, pytest.raises(InvalidFile, match=why) as caught:
        pull(studio.exchange, "ann/milo")
    told = str(caught.value)
    assert told.startswith("the README.md of ann/milo cannot be a card here, so nothing was taken: the card")
    assert told.endswith(
        "Correct it there, or take its weights alone: `atelier hub pull ann/milo --without-card`"
    )
    assert "\n" not in told
    assert not [request for request in seen if FILE in request.path]  # the weights are not fetched in vain
    assert not studio.catalog.newest()
    done = pull(studio.exchange, "ann/milo", without_card=True)
    assert (done.version.digest, done.version.card_digest) == (digest, "")
    assert studio.sync() == []  # nothing will be published in its place
    assert standin.repo("ann/milo").head.files["README.md"].data == card


@pytest.mark.parametrize("which", ["an alias", "no text"])
def test_such_a_card_is_a_failed_sync_until_it_is_corrected_there(
    standin: StandIn, studio: Studio, which: str
) -> None:
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n")
    push(studio.exchange, "milo", repo="ann/milo")
    before = studio.card("milo")
    digest = theirs(standin, studio, BAD_CARDS[which][0])
    for _ in range(2):
        (outcome,) = studio.sync()
        assert (outcome.action, outcome.number) == ("failed", 1)
        assert "the README.md of ann/milo cannot be a card here" in outcome.notes[0]
        assert outcome.notes[0].endswith("Correct it there")
        assert studio.card("milo") == before
    standin.repo("ann/milo").write({"README.md": File.regular(b"# Corrected")}, "theirs")
    (outcome,) = studio.sync()
    assert (outcome.action, outcome.number) == ("pulled", 2)
    assert (studio.catalog.resolve("milo").digest, studio.card("milo")) == (digest, b"# Corrected")


@pytest.mark.parametrize("which", ["an alias", "no text"])
def test_a_conflict_with_such_a_card_is_shown_and_ours_can_be_kept(
    standin: StandIn, studio: Studio, which: str
) -> None:
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n")
    push(studio.exchange, "milo", repo="ann/milo")
    mine = studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Ours\n")
    theirs(standin, studio, BAD_CARDS[which][0])
    (outcome,) = studio.sync()
    assert outcome.action == "conflict"
    assert "+# Ours" in outcome.ours
    assert re.search(r"^\+a: ", outcome.theirs, re.MULTILINE)
    for keep in ("theirs", "both"):
        (outcome,) = studio.sync(keep=keep)
        assert outcome.action == "failed"
        assert studio.catalog.resolve("milo").digest == mine.digest
    (outcome,) = studio.sync(keep="ours")
    assert outcome.action == "published"
    assert b"# Ours" in standin.repo("ann/milo").head.files["README.md"].data
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]


def test_a_card_that_is_too_large_is_not_fetched(standin: StandIn, studio: Studio) -> None:
    digest = theirs(standin, studio, b"x" * (300 << 10))
    with (
        standin.counted() as seen,
        pytest.raises(InvalidFile, match="has 307200 bytes, a card's limit is 262144"),
    ):
        pull(studio.exchange, "ann/milo")
    assert not [request for request in seen if "/resolve/" in request.path]
    assert pull(studio.exchange, "ann/milo", without_card=True).version.digest == digest


def test_what_was_pulled_without_its_card_can_be_linked_later(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    theirs(standin, studio, BAD_CARDS["an alias"][0])
    pull(studio.exchange, "ann/milo", without_card=True)
    standin.repo("ann/milo").write({"README.md": File.regular(b"# Corrected")}, "theirs")
    done = pull(studio.exchange, "ann/milo")
    assert (done.version.ref, studio.card("milo")) == ("milo:2", b"# Corrected")
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]
    with pytest.raises(Conflict, match="is linked with ann/milo already"):
        pull(studio.exchange, "ann/milo", without_card=True)


def test_a_pull_after_a_push_that_nobody_heard_the_end_of_is_a_sync(standin: StandIn, studio: Studio) -> None:
    sent = list[str]()

    def lost(request: str) -> Trouble | None:
        if sent:
            return Trouble.CUT_BEFORE
        sent.extend([request] if "/commit/" in request else [])
        return Trouble.CUT_AFTER if sent else None

    studio.check_in("milo", path=studio.weights(metadata={"a note": "x"}))
    standin.dead = lost
    with pytest.raises(Unavailable):
        push(studio.exchange, "milo", repo="ann/milo", strip=True)
    standin.dead = None
    with pytest.raises(Conflict, match="is linked with ann/milo already; `atelier hub sync milo`"):
        pull(studio.exchange, "ann/milo", name="milo")
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]
    assert studio.exchange.links.of("milo").strip
    assert standin.repo("ann/milo").tags == {"v1": standin.repo("ann/milo").head.oid}


def test_a_picture_that_is_sent_elsewhere_is_told_of_and_stops_nothing(
    standin: StandIn, studio: Studio
) -> None:
    theirs(standin, studio)
    standin.repo("ann/milo").write({"milo.png": File.regular(png("red"))}, "a picture")
    standin.redirects["milo.png"] = "http://files.example/milo.png"
    (note,) = pull(studio.exchange, "ann/milo").notes
    assert note.startswith(f"milo.png: {standin.url} pointed to http://files.example")
    digest = theirs(standin, studio, b"# Milo 2")
    standin.repo("ann/milo").write({"milo.png": File.regular(png("blue"))}, "another")
    (outcome,) = studio.sync()
    assert (outcome.action, studio.catalog.resolve("milo").digest) == ("pulled", digest)
    assert outcome.notes[0].startswith("milo.png: ")
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]
