"""A request -> pictures, exactly repeatable.

Every picture is rendered by itself from its own CPU generator (seed + index), with a fresh scheduler, so
neither the count nor what ran before changes a pixel; a batch, which does, is asked for. Between steps the
caller's `check` may raise: that is how a render is cancelled.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from compose.errors import IncompatibleBase, InvalidRequest, out_of_memory
from compose.guiding import UNGUIDED, Guides, guided
from compose.inpaint import Blend, by_blending
from compose.layerwise import Stack
from compose.prompts import Conditions
from compose.schedule import ALWAYS, Plan
from compose.schedulers import kind_of, scheduler, seeded
from compose.settings import Settings
from compose.source import Source, pasted
from compose.warm import WarmPipeline
from compose.words import Word

Picture = NDArray[np.uint8]
"""`[height, width, 3]`, RGB."""


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


@runtime_checkable
class YieldingListener(Protocol):
    """A listener that may want the render to stop between two pictures, to go on at another time."""

    def gives_way(self) -> bool:
        """Whether it stops here; asked before every picture, or batch, but the first."""


@dataclass(slots=True)
class Timings:
    """Seconds by phase: patch, embed, denoise, decode; `told` hears of each as it ends."""

    seconds: dict[str, float] = field(default_factory=dict)
    told: Callable[[str, float], None] | None = None

    def since(self, phase: str, start: float) -> float:
        """Adds the time since `start` to a phase; the time now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - start
        self.tell(phase, now - start)
        return now

    def tell(self, phase: str, seconds: float) -> None:
        """A phase has ended."""
        if self.told:
            self.told(phase, seconds)


@dataclass(frozen=True, slots=True)
class Rendered:
    """How a render went: seconds by phase, tokens of the prompt beyond the base's window, and the places of
    adapters in the stack that acted in none of the steps; and before which picture it gave way, if it did.
    """

    seconds: Mapping[str, float]
    tokens_dropped: int
    idle: tuple[int, ...] = ()
    gave_way_at: int | None = None


@dataclass(slots=True)
class _Run:
    """One render under way."""

    warm: WarmPipeline
    settings: Settings
    stack: Stack
    key: object
    plan: Plan
    source: Source | None
    guides: Guides
    listener: Listener
    preview_every: int
    timings: Timings
    acted: set[int] = field(default_factory=set)

    def apply(self, step: int, steps: int) -> None:
        """The stack as it acts in this step."""
        factors = self.plan.factors(step, steps, len(self.stack))
        self.acted |= {place for place in range(len(self.stack)) if not factors or factors[place]}
        self.patch(factors)

    def patch(self, factors: tuple[float, ...]) -> None:
        start = time.perf_counter()
        key = None if self.key is None else (self.key, factors)
        self.warm.apply(self.stack, factors=factors, key=key, check=self.listener.check)
        seconds = self.timings.seconds
        seconds["patch"] = seconds.get("patch", 0.0) + time.perf_counter() - start


@torch.no_grad()
def render(
    warm: WarmPipeline,
    settings: Settings,
    *,
    stack: Stack,
    words: Sequence[Word] = (),
    key: object = None,
    listener: Listener,
    preview_every: int = 0,
    plan: Plan = ALWAYS,
    source: Source | None = None,
    guides: Guides = UNGUIDED,
    only: range | None = None,
) -> Rendered:
    """Applies the stack, renders every picture, or `only` these whole batches, tells the listener, which may
    end it early. The stack stays applied for the next with this key. Raises InvalidRequest for an unknown
    scheduler, IncompatibleBase.
    """
    timings = Timings(told=listener.phase if isinstance(listener, PhaseListener) else None)
    run = _Run(warm, settings, stack, key, plan, source, guides, listener, preview_every, timings)
    kind_of(warm.base, settings.scheduler)  # an unknown one ends here
    listener.check()
    run.apply(0, 1)
    timings.tell("patch", timings.seconds["patch"])
    start = time.perf_counter()
    with warm.words.teach(words):
        conditions = warm.prompts.encode(
            settings.prompt,
            settings.negative_prompt,
            literal=settings.literal,
            key=warm.text_key(key),
        )
    run.timings.since("embed", start)
    wanted, stopped = range(settings.count) if only is None else only, None
    for first in wanted[:: settings.batch]:
        if first > wanted.start and isinstance(listener, YieldingListener) and listener.gives_way():
            stopped = first
            break
        images = range(first, min(first + settings.batch, wanted.stop))
        run.apply(0, 1)
        listener.check()
        with _each_alone(run) if plan.mode == "composite" and len(stack) > 1 else _together():
            latents = _guided(run, images, conditions)
        for place, image in enumerate(images):
            listener.check()
            start = time.perf_counter()
            # a slice keeps the strides, and so the kernels that diffusers' own decoding would take
            picture = decode(warm, latents[place : place + 1], settings)
            if source is not None:
                picture = pasted(picture, source)
            run.timings.since("decode", start)
            listener.picture(image, picture)
    idle = tuple(place for place in range(len(stack)) if place not in run.acted)
    return Rendered(run.timings.seconds, conditions.dropped, idle, stopped)


@contextmanager
def _together() -> Iterator[None]:
    yield


@contextmanager
def _each_alone(run: _Run) -> Iterator[None]:
    """The denoiser predicts the mean of what it predicts with each adapter alone."""
    denoiser, alone = run.warm.denoiser, len(run.stack)
    forward: Callable[..., Any] = denoiser.forward

    @functools.wraps(forward)
    def composite(*args: Any, **more: Any) -> Any:
        total: Tensor | None = None
        more["return_dict"] = False
        for now in range(alone):
            run.listener.check()
            run.patch(tuple(float(place == now) for place in range(alone)))
            predicted = forward(*args, **more)[0]
            total = predicted if total is None else total + predicted
        return (total / alone if total is not None else total,)

    denoiser.forward = composite
    try:
        yield
    finally:
        del denoiser.forward


def _guided(run: _Run, images: range, conditions: Conditions) -> Tensor:
    """Latents of these pictures, `[n, …]`."""
    source, start = run.source, time.perf_counter()
    blends = source is not None and source.mask is not None and by_blending(run.warm)
    kind = "" if source is None else "image" if source.mask is None or blends else "mask"
    seeds = [run.settings.seed + image for image in images]
    how: dict[str, Any] = {"kind": kind, "settings": run.settings, "seeds": seeds}
    try:
        with guided(run.warm, run.guides, **how) as (pipeline, more):
            if run.guides:
                run.timings.since("guide", start)
                run.listener.check()
            return _denoise(run, images, conditions, pipeline, more, blends=blends)
    except RuntimeError as error:
        if not (run.guides and out_of_memory(error)):
            raise
        raise IncompatibleBase(
            f"what steers this render ({', '.join(run.guides.names())}) does not fit into the memory of "
            f"{run.warm.device}; leave some out, or ask for a smaller picture",
            field="controls" if run.guides.controls else "references",
        ) from error


def _denoise(
    run: _Run,
    images: range,
    conditions: Conditions,
    pipeline: Any,
    guides: Mapping[str, Any],
    *,
    blends: bool,
) -> Tensor:
    """Latents of these pictures, `[n, …]`, by a pipeline that starts from what the render does."""
    settings, source, warm = run.settings, run.source, run.warm
    seeds = [settings.seed + image for image in images]
    blend = Blend(warm, source, seeds) if blends and source is not None else None
    pipeline.scheduler = _scheduler(run)
    clean = _watch(pipeline.scheduler) if run.preview_every else {}

    def between(pipe: Any, index: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        run.listener.check()
        if blend:
            tensors["latents"] = blend(pipe, index, tensors["latents"])
        inner = max(1, pipe.num_timesteps)  # some schedulers ask the model twice a step
        done, before = ((i * performed) // inner for i in (index + 1, index))
        if done == before:
            return tensors
        step = done * settings.steps // performed
        for image in images:
            run.listener.step(image, step)
        if done < performed:
            if run.plan.mode != "composite":
                run.apply(done, performed)
            if run.preview_every and step % run.preview_every == 0:
                for image, latent in zip(images, clean["x0"], strict=True):
                    run.listener.preview(image, step, decode(warm, latent[None], settings))
        return tensors

    n, performed = len(images), _performed(warm, settings.steps, source)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    generator = generators[0] if n == 1 else generators
    seeded(pipeline.scheduler, generator)
    more: dict[str, Any] = {**guides}
    if source is not None:
        picture = Image.fromarray(source.picture)
        mask = None if blend else source.mask
        # one each: given one for all, diffusers draws from the first generator alone
        more |= {"image": picture if n == 1 else [picture] * n, "strength": source.strength}
        if mask is not None:
            more["mask_image"] = Image.fromarray(mask, "L")
    takes = inspect.signature(pipeline.__call__).parameters
    if "height" in takes:
        more |= {"width": settings.width, "height": settings.height}
    told = {
        name: t if n == 1 else t.repeat(n, *[1] * (t.dim() - 1)) for name, t in conditions.tensors.items()
    }
    start = time.perf_counter()
    patched = run.timings.seconds.get("patch", 0.0)
    try:
        latents: Tensor = pipeline(
            **told,
            generator=generator,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            output_type="latent",
            callback_on_step_end=between,
            **more,
        ).images
    except (ValueError, ArithmeticError) as error:  # a pipeline or scheduler refuses what is combined here
        raise InvalidRequest(
            f"{warm.base.name} cannot render {settings.steps} steps of {type(pipeline.scheduler).__name__} "
            f"like this: {error}",
            field="scheduler",
        ) from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise IncompatibleBase(
            f"{settings.width}x{settings.height} pixels, {n} at once, do not fit into the memory of "
            f"{warm.device}; ask for a smaller picture or batch",
            field="width",
        ) from error
    finally:
        warm.pipeline.vae.to(warm.vae_dtype)  # SDXL's own img2img leaves it in half precision
    run.timings.since("denoise", start + run.timings.seconds.get("patch", 0.0) - patched)
    return latents


def _performed(warm: WarmPipeline, steps: int, source: Source | None) -> int:
    """Steps that diffusers does: from a picture those of UNets round what is done down, and those of
    transformers what is left out.
    """
    done = steps * (source.strength if source else 1.0)
    return max(1, int(done) if hasattr(warm.pipeline, "unet") else steps - int(steps - done))


def _scheduler(run: _Run) -> Any:
    """A fresh one, as the settings say. Raises InvalidRequest."""
    warm, settings = run.warm, run.settings
    return scheduler(warm.base, warm.scheduler_config, settings.scheduler, settings.scheduler_options)


def _watch(scheduler: Any) -> dict[str, Tensor]:
    """Keeps what each step of this scheduler thinks the clean latent is, where it says so."""
    seen: dict[str, Tensor] = {}
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, return_dict: bool = True, **more: Any) -> Any:
        output = step(*args, return_dict=True, **more)
        clean = getattr(output, "pred_original_sample", getattr(output, "denoised", None))
        seen["x0"] = output.prev_sample if clean is None else clean
        return output if return_dict else (output.prev_sample,)

    scheduler.step = watched
    return seen


def decode(warm: WarmPipeline, latents: Tensor, settings: Settings) -> Picture:
    """The picture of latents `[1, …]`, of the size that the settings say."""
    pipeline, vae = warm.pipeline, warm.pipeline.vae
    if warm.base.family == "flux":  # a row of patches, there
        latents = pipeline._unpack_latents(
            latents, settings.height, settings.width, pipeline.vae_scale_factor
        )
    config, latents = vae.config, latents.to(vae.dtype)  # as diffusers: SDXL's divides in full precision
    if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
        mean, std = (
            latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
        if shift := getattr(config, "shift_factor", None):
            latents = latents + shift
    decoded = vae.decode(latents, return_dict=False)[0]
    scaled = (decoded[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    picture: Picture = scaled.permute(1, 2, 0).cpu().numpy()
    return picture
