"""Schedulers by name, batches, compiled models, and switches that nothing has to be compiled for again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from compose.errors import InvalidRequest
from compose.pocket.calibrate import Silent
from compose.render import Picture, render
from compose.schedulers import schedulers
from compose.settings import Settings
from compose.warm import WarmPipeline, alone
from tests.adapters import random_factors

SETTINGS = Settings(prompt="a red star", seed=5, steps=4, guidance=4.0, width=64, height=64)


class Kept(Silent):
    """Keeps pictures and steps."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self.steps: list[tuple[int, int]] = []

    def step(self, image: int, step: int) -> None:
        self.steps.append((image, step))

    def picture(self, image: int, picture: Picture) -> None:
        self.pictures.append(picture)


def test_every_scheduler_that_is_named_renders_repeatably(warm: WarmPipeline) -> None:
    names = list(schedulers(warm.base))
    assert names[0] == "DDIMScheduler"
    assert {"EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"} < {
        *names
    }
    seen: list[bytes] = []
    for name in names:
        first, again = Kept(), Kept()
        for kept in (first, again):
            render(warm, replace(SETTINGS, scheduler=name), stack=(), listener=kept)
        assert np.array_equal(first.pictures[0], again.pictures[0]), name
        assert first.steps[-1] == (0, 4), name  # though Heun asks the model seven times
        assert [step for _, step in first.steps] == [1, 2, 3, 4], name
        seen.append(first.pictures[0].tobytes())
    assert len(set(seen)) > len(seen) // 2
    with pytest.raises(InvalidRequest, match="cannot be used with pocket; there are DDIM"):
        render(warm, replace(SETTINGS, scheduler="NoScheduler"), stack=(), listener=Kept())


def test_a_batch_is_asked_for_and_close_to_one_by_one(warm: WarmPipeline) -> None:
    one, many = Kept(), Kept()
    render(warm, replace(SETTINGS, count=3), stack=(), listener=one)
    render(warm, replace(SETTINGS, count=3, batch=2), stack=(), listener=many)
    assert len(many.pictures) == 3
    for a, b in zip(one.pictures, many.pictures, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 2
    assert np.array_equal(one.pictures[2], many.pictures[2])  # alone in its batch
    assert many.steps[:4] == [(0, 1), (1, 1), (0, 2), (1, 2)]


def test_switches_compile_nothing_again(warm: WarmPipeline) -> None:
    counter = CompileCounter()
    compiled = torch.compile(warm.denoiser, backend=counter, dynamic=False)
    latent, words = (
        torch.zeros(1, warm.denoiser.config.in_channels, 8, 8),
        warm.prompts.encode("a star").tensors["prompt_embeds"],
    )
    stacks = [alone(random_factors("pocket", seed=seed, rank=1 + seed)) for seed in range(4)]
    try:
        with torch.no_grad():
            bare = compiled(latent, 500, words, return_dict=False)[0]
            frames, seen = counter.frame_count, []
            for turn in range(20):
                warm.apply(stacks[turn % 4])
                seen.append(compiled(latent, 500, words, return_dict=False)[0])
            warm.apply(())
            again = compiled(latent, 500, words, return_dict=False)[0]
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == frames > 0
    assert torch.equal(again, bare)
    assert torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[0], bare)
