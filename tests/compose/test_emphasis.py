"""Emphasis as artists write it, and prompts of any length."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compose.emphasis import BREAK, escape, parse
from compose.errors import InvalidRequest
from compose.warm import WarmPipeline


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("", []),
        ("a red star", [("a red star", 1.0)]),
        ("a (red) star", [("a ", 1.0), ("red", 1.1), (" star", 1.0)]),
        ("a (red:1.4) star", [("a ", 1.0), ("red", 1.4), (" star", 1.0)]),
        ("a (red: 0.5) star", [("a ", 1.0), ("red", 0.5), (" star", 1.0)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:2) star:1.5)", [("a ", 1.5), ("red", 3.0), (" star", 1.5)]),
        (r"hero \(series\)", [("hero (series)", 1.0)]),
        (r"\\ \[x\]", [("\\ [x]", 1.0)]),
        ("red)", [("red)", 1.0)]),
        ("red:1.4)", [("red:1.4)", 1.0)]),
        ("(red", [("red", 1.1)]),
        ("[red:1.4)", [("red:1.4)", 1 / 1.1)]),
        ("at 10:30 (noon)", [("at 10:30 ", 1.0), ("noon", 1.1)]),
        ("one BREAK two", [("one ", 1.0), BREAK, (" two", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("()", []),
        (r"a \: b \BREAK c", [("a : b BREAK c", 1.0)]),
    ],
)
def test_what_is_written_is_what_is_meant(prompt: str, segments: list[tuple[str, float]]) -> None:
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in segments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in segments])


@pytest.mark.parametrize(
    "prompt", ["(red:11)", "(((red:3):3):3)", "(red:1..2)", "(red:-11)", f"(((a:{'9' * 300}):{'9' * 300}):0)"]
)
def test_a_weight_beyond_measure_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(prompt)


@given(st.text(max_size=40))
def test_escaped_text_is_itself_and_any_text_is_read(text: str) -> None:
    with suppress(InvalidRequest):
        parse(text)
    for within in (text, f"({text})", f"BREAK {text}:1.3) BREAK"):
        assert parse(escape(within)) == ([(within, 1.0)] if within else [])


def embedding(warm: WarmPipeline, prompt: str, negative: str = "") -> torch.Tensor:
    return warm.prompts.encode(prompt, negative).tensors["prompt_embeds"]


def test_emphasis_moves_along_the_line_from_nothing(warm: WarmPipeline) -> None:
    nothing, plain = embedding(warm, ""), embedding(warm, "red star")
    louder = embedding(warm, "(red star:1.5)")
    moved = louder[:, 1:3]
    torch.testing.assert_close(moved, (nothing + 1.5 * (plain - nothing))[:, 1:3])
    assert torch.equal(louder[:, 3:], plain[:, 3:])
    torch.testing.assert_close(embedding(warm, "(red star:0)")[:, 1:3], nothing[:, 1:3])


def test_a_long_prompt_takes_as_many_windows_as_it_needs(warm: WarmPipeline) -> None:
    window = warm.pipeline.tokenizer.model_max_length
    two = warm.prompts.encode("red " * (window - 1))
    assert two.tensors["prompt_embeds"].shape[1] == 2 * window
    assert two.tensors["negative_prompt_embeds"].shape[1] == 2 * window
    assert two.dropped == 0
    first = embedding(warm, "red " * (window - 2))
    assert torch.equal(two.tensors["prompt_embeds"][:, :window], first)
    assert torch.equal(two.tensors["negative_prompt_embeds"][:, window:], embedding(warm, ""))


def test_a_window_ends_at_a_comma_that_is_near_or_at_a_break(warm: WarmPipeline) -> None:
    window = warm.pipeline.tokenizer.model_max_length
    head, tail = "red " * (window - 5), "blue star green"
    cut = embedding(warm, f"{head}, {tail}")
    assert torch.equal(cut[:, window:], embedding(warm, tail))
    broken = embedding(warm, "red star BREAK blue moon")
    assert torch.equal(broken[:, :window], embedding(warm, "red star"))
    assert torch.equal(broken[:, window:], embedding(warm, "blue moon"))


def test_an_embedding_is_kept_for_the_same_words_and_stack_alone(warm: WarmPipeline) -> None:
    one = warm.prompts.encode("a red star", key="k")
    assert warm.prompts.encode("a red star", key="k") is one
    assert warm.prompts.encode("a red star", key="other") is not one
    assert warm.prompts.encode("a red star", "blue", key="k") is not one
    assert warm.prompts.encode("a red star", key=None) is not one


def test_windows_have_a_limit(warm: WarmPipeline) -> None:
    with pytest.raises(InvalidRequest, match="take 103 windows of the text encoder, the limit is 102"):
        embedding(warm, "a BREAK " * 102 + "b")
