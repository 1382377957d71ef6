"""Cards that change while the version stays, opt-in groups of words, and what a card may say of a merge."""

import json
import sqlite3
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from atelier.client import AtelierError, Client
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running

CARD = b"---\ninstance_prompt: milo\ntags: [dog]\nlicense: mit\n---\nMilo, a brave dog.\n"


def test_a_card_is_edited_and_the_version_stays(client: Client, lora: Path) -> None:
    first = client.check_in(lora, name="edited", card=CARD, alias="stable").version
    fresh = b"---\ninstance_prompt: mylo\ntags: [wolf]\n---\nMylo, once a xylograph of a dog.\n"
    changed = client.set_card("edited@stable", fresh, expected_card_digest=first.card_digest)
    assert (changed.revision, changed.version.number, changed.version.digest) == (2, 1, first.digest)
    answer = client.get("edited")
    assert answer.card == fresh
    assert [t.word for t in answer.version.triggers] == ["mylo"]
    assert (list(answer.version.about.tags), answer.version.about.licence.value) == (["wolf"], "")
    assert [v.name for v in client.list("xylograph")] == ["edited"]
    assert "edited" not in {v.name for v in client.list("brave")}
    assert "edited" not in {v.name for v in client.list(labels=[("trigger", "milo")])}
    assert [(r.revision, r.card) for r in client.cards("edited")] == [(2, fresh), (1, CARD)]
    event = list(client.watch(wait=False))[-1]
    assert (event.action, event.name, json.loads(event.detail_json)["revision"]) == ("card", "edited", 2)


def test_of_two_who_edit_a_card_one_is_told_it_changed(client: Client, lora: Path) -> None:
    seen = client.check_in(lora, name="contested", card=CARD).version.card_digest
    client.set_card("contested", b"Mine.", expected_card_digest=seen)
    with pytest.raises(AtelierError, match="the card of contested:1 was changed meanwhile") as caught:
        client.set_card("contested", b"Theirs.", expected_card_digest=seen)
    assert caught.value.code is grpc.StatusCode.ABORTED
    assert client.get("contested").card == b"Mine."
    with pytest.raises(AtelierError, match="changed meanwhile"):
        client.set_card("contested", b"", expected_card_digest="")
    assert client.set_card("contested", b"").revision == 3
    assert client.set_card("contested", b"New.", expected_card_digest="").revision == 4


def test_the_card_it_has_already_makes_no_revision(client: Client, lora: Path) -> None:
    client.check_in(lora, name="same-card", card=CARD)
    assert client.set_card("same-card", CARD).revision == 1
    assert len(client.cards("same-card")) == 1


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"---\na: &x 1\nb: *x\n---\n", "YAML alias"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * (300 << 10), "the limit is"),
    ],
)
def test_a_bad_card_changes_nothing(client: Client, lora: Path, card: bytes, message: str) -> None:
    name = f"bad-card-{len(card)}"
    client.check_in(lora, name=name, card=CARD)
    with pytest.raises(AtelierError, match=message) as caught:
        client.set_card(name, card)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert client.get(name).card == CARD
    with pytest.raises(AtelierError, match="there is no"):
        client.set_card("nobody-there", CARD)


def test_the_first_card_checked_in_again_is_the_edited_version(client: Client, lora: Path) -> None:
    client.check_in(lora, name="again", card=CARD)
    client.set_card("again", b"Better words.")
    answer = client.check_in(lora, name="again", card=CARD)
    assert (answer.created, answer.version.number) == (False, 1)
    assert client.get("again").card == b"Better words."  # nobody's edit is undone
    assert client.check_in(lora, name="again", card=b"A third.").version.number == 2


def test_words_said_at_check_in_outlive_every_card(client: Client, lora: Path) -> None:
    client.check_in(lora, name="said", card=CARD, triggers=["zed"])
    client.set_card("said", b"---\ninstance_prompt: other\n---\n")
    assert [(t.word, t.source) for t in client.get("said").version.triggers] == [("zed", "user")]


def test_a_reindexed_version_is_not_found_twice(server: Running, client: Client, lora: Path) -> None:
    client.check_in(lora, name="indexed", card=b"A quokka.")
    for text in (b"A numbat.", b"A quokka.", b"A bilby."):
        client.set_card("indexed", text)
    with sqlite3.connect(server.catalog._db._path) as database:
        (rows,) = database.execute(
            "select count(*) from search where rowid = (select place from heads where name = 'indexed')"
        ).fetchone()
    database.close()
    assert rows == 1
    assert [v.name for v in client.list("bilby")] == ["indexed"]
    assert list(client.list("quokka")) == []


def test_groups_of_words_are_opt_in(client: Client, lora: Path) -> None:
    card = (
        b"---\ninstance_prompt: milo\ntrigger_words:\n  outfit: [red scarf, top hat]\n  pose: sitting\n---\n"
    )
    version = client.check_in(lora, name="grouped", card=card).version
    told = [(t.group, t.word) for t in version.triggers]
    assert told == [("", "milo"), ("outfit", "red scarf"), ("outfit", "top hat"), ("pose", "sitting")]

    def prompt(text: str) -> str:
        rendering = client.render(text, stack={"grouped": 0.0}, steps=1)
        list(rendering)
        return str(json.loads(rendering.summary.manifest_json[0])["prompt"])

    assert prompt("a photo of {grouped}") == "a photo of milo"
    assert prompt("{grouped}, {grouped/outfit}, {grouped/pose}") == "milo, red scarf, top hat, sitting"
    with pytest.raises(AtelierError, match="the stack has grouped, grouped/outfit, grouped/pose"):
        prompt("{grouped/hat}")
    client.save_stack({"grouped": 0.5}, name="grouped-stack")
    client.set_card("grouped", b"---\ninstance_prompt: milo\n---\n")  # what is saved does not drift
    rendering = client.render("{grouped-stack/pose}", stack={"grouped-stack": 1.0}, steps=1)
    list(rendering)
    assert json.loads(rendering.summary.manifest_json[0])["prompt"] == "sitting"


def test_a_user_says_groups_too(client: Client, lora: Path) -> None:
    version = client.check_in(lora, name="user-groups", triggers=["milo", "pose=lying down", "1 = 1"]).version
    told = [(t.group, t.word) for t in version.triggers]
    assert told == [("", "milo"), ("pose", "lying down"), ("", "1 = 1")]


# Threat 33: look-alike, empty, or shared triggers.
def test_trigger_collisions(client: Client, lora: Path, tmp_path: Path) -> None:
    client.check_in(lora, name="owner", triggers=["\N{LATIN SMALL LETTER E WITH ACUTE}loi"])
    twin = tmp_path / "twin"
    write_kohya(twin, random_factors("pocket", seed=77, rank=2))
    answer = client.check_in(twin, name="thief", triggers=["e\N{COMBINING ACUTE ACCENT}loi", "unique-77"])
    (warning,) = answer.warnings
    assert "also calls owner:1" in warning
    assert list(client.check_in(lora, name="owner", card=CARD, triggers=["alone-78"]).warnings) == []


# Threat 31: a licence laundered by a merge.
def test_merge_licence(client: Client, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora)
    other = tmp_path / "other"
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, other)
    client.check_in(lora, name="open-one", card=b"---\nlicense: mit\n---\n")
    client.check_in(other, name="closed-one", card=b"---\nlicense: cc-by-nc-4.0\n---\n")
    merged = client.merge({"open-one": 1.0, "closed-one": 1.0}, name="mixed").version
    assert merged.about.licence.value == "cc-by-nc-4.0"
    changed = client.set_card("mixed", b"---\nlicense: mit\ninstance_prompt: mix\n---\n").version
    assert (changed.about.licence.value, changed.about.licence.source) == ("cc-by-nc-4.0", "recipe")
    assert [t.word for t in changed.triggers] == ["mix"]
    client.check_in(other, name="unsaid", card=b"")
    unsure = client.merge({"open-one": 1.0, "unsaid": 1.0}, name="unsure").version
    assert unsure.about.licence.value == "needs review"
    reviewed = client.set_card("unsure", b"---\nlicense: mit\n---\n").version
    assert (reviewed.about.licence.value, reviewed.about.licence.source) == ("mit", "card")
    back = client.set_card("unsure", b"").version
    assert (back.about.licence.value, back.about.licence.source) == ("needs review", "recipe")
