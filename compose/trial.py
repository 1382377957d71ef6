"""Trial pictures: a prompt set rendered as one batch, quickly, to decide by and then thrown away.

Not the pixels of `compose.render`, which renders every picture by itself: a batch rounds differently.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compose.factors import Factors
from compose.render import Picture
from compose.warm import Doras, WarmPipeline
from compose.words import Word

BATCH = 16


@torch.no_grad()
def pictures(
    warm: WarmPipeline,
    prompts: Sequence[str],
    *,
    layers: Mapping[str, Factors],
    words: Sequence[Word] = (),
    seed: int,
    steps: int,
    guidance: float,
    check: Callable[[], None],
    doras: Doras = (),
) -> list[Picture]:
    """One picture for each prompt at seed, seed + 1, …; `check` may raise between steps."""
    check()
    warm.apply(layers, key=None, doras=doras)
    pipeline, found = warm.pipeline, []
    with warm.words.teach(words):
        embedded = torch.cat([warm.words.encode(prompt)[0] for prompt in prompts])
        nothing, _ = warm.words.encode("")

    def between(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        check()
        return tensors

    for start in range(0, len(prompts), BATCH):
        part = embedded[start : start + BATCH]
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        batch = pipeline(
            prompt_embeds=part,
            negative_prompt_embeds=nothing.expand(len(part), -1, -1),
            generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
            callback_on_step_end=between,
        ).images
        found += list((batch * 255).round().astype("uint8"))
    return found
