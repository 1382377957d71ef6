"""Words of a job: there while they are taught, nowhere else, and never in another word's way."""

import pytest
import torch

from compose.errors import IncompatibleBase, InvalidRequest
from compose.warm import WarmPipeline
from compose.words import SPARE_ROWS, Rows, Word

VECTORS = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))


def encode(warm: WarmPipeline, prompt: str, *words: Word) -> torch.Tensor:
    with warm.words.teach(words):
        return warm.prompts.encode(prompt).tensors["prompt_embeds"]


def rows(warm: WarmPipeline) -> Rows:
    return warm.words._rows["clip_l"]


def word(text: str, vectors: torch.Tensor, weight: float = 1.0) -> Word:
    return Word(text, {"clip_l": vectors}, weight)


def test_a_prompt_without_words_is_encoded_as_the_pipeline_does(warm: WarmPipeline) -> None:
    prompt = "a small red star, on the left; unheard-of wörds"
    theirs, _ = warm.pipeline.encode_prompt(prompt, "cpu", 1, False)
    assert torch.equal(encode(warm, prompt), theirs)
    assert torch.equal(encode(warm, prompt, word("<glow>", VECTORS)), theirs)


def test_a_word_means_its_vectors_and_only_where_it_stands_alone(warm: WarmPipeline) -> None:
    plain, star = encode(warm, "a red star"), word("star", VECTORS)
    assert not torch.allclose(encode(warm, "a red star", star), plain)
    assert torch.equal(encode(warm, "a red starling", star), encode(warm, "a red starling"))
    assert not torch.allclose(encode(warm, "a red star.", star), encode(warm, "a red star."))


def test_a_word_in_brackets_may_touch_others(warm: WarmPipeline) -> None:
    """As it may in a tokenizer that knows it."""
    apart = encode(warm, "a red <glow> star", word("<glow>", VECTORS))
    assert torch.equal(encode(warm, "a red<glow>star", word("<glow>", VECTORS)), apart)
    half = word("glow>", VECTORS)
    assert torch.equal(encode(warm, "a red glow>star", half), apart)
    assert torch.equal(encode(warm, "a red aglow>star", half), encode(warm, "a red aglow>star"))


def test_two_jobs_may_use_one_word_differently_and_nothing_stays(warm: WarmPipeline) -> None:
    before = encode(warm, "a <glow> star")
    one = encode(warm, "a <glow> star", word("<glow>", VECTORS))
    two = encode(warm, "a <glow> star", word("<glow>", -VECTORS))
    assert not torch.allclose(one, two)
    assert torch.equal(encode(warm, "a <glow> star"), before)
    assert torch.equal(encode(warm, "a <glow> star", word("<glow>", VECTORS)), one)
    assert not rows(warm).table[-SPARE_ROWS:].any()


def test_as_many_vectors_take_as_many_places_and_the_window_is_told(warm: WarmPipeline) -> None:
    with warm.words.teach([word("<glow>", VECTORS)]):
        assert warm.prompts.encode("<glow> " * 11, literal=True).dropped == 0
        assert warm.prompts.encode("<glow> " * 12, literal=True).dropped == 2


def test_weight_zero_is_the_mean_word_and_one_the_word_itself(warm: WarmPipeline) -> None:
    mean = rows(warm).mean.expand(2, -1)
    assert torch.allclose(
        encode(warm, "<glow>", word("<glow>", VECTORS, 0.0)), encode(warm, "<glow>", word("<glow>", mean))
    )
    assert not torch.allclose(
        encode(warm, "<glow>", word("<glow>", VECTORS, 0.5)),
        encode(warm, "<glow>", word("<glow>", VECTORS, 1.0)),
    )


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            [word("<a>", VECTORS), word("<a>", VECTORS)],
            InvalidRequest,
            "two adapters .* claim the word '<a>'",
        ),
        ([word("<a>", torch.zeros(1, 768))], IncompatibleBase, "vectors of 768 numbers, this base's have 96"),
        ([word(f"<{i}>", torch.zeros(64, 96)) for i in range(5)], InvalidRequest, "more than 256 vectors"),
    ],
)
def test_what_cannot_be_taught(
    warm: WarmPipeline, words: list[Word], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), warm.words.teach(words):
        pass
    assert not rows(warm).table[-SPARE_ROWS:].any()
