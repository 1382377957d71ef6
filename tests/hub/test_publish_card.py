"""A published card is one that huggingface_hub reads, with what its pages go by."""

from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.cards import body, front_matter
from registry.errors import InvalidFile
from registry.hub.card import LICENCES, Shown, published
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Open, Studio
from tests.hub.standin import StandIn
from tests.hub.test_card import PICTURES, made, said, version
from tests.hub.test_round_trip import show


def read(card: bytes) -> ModelCardData:
    """As huggingface_hub does: strictly, and to the same as our own reader."""
    data = ModelCard(card.decode()).data
    assert data.tags == front_matter(card)["tags"]
    assert data.base_model == front_matter(card).get("base_model")
    return data  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "tags",
    [
        b"tags:", b"tags: ''", b"tags: []", b"tags: ['', ' ']", b"tags: lora", b"tags: ~",
        b"tags:\n- ''\n- lora",
    ],
)  # fmt: skip
def test_empty_tags_are_none(tags: bytes) -> None:
    card = made(b"---\n" + tags + b"\nlicense: mit\n---\n# Milo\n", version())
    data = read(card)
    assert all(tag.strip() for tag in data.tags)
    assert "- ''" not in card.decode()
    assert data.tags.count("lora") == 1
    assert {"text-to-image", "diffusers", "template:sd-lora"} <= set(data.tags)
    assert made(card, version()) == card


@pytest.mark.parametrize("empty", [b"", b" ''", b" []", b" ~"])
def test_what_a_card_names_and_leaves_empty_is_filled_in(empty: bytes) -> None:
    keys = (b"base_model", b"library_name", b"pipeline_tag", b"instance_prompt", b"license", b"widget")
    lines = b"".join(key + b":" + empty + b"\n" for key in keys)
    of = version(triggers=[said("milo")], about={"licence": {"value": "mit", "source": "modelspec"}})
    card = made(b"---\n" + lines + b"---\n# Milo\n", of, pictures=PICTURES)
    data = read(card)
    assert (data.base_model, data.base_model_relation) == (
        "stabilityai/stable-diffusion-xl-base-1.0", "adapter",
    )  # fmt: skip
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-image", "mit")
    assert data.instance_prompt == "milo"
    assert [item["output"]["url"] for item in data.widget] == ["images/1.png", "images/2.png"]
    assert made(card, of, pictures=PICTURES) == card


def test_trigger_words_of_the_card_are_its_prompt_too() -> None:
    card = b"---\nlicense: mit\ntrigger_words: {'': [milo, hat], outfit: [red scarf]}\n---\n"
    words = [said("milo", source="card"), said("hat", source="card"), said("red scarf", "outfit", "card")]
    data = read(made(card, version(triggers=words)))
    assert data.instance_prompt == "milo"
    assert data.trigger_words == {"": ["milo", "hat"], "outfit": ["red scarf"]}
    mine = read(made(b"---\nlicense: mit\ninstance_prompt: a photo of milo\n---\n", version(triggers=words)))
    assert mine.instance_prompt == "a photo of milo"
    words_only = version("textual_inversion", triggers=[said("<milo>", source="learned_embeds")])
    assert "instance_prompt" not in read(made(b"", words_only)).to_dict()


def test_a_word_that_yaml_takes_for_something_else_stays_a_word() -> None:
    for word in ("no", "1.10", "2026-01-01", "~", "true", "- x", "a: b", "#x", "@x", "[x"):
        assert read(made(b"", version(triggers=[said(word)]))).instance_prompt == word


@pytest.mark.parametrize(
    ("told", "licence", "name"),
    [
        ("mit", "mit", None),
        ("Apache-2.0", "apache-2.0", None),
        ("CreativeML Open RAIL-M", "other", "creativeml-open-rail-m"),
        ("Ann's own, ask me", "other", "ann-s-own-ask-me"),
        ("自由", "other", "own"),
    ],
)
def test_a_licence_that_hubs_do_not_know_is_other_by_its_name(
    told: str, licence: str, name: str | None
) -> None:
    for recipe in (None, {"method": "svd", "parents": []}):
        of = version(recipe=recipe, about={"licence": {"value": told, "source": "modelspec"}})
        card = made(b"", of)
        data = read(card)
        assert (data.license, data.license_name) == (licence, name)
        assert data.license in LICENCES
        assert made(card, of) == card


def test_a_merge_of_what_is_published_is_a_merge_of_that_and_any_other_an_adapter() -> None:
    parents = [{"digest": d, "ref": f"{d}:1", "weight": 1.0} for d in ("one", "two")]
    recipe = {"method": "svd", "parameters": {}, "parents": parents}
    of = version(recipe=recipe, about={"licence": {"value": "mit", "source": "recipe"}})
    both = made(b"", of, parents={"one": "ann/one", "two": "ann/two"})
    assert (read(both).base_model, read(both).base_model_relation) == (["ann/one", "ann/two"], "merge")
    assert made(both, of, parents={"one": "ann/one", "two": "ann/two"}) == both
    half = read(made(b"", of, parents={"one": "ann/one"}))
    assert (half.base_model, half.base_model_relation) == (
        "stabilityai/stable-diffusion-xl-base-1.0", "adapter",
    )  # fmt: skip


@pytest.mark.parametrize("start", [b"--- \n", b"---\t\r\n", b"\xef\xbb\xbf\n\n---\n", b"---\x0c", b"---\r"])
@pytest.mark.parametrize("end", [b"---  \n", b"--- \r\n", b"---", b"---\x0c", b"---\r", "---\u2028".encode()])
def test_dashes_with_blanks_are_a_front_matter_to_hubs_too(start: bytes, end: bytes) -> None:
    card = made(start + b"license: mit\ntitle: Milo\n" + end, version())
    assert (read(card).license, read(card).title) == ("mit", "Milo")
    assert made(card, version()) == card


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"made: 2026-13-45", r"month must be in 1\.\.12"),
        (b"a: =", "could not determine a constructor"),
        (b"1: x", "keywords must be strings"),
        (b"model-index: x", "Invalid `model_index` in metadata"),
    ],
)
def test_a_card_that_no_hub_reads_is_not_published(line: bytes, why: str) -> None:
    with pytest.raises(InvalidFile, match=rf"no Hub reads the card's front matter: {why}.*quotes") as caught:
        made(b"---\n" + line + b"\n---\n# Milo\n", version())
    assert caught.value.field == "card"
    assert str(caught.value).isprintable()


def test_a_front_matter_of_blank_lines_keeps_nobody_busy() -> None:
    card = made(b"---\nlicense: mit\n" + b"\n" * 30_000 + b"---\n" + b"\n" * 30_000, version())
    assert front_matter(card)["license"] == "mit"


def test_evaluations_of_a_card_stay() -> None:
    index = (
        b"model-index:\n- name: milo\n  results:\n  - task: {type: text-to-image}\n"
        b"    dataset: {name: faces, type: faces}\n    metrics:\n    - {type: clip, value: 0.3}\n"
    )
    data = read(made(b"---\nlicense: mit\n" + index + b"---\n", version()))
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("clip", 0.3)]
    with pytest.raises(InvalidFile, match="no Hub reads"):
        made(b"---\nmodel-index: [{name: x}]\n---\n", version())


def test_the_pictures_of_words_are_in_the_text_and_those_of_a_lora_in_the_gallery() -> None:
    words = version("textual_inversion", triggers=[said("<milo>", source="learned_embeds")])
    card = made(b"", words, pictures=PICTURES)
    assert "![a milo](./images/1.png)\n\n![picture](./images/2.png)\n" in body(card)
    assert "<Gallery" not in body(card)
    assert made(card, words, pictures=PICTURES) == card
    lora = body(made(b"", version(), pictures=PICTURES))
    assert "<Gallery />" in lora
    assert "![" not in lora
    hostile = Shown("images/3.png", "](javascript:x) <script> `")
    text = body(made(b"", words, pictures=[hostile]))
    assert r"![\](javascript:x) \<script\> \`](./images/3.png)" in text


def test_a_new_version_shows_pictures_that_are_there_already(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    for number in (1, 2):
        studio.check_in("milo", card=b"---\nlicense: mit\n---\n")
        show(studio, "milo", "red", "on red")
        push(studio.exchange, "milo", repo="ann/milo")
        (item,) = front_matter(studio.card(f"milo:{number}"))["widget"]
        assert item["text"] == "on red"
        assert item["output"]["url"] in standin.repo("ann/milo").head.files
    studio.set_card("milo", b"---\nlicense: mit\n---\nWithout.\n")
    push(studio.exchange, "milo")
    assert "widget" not in front_matter(studio.card("milo"))  # who took it out does not get it back
    pulled = pull(studios().exchange, "ann/milo").version
    assert pulled.digest == studio.catalog.resolve("milo").digest


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.text(min_size=1, max_size=12), max_size=3),
    licence=st.text(max_size=20),
    text=st.text(max_size=60),
    kind=st.sampled_from(["lora", "textual_inversion"]),
    captions=st.lists(st.text(max_size=20), max_size=2),
)
def test_whatever_is_known_of_a_version_huggingface_hub_reads_its_card(
    words: list[str], licence: str, text: str, kind: str, captions: list[str]
) -> None:
    facts: dict[str, Any] = {"triggers": [said(word) for word in words if word.isprintable()]}
    if licence.strip():
        facts["about"] = {"licence": {"value": licence, "source": "modelspec"}}
    pictures = [Shown(f"images/{n}.png", c) for n, c in enumerate(captions) if c.isprintable()]
    of = version(kind, **facts)
    card = published(text.encode(errors="replace"), of, repo="ann/milo", weights="x", pictures=pictures)
    assert read(card).library_name in {"diffusers", front_matter(card).get("library_name")}
    assert published(card, of, repo="ann/milo", weights="x", pictures=pictures) == card
