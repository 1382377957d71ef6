"""The cache of embeddings: what a new prompt costs it, and how much it holds."""

import cProfile
from types import CodeType

import pytest

from compose import prompts
from compose.prompts import Conditions
from compose.warm import WarmPipeline


def encode(warm: WarmPipeline, prompt: str, key: int = 0) -> Conditions:
    return warm.prompts.encode(prompt, key=key)


def calls(warm: WarmPipeline, key: int) -> int:
    """How often a function of the module is called for a prompt."""
    profile = cProfile.Profile()
    profile.runcall(encode, warm, "a red star", key)
    return sum(
        entry.callcount
        for entry in profile.getstats()
        if isinstance(entry.code, CodeType) and entry.code.co_filename == prompts.__file__
    )


def test_a_new_prompt_costs_the_same_however_many_are_kept(warm: WarmPipeline) -> None:
    first = calls(warm, 0)
    for key in range(1, 10):
        encode(warm, "a red star", key)
    assert calls(warm, 10) == first


def test_the_prompts_that_were_read_longest_ago_make_room(
    warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.nbytes for tensor in encode(warm, "a red star").tensors.values())
    monkeypatch.setattr(prompts, "CACHE_BYTES", 3 * size)
    warm.prompts.forget()
    for _ in range(2):  # what was forgotten takes no room
        kept = {word: encode(warm, word) for word in ("red", "green", "blue")}
        assert encode(warm, "red") is kept["red"]
        kept["white"] = encode(warm, "white")
        for word in ("blue", "red", "white"):
            assert encode(warm, word) is kept[word]
        assert encode(warm, "green") is not kept["green"]
        warm.prompts.forget()
