"""Trial pictures: a prompt set rendered as one batch, quickly, to decide by and then thrown away.

Not the pixels of `compose.render`, which renders every picture by itself: a batch rounds differently.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compose.render import Picture, decode
from compose.schedulers import scheduler
from compose.settings import Settings
from compose.warm import Stack, WarmPipeline
from compose.words import Word

BATCH = 16


@torch.no_grad()
def pictures(
    warm: WarmPipeline,
    prompts: Sequence[str],
    *,
    stack: Stack,
    words: Sequence[Word] = (),
    seed: int,
    steps: int,
    size: int = 0,
    guidance: float,
    check: Callable[[], None],
) -> list[Picture]:
    """One picture for each prompt at seed, seed + 1, …, `size` pixels a side, 0 for the base's own; `check`
    may raise between steps. Raises IncompatibleBase for a size that the memory cannot hold.
    """
    check()
    warm.apply(stack, check=check)
    pipeline, found = warm.pipeline, list[Picture]()
    side = size or warm.base.size
    settings = Settings(prompt="", width=side, height=side)
    with warm.words.teach(words):
        told = [warm.prompts.encode(prompt).tensors for prompt in prompts]

    def between(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        check()
        return tensors

    for start, part in _batches(told):
        pipeline.scheduler = scheduler(warm.base, warm.scheduler_config)
        batch = pipeline(
            **{name: torch.cat([tensors[name] for tensors in part]) for name in part[0]},
            generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))],
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=side,
            height=side,
            output_type="latent",
            callback_on_step_end=between,
        ).images
        for latents in batch:
            check()
            found.append(decode(warm, latents[None], settings))
    return found


def _batches(told: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[int, list[Mapping[str, Tensor]]]]:
    """Where each batch starts, and its prompts: neighbours of one length."""
    part: list[Mapping[str, Tensor]] = []
    for index, tensors in enumerate(told):
        if part and (len(part) == BATCH or tensors["prompt_embeds"].shape != part[0]["prompt_embeds"].shape):
            yield index - len(part), part
            part = []
        part.append(tensors)
    if part:
        yield len(told) - len(part), part
