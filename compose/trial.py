"""Trial pictures: a prompt set rendered as one batch, quickly, to decide by and then thrown away.

Not the pixels of `compose.render`, which renders every picture by itself: a batch rounds differently.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compose.errors import IncompatibleBase, InvalidRequest, out_of_memory
from compose.layerwise import Stack
from compose.render import Picture, decode
from compose.schedulers import scheduler
from compose.settings import Settings
from compose.warm import WarmPipeline
from compose.words import Word

BATCH, BATCH_PIXELS = 16, 4 << 20
"""Pictures at once, at most: 16 of 512 x 512, 4 of 1024 x 1024."""


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
    may raise between steps. Raises IncompatibleBase for a size that the memory cannot hold, InvalidRequest
    for steps that the base's scheduler refuses.
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

    for start, part in _batches(told, max(1, min(BATCH, BATCH_PIXELS // side**2))):
        pipeline.scheduler = scheduler(warm.base, warm.scheduler_config)
        try:
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
        except (
            ValueError,
            ArithmeticError,
        ) as error:  # what diffusers says of steps that a scheduler refuses
            raise InvalidRequest(
                f"{warm.base.name} cannot render {steps} steps of {side}x{side}: {error}", field="steps"
            ) from error
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise IncompatibleBase(
                f"pictures of {side}x{side}, {len(part)} at once, do not fit into the memory of "
                f"{warm.device}; ask for a smaller size",
                field="size",
            ) from error
    return found


def _batches(
    told: Sequence[Mapping[str, Tensor]], most: int
) -> Iterator[tuple[int, list[Mapping[str, Tensor]]]]:
    """Where each batch starts, and its prompts: neighbours of one length, at most so many."""
    part: list[Mapping[str, Tensor]] = []
    for index, tensors in enumerate(told):
        if part and (len(part) == most or tensors["prompt_embeds"].shape != part[0]["prompt_embeds"].shape):
            yield index - len(part), part
            part = []
        part.append(tensors)
    if part:
        yield len(told) - len(part), part
