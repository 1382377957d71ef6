"""Cards are read strictly: strings only, nothing that explodes."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.cards import front_matter
from registry.errors import InvalidFile, InvalidName
from registry.triggers import Trigger, find


def card(block: str) -> bytes:
    return f"---\n{block}\n---\n# Hero\n".encode()


def test_values_stay_what_was_written() -> None:
    found = front_matter(card("language: no\nversion: 1.10\ntags: [lora, yes]\ndate: 2026-01-01"))
    assert found == {"language": "no", "version": "1.10", "tags": ["lora", "yes"], "date": "2026-01-01"}


def test_null_is_nothing_unless_it_is_quoted() -> None:
    text = card('a: null\nb: ~\nc:\nd: "null"\ne: [Null, NULL, nulls]\ninstance_prompt: null')
    assert front_matter(text) == {
        "a": "", "b": "", "c": "", "d": "null", "e": ["", "", "nulls"], "instance_prompt": ""
    }  # fmt: skip
    assert words(card=text, metadata={"modelspec.trigger_phrase": "spec"}) == [("spec", "modelspec")]


@pytest.mark.parametrize("text", [b"", b"# Hero", b"---\nno end", b"---\n- a\n---\n", b"----\na: b\n---\n"])
def test_no_front_matter_is_no_error(text: bytes) -> None:
    assert front_matter(text) == {}


def test_a_byte_order_mark_and_blank_lines_hide_nothing() -> None:
    assert front_matter("\ufeff\n\n---\r\na: b\r\n---\r\n".encode()) == {"a": "b"}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("a: 1\na: 2", "names 'a' twice"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: " + "[" * 50 + "]" * 50, "nested deeper"),
        ("a: " + "[" * 20_000, "nested deeper"),
        ("a: [", "not YAML"),
        ("[a, b]: c", "not plain text"),
        ("a: " + "x" * 300_000, "the limit is"),
    ],
)
def test_yaml_gate(block: str, message: str) -> None:
    with pytest.raises(InvalidFile, match=message) as caught:
        front_matter(card(block))
    assert caught.value.field == "card"


def test_a_tag_builds_nothing() -> None:
    assert front_matter(card("a: !!python/name:os.system x")) == {"a": "x"}


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidFile, match="not UTF-8"):
        front_matter(b"---\n\xff\xfe\n---\n")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidFile):
        assert isinstance(front_matter(card(text)), dict)


def words(**sources: object) -> list[tuple[str, str]]:
    given: dict[str, object] = {"said": (), "card": b"", "metadata": {}, **sources}
    return [(t.word, t.source) for t in find(**given)]  # type: ignore[arg-type]


def test_the_first_source_that_knows_the_trigger_wins() -> None:
    metadata = {"modelspec.trigger_phrase": "spec", "ss_tag_frequency": '{"10_x": {"tag": 9, "red": 2}}'}
    text = card("instance_prompt: carded")
    assert words(said=["a", "b"], card=text, metadata=metadata) == [("a", "user"), ("b", "user")]
    assert words(card=text, metadata=metadata) == [("carded", "card")]
    assert words(metadata=metadata) == [("spec", "modelspec")]
    del metadata["modelspec.trigger_phrase"]
    assert words(metadata=metadata, token="<t>") == [("<t>", "learned_embeds")]
    assert words(metadata=metadata, fallback="name") == [("tag", "ss_tag_frequency")]
    assert words(fallback="name") == [("name", "asset name")]
    assert words() == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"a": {"b": 5}, "c": {"d": 3, "b": "x"}}',
        '{"a": {"b": Infinity}}',
        '{"a": {"b": "x"}}',
        '{"a": {"b": 3, "c": 3}}',
        "[" * 9999,
    ],
)
def test_a_strange_tag_frequency_tells_nothing(text: str) -> None:
    assert words(metadata={"ss_tag_frequency": text}) == []


@pytest.mark.parametrize("word", ["", "  ", "a\x00b", "x" * 201, "{hero}"])
def test_a_word_that_cannot_stand_in_a_prompt_is_refused(word: str) -> None:
    with pytest.raises(InvalidName):
        words(said=[word])


def test_a_trigger_is_its_word_and_source() -> None:
    assert find(said=[" sks "], card=b"", metadata={}) == (Trigger("sks", "user"),)


def test_a_tag_counts_over_all_folders() -> None:
    told = '{"1_a": {"hero": 50, "red": 30}, "2_b": {"hero": 50, "red": 30, "blue": 60}}'
    assert words(metadata={"ss_tag_frequency": told}) == [("hero", "ss_tag_frequency")]
