"""Names, aliases and references."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidName
from registry.refs import Ref, parse


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("hero", Ref("hero")),
        ("hero:3", Ref("hero", number=3)),
        ("hero@stable", Ref("hero", alias="stable")),
        ("sha256:" + "ab" * 32, Ref(digest="sha256:" + "ab" * 32)),
    ],
)
def test_each_form_of_reference_is_read_and_printed_back(text: str, ref: Ref) -> None:
    assert parse(text) == ref
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../x",
        "/x",
        "Hero",
        "a" * 129,
        "a\n",
        "a\x00b",
        "hero:0",
        "hero:x",
        "hero@",
        "hero@../y",
        "sha256:12",
        "a..b",
    ],
)
def test_what_is_not_a_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse(text)


@given(st.text(max_size=200))
def test_any_text_is_either_a_reference_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidName):
        assert str(parse(text)) == text
