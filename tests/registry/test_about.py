"""What a card and a header say, each with its source; and what becomes of licences in a merge."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.about import REVIEW, about, strictest
from registry.errors import InvalidFile

CARD = b"""---
title: Aria the fox
author: ann
license: apache-2.0
negative_prompt: blurry
recommended_weight: 0.8 (0.6 to 1.0)
tags: [Fox, lora, fox]
---
# Aria
"""


def test_the_card_comes_before_the_header_and_each_value_has_its_source() -> None:
    header = {
        "modelspec.title": "old title",
        "modelspec.author": "bob",
        "modelspec.license": "mit",
        "modelspec.tags": "cat, animal",
        "ss_output_name": "aria_v3-000010",
    }
    assert about(CARD, header) == {
        "title": {"value": "Aria the fox", "source": "card"},
        "author": {"value": "ann", "source": "card"},
        "licence": {"value": "apache-2.0", "source": "card"},
        "negative": {"value": "blurry", "source": "card"},
        "tags": {"value": ["fox", "lora"], "source": "card"},
        "weight": {"value": 0.8, "low": 0.6, "high": 1.0, "source": "card"},
    }
    assert about(b"", header) == {
        "title": {"value": "old title", "source": "modelspec"},
        "author": {"value": "bob", "source": "modelspec"},
        "licence": {"value": "mit", "source": "modelspec"},
        "tags": {"value": ["cat", "animal"], "source": "modelspec"},
    }
    assert about(b"", {"ss_output_name": "aria"})["title"]["source"] == "ss_output_name"
    assert about(b"", {}) == {}


def test_several_licences_of_a_card_come_before_the_header_and_want_a_review() -> None:
    header = {"modelspec.license": "mit", "modelspec.author": "bob"}
    told = about(b"---\nlicense: [cc-by-nc-4.0, mit]\nauthor: null\n---\n", header)
    assert told["licence"] == {"value": "cc-by-nc-4.0, mit", "source": "card"}
    assert told["author"] == {"value": "bob", "source": "modelspec"}
    assert strictest([told["licence"]["value"], "mit"]) == REVIEW
    assert about(b"---\nlicense: [null, mit]\n---\n", {})["licence"]["value"] == "mit"


@pytest.mark.parametrize(
    ("line", "weight"),
    [
        (b"Recommended weight: 1.0 (useful between 0.7 and 1.2).", (1.0, 0.7, 1.2)),
        (b"**Recommended strength:** 0.75", (0.75, 0.75, 0.75)),
        (b"recommended weight 0.8, 0.6-1", (0.8, 0.6, 1.0)),
        (b"Recommended weight: 5 (1 to 2)", None),
        (b"Recommended weight: 1e999", None),
        (b"Recommended weight: heavy", None),
        (b"no word of it", None),
    ],
)
def test_a_recommended_weight_is_read_from_the_text(
    line: bytes, weight: tuple[float, float, float] | None
) -> None:
    told = about(b"# Hero\n\n" + line + b"\n", {}).get("weight")
    assert (told and (told["value"], told["low"], told["high"])) == weight
    assert told is None or told["source"] == "card text"


def test_what_is_not_for_everybody_is_rated() -> None:
    told = about(b"---\ntags:\n- not-for-all-audiences\n---\n", {})
    assert told["rating"] == {"value": "not-for-all-audiences", "source": "card"}


@given(st.binary(max_size=400))
def test_any_card_is_read_or_refused(card: bytes) -> None:
    with contextlib.suppress(InvalidFile):
        about(b"---\n" + card + b"\n---\n" + card, {})


@pytest.mark.parametrize(
    ("licences", "merged"),
    [
        (["mit", "Apache-2.0"], "apache-2.0"),
        (["mit", "openrail++", "mit"], "openrail++"),
        (["cc-by-nc-4.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-sa-4.0", "cc-by-nc-4.0"], REVIEW),
        (["mit", ""], REVIEW),
        (["mit", "flux-1-dev-non-commercial-license"], REVIEW),
        ([], REVIEW),
    ],
)
def test_a_merge_inherits_the_most_restrictive_licence(licences: list[str], merged: str) -> None:
    assert strictest(licences) == merged
