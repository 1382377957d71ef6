"""The card as the Hub shows it: nothing the artist wrote is touched, what is missing is added, once."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.cards import body, front_matter
from registry.digests import NO_DIGESTS
from registry.errors import InvalidFile
from registry.hub.card import Shown, gallery, published
from registry.records import Version
from registry.triggers import find

FILE = "pytorch_lora_weights.safetensors"
PICTURES = [Shown("images/1.png", "a milo"), Shown("images/2.png")]


def version(kind: str = "lora", recipe: dict[str, Any] | None = None, **facts: Any) -> Version:
    told = {"family": "sdxl", "rank": 8, "triggers": [], "about": {}} | facts
    return Version(
        "milo", 3, "sha256:" + "a" * 64, 10, kind, "", told, recipe, datetime.now(UTC), (), NO_DIGESTS, None
    )


def said(word: str, group: str = "", source: str = "user") -> dict[str, str]:
    return {"word": word, "source": source, "group": group}


def made(card: bytes, of: Version, **more: Any) -> bytes:
    return published(card, of, repo="ann/milo", weights=FILE, **more)


def test_a_card_from_nothing_has_what_pages_pipelines_and_web_uis_look_for() -> None:
    of = version(triggers=[said("milo")], about={"licence": {"value": "mit", "source": "modelspec"}})
    card = made(b"", of, pictures=PICTURES)
    assert front_matter(card) == {
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": "milo",
        "license": "mit",
        "tags": [
            "text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-xl",
            "stable-diffusion-xl-diffusers",
        ],
        "widget": [
            {"text": "a milo", "output": {"url": "images/1.png"}},
            {"text": " ", "output": {"url": "images/2.png"}},
        ],
    }  # fmt: skip
    text = body(card)
    order = [
        "# LoRA - ann/milo",
        "<Gallery />",
        "## Model description",
        "## Trigger words",
        "## Download model",
    ]
    places = [text.index(part) for part in (*order, "## Use it with the 🧨 diffusers library")]
    assert places == sorted(places)
    assert f'load_lora_weights("ann/milo", weight_name="{FILE}")' in text
    assert "A weight of 1 is as trained." in text
    assert "`<lora:milo:1>`" in text
    told = ModelCard(card.decode()).data.to_dict()  # as the Hub's own library reads it
    assert told["tags"][3] == "template:sd-lora"
    assert gallery(card) == {"images/1.png": "a milo", "images/2.png": ""}


def test_a_textual_inversion_has_its_own_tags_and_call() -> None:
    card = made(b"", version("textual_inversion", triggers=[said("<milo>", source="learned_embeds")]))
    assert {"textual_inversion", "diffusers"} <= set(front_matter(card)["tags"])
    assert "template:sd-lora" not in front_matter(card)["tags"]
    assert front_matter(card)["trigger_words"] == ["<milo>"]
    assert "load_textual_inversion(" in body(card)
    assert "<Gallery" not in body(card)


def test_what_the_artist_wrote_stays_byte_for_byte() -> None:
    front = b"# mine\nlicense:   mit  # free\ntitle: 'M: \"i\"'\nversion: 1.10\nlang: no\ntags: [b,  a]\n"
    text = b"\n# Milo\r\n\r\n  two  spaces  \n<gallery/>\n## trigger words\nnone of your business\n"
    card = made(b"\xef\xbb\xbf\n---\n" + front + b"---\n" + text, version(), pictures=PICTURES)
    assert card.startswith(b"---\n" + front[: front.index(b"tags")])
    assert text in card
    assert front_matter(card) | {"title": 'M: "i"', "version": "1.10", "lang": "no"} == front_matter(card)
    assert front_matter(card)["tags"][:2] == ["b", "a"]
    assert card.count(b"rigger words") == 1


def test_a_card_with_the_line_ends_of_windows_keeps_them() -> None:
    card = b"---\r\nlicense: mit\r\ntags:\r\n- hat\r\n---\r\n# Milo\r\n"
    once = made(card, version(), pictures=PICTURES)
    assert once.startswith(b"---\r\nlicense: mit\r\ntags:\n- hat\n- text-to-image\n")
    assert b"---\r\n# Milo\r\n" in once
    assert front_matter(once)["license"] == "mit"
    assert made(once, version(), pictures=PICTURES) == once


def test_publishing_again_changes_nothing() -> None:
    for card in (b"", b"# Milo", b"---\nlicense: mit\n---", b"---\n---\n", b"text\n\n---\nrule: 1\n---\n"):
        of = version(triggers=[said("milo"), said("hat", "outfit")])
        once = made(card, of, pictures=PICTURES)
        assert made(once, of, pictures=PICTURES) == once


@settings(max_examples=150, deadline=None)
@given(
    keys=st.dictionaries(
        st.sampled_from(["title", "tags", "license", "widget", "base_model", "x", "instance_prompt"]),
        st.one_of(
            st.text(max_size=12),
            st.lists(st.text(max_size=6), max_size=3),
            st.lists(
                st.dictionaries(st.sampled_from(["text", "output", "y"]), st.text(max_size=5)), max_size=3
            ),
            st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
        ),
    ),
    flow=st.booleans(),
    text=st.text(max_size=80),
    word=st.text(min_size=1, max_size=20),
)
def test_whatever_a_card_says_it_says_still(keys: dict[str, Any], flow: bool, text: str, word: str) -> None:
    block = yaml.safe_dump(keys, allow_unicode=True, default_flow_style=flow) if keys else ""
    card = f"---\n{block}---\n{text}".encode(errors="replace")
    try:
        before = front_matter(card)
    except InvalidFile:
        return
    of = version(triggers=[said(word)] if word.isprintable() else [])
    once = made(card, of, pictures=PICTURES)
    after = front_matter(once)
    for key, value in before.items():
        if key in {"tags", "widget"} and key in after:
            continue
        assert after[key] == value or not value  # said empty is as good as not said
    assert body(card).strip() in body(once)
    assert made(once, of, pictures=PICTURES) == once


def test_words_that_a_user_said_are_found_again_by_who_pulls() -> None:
    words = [said("milo"), said("red hat", "outfit"), said("top hat", "outfit")]
    card = made(b"---\nlicense: mit\n---\n", version(triggers=words))
    found = find(said=(), card=card, metadata={})
    assert [(t.word, t.group) for t in found] == [("milo", ""), ("red hat", "outfit"), ("top hat", "outfit")]


def test_a_picture_goes_to_the_prompt_that_waits_for_one() -> None:
    card = b"---\nwidget:\n- text: on red\n- text: a milo\n- text: shown\n  output: {url: have.png}\n---\n"
    more = Shown("images/3.png", "of something else")
    assert front_matter(made(card, version(), pictures=[*PICTURES, more]))["widget"] == [
        {"text": "on red", "output": {"url": "images/2.png"}},
        {"text": "a milo", "output": {"url": "images/1.png"}},
        {"text": "shown", "output": {"url": "have.png"}},
        {"text": "of something else", "output": {"url": "images/3.png"}},
    ]


def test_a_merge_says_how_it_was_made_and_of_what() -> None:
    parents = [
        {"ref": "milo:1", "digest": "sha256:" + "1" * 64, "weight": 1.0, "words": ["milo"]},
        {"ref": "hat:2", "digest": "sha256:" + "2" * 64, "weight": 0.5, "words": []},
    ]
    recipe = {"method": "tsv", "parameters": {"rank": 8}, "parents": parents}
    licence = {"licence": {"value": "creativeml-openrail-m", "source": "recipe"}}
    of = version(recipe=recipe, about=licence, inherited_licence="creativeml-openrail-m")
    card = made(b"---\nlicense: mit\n---\n", of, parents={parents[0]["digest"]: "ann/milo-one"})
    assert front_matter(card)["license"] == "creativeml-openrail-m"  # a card launders no parent's
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert "With the method `tsv` (rank 8) of Atelier" in body(card)
    assert f"[ann/milo-one](/ann/milo-one) at weight 1, `{parents[0]['digest']}`" in body(card)
    assert "`hat:2` at weight 0.5" in body(card)
    both = {p["digest"]: f"ann/{n}" for n, p in enumerate(parents)}
    card = made(b"", of, parents=both)
    assert front_matter(card)["base_model"] == ["ann/0", "ann/1"]
    assert front_matter(card)["base_model_relation"] == "merge"
    with pytest.raises(InvalidFile, match=r"licence of milo:3 needs review"):
        made(b"", replace(of, facts={**of.facts, "about": {"licence": {"value": "needs review"}}}))


def test_text_that_looks_like_a_template_stays_text() -> None:
    for text in ("{{7*7}}", "{% raw %}", "${jndi:x}", "`x`", '"; import os; "', "--- ", "<script>"):
        card = made(b"", version(triggers=[said(text)]), pictures=[Shown("images/1.png", text)]).decode()
        assert "49" not in card
        assert front_matter(card.encode())["instance_prompt"] == text
        block = card[card.index("```py") : card.rindex("```")]
        compile(block.removeprefix("```py\n"), "card", "exec")
