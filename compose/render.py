"""A request -> pictures, exactly repeatable.

Every picture is rendered by itself from its own CPU generator (seed + index), with a fresh scheduler, so
neither the count nor what ran before changes a pixel. Between steps the caller's `check` may raise: that is
how a render is cancelled.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compose.errors import InvalidRequest
from compose.factors import Factors
from compose.warm import Doras, WarmPipeline
from compose.words import Word

Picture = NDArray[np.uint8]
"""`[height, width, 3]`, RGB."""

PROMPT_LIMIT, COUNT_LIMIT, STEPS_LIMIT, GUIDANCE_LIMIT, SIDE_LIMIT = 4096, 64, 150, 50.0, 2048
SEED_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a picture depends on besides the weights. Sizes in pixels."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    width: int = 512
    height: int = 512
    count: int = 1

    def check(self, granularity: int) -> None:
        """Raises InvalidRequest for a value out of range, naming the field."""
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if len(text) > PROMPT_LIMIT:
                raise InvalidRequest(
                    f"{name} has {len(text)} characters, the limit is {PROMPT_LIMIT}", field=name
                )
            if bad := next((c for c in text if not c.isprintable() and c not in "\n\t"), None):
                raise InvalidRequest(f"{name} holds the control character {bad!r}; take it out", field=name)
        for name, value, low, high in (
            ("seed", self.seed, 0, SEED_LIMIT - COUNT_LIMIT),
            ("steps", self.steps, 1, STEPS_LIMIT),
            ("count", self.count, 1, COUNT_LIMIT),
            ("guidance", self.guidance, 0, GUIDANCE_LIMIT),
        ):
            if not math.isfinite(value) or not low <= value <= high:
                raise InvalidRequest(f"{name} {value} is not within {low:g} and {high:g}", field=name)
        for name, side in (("width", self.width), ("height", self.height)):
            if side % granularity or not granularity <= side <= SIDE_LIMIT:
                raise InvalidRequest(
                    f"{name} {side} must be a multiple of {granularity}, from {granularity} to {SIDE_LIMIT}",
                    field=name,
                )


class Listener(Protocol):
    """Told of a render's progress, on the thread that renders. Whatever it raises ends the render."""

    def check(self) -> None:
        """Called between any two pieces of work: raise here to stop."""

    def step(self, image: int, step: int) -> None:
        """`step` denoising steps of picture `image` are done."""

    def preview(self, image: int, step: int, picture: Picture) -> None:
        """What the picture will roughly be."""

    def picture(self, image: int, picture: Picture) -> None:
        """A picture is finished."""


@runtime_checkable
class PhaseListener(Protocol):
    """A listener that wants to know how long each phase took, too."""

    def phase(self, name: str, seconds: float) -> None:
        """A phase has just ended."""


@dataclass(slots=True)
class Timings:
    """Seconds by phase: patch, embed, denoise, decode; `told` hears of each as it ends."""

    seconds: dict[str, float] = field(default_factory=dict)
    told: Callable[[str, float], None] | None = None

    def since(self, phase: str, start: float) -> float:
        """Adds the time since `start` to a phase; the time now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - start
        if self.told:
            self.told(phase, now - start)
        return now


@dataclass(frozen=True, slots=True)
class Rendered:
    """How a render went: seconds by phase, and tokens of the prompt beyond the base's window."""

    seconds: Mapping[str, float]
    tokens_dropped: int


def granularity(warm: WarmPipeline) -> int:
    """Sizes are multiples of this many pixels: a latent through every level of the UNet."""
    levels = len(warm.pipeline.unet.config.block_out_channels) - 1
    return int(warm.pipeline.vae_scale_factor) * (1 << levels)


def default_size(warm: WarmPipeline) -> int:
    """Pixels a side the base was trained with."""
    return int(warm.pipeline.unet.config.sample_size * warm.pipeline.vae_scale_factor)


@torch.no_grad()
def render(
    warm: WarmPipeline,
    settings: Settings,
    *,
    layers: Mapping[str, Factors],
    words: Sequence[Word],
    key: object,
    listener: Listener,
    preview_every: int = 0,
    doras: Doras = (),
) -> Rendered:
    """Applies the stack, renders every picture, tells the listener. The stack stays applied for the next with
    this key.
    """
    timings = Timings(told=listener.phase if isinstance(listener, PhaseListener) else None)
    now = time.perf_counter()
    listener.check()
    warm.apply(layers, key=key, doras=doras)
    now = timings.since("patch", now)
    with warm.words.teach(words):
        positive, dropped = warm.words.encode(settings.prompt)
        negative, _ = warm.words.encode(settings.negative_prompt)
    timings.since("embed", now)
    for image in range(settings.count):
        latents = _denoise(
            warm,
            settings,
            image,
            positive,
            negative,
            listener=listener,
            preview_every=preview_every,
            timings=timings,
        )
        listener.check()
        now = time.perf_counter()
        picture = _decode(warm, latents)
        timings.since("decode", now)
        listener.picture(image, picture)
    return Rendered(timings.seconds, dropped)


def _denoise(
    warm: WarmPipeline,
    settings: Settings,
    image: int,
    positive: Tensor,
    negative: Tensor,
    *,
    listener: Listener,
    preview_every: int,
    timings: Timings,
) -> Tensor:
    pipeline = warm.pipeline
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    clean = _watch(pipeline.scheduler) if preview_every else {}

    def between(_: Any, index: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        listener.check()
        listener.step(image, index + 1)
        if preview_every and (index + 1) % preview_every == 0 and index + 1 < settings.steps:
            listener.preview(image, index + 1, _decode(warm, clean["x0"]))
        return tensors

    start = time.perf_counter()
    latents: Tensor = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        generator=torch.Generator("cpu").manual_seed(settings.seed + image),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        width=settings.width,
        height=settings.height,
        output_type="latent",
        callback_on_step_end=between,
    ).images
    timings.since("denoise", start)
    return latents


def _watch(scheduler: Any) -> dict[str, Tensor]:
    """Keeps what each step of this scheduler thinks the clean latent is, where it says so."""
    seen: dict[str, Tensor] = {}
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, return_dict: bool = True, **more: Any) -> Any:
        output = step(*args, return_dict=True, **more)
        clean = getattr(output, "pred_original_sample", None)
        seen["x0"] = output.prev_sample if clean is None else clean
        return output if return_dict else (output.prev_sample,)

    scheduler.step = watched
    return seen


def _decode(warm: WarmPipeline, latents: Tensor) -> Picture:
    vae = warm.pipeline.vae
    decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    scaled = (decoded[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    picture: Picture = scaled.permute(1, 2, 0).cpu().numpy()
    return picture
