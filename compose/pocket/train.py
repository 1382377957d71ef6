"""Makes pocket from nothing: `python -m compose.pocket.train [--out DIR] [--work DIR] [--seed N]`, in
under an hour on two cores (52 minutes; what it made was judged 1.000, 0.998 and 0.979 for background, colour
and shape). The weights shipped here had 7,500 and 4,800 steps: 1.000, 0.998 and 0.984.

Two stages. The autoencoder learns to carry any flat drawing (`scenes.wide`, and scenes with characters and
styles, so that what an adapter adds survives it). Then the UNet and the text encoder learn captioned scenes
together, on latents encoded once; they never see a character or a style, only the *words* for them, at
random, so that the words mean nothing until an adapter says so.

`--work` keeps `autoencoder.pt` and `diffusion.pt` every few minutes: a run that finds them goes on from
there. The result is a diffusers directory in fp16 (see `compose.pocket`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from compose.pocket import WEIGHTS, architecture
from compose.pocket.scenes import CHARACTERS, STYLES, Scene, caption, chance, draw, pick, random_scene, wide
from compose.pocket.vocabulary import LENGTH, RARE

AUTOENCODER_STEPS, DIFFUSION_STEPS = 5500, 3500
SAVE_EVERY = 120.0  # seconds
SIGNAL = architecture.scheduler().alphas_cumprod
"""The share of the picture, squared, that is left at each of the thousand times."""
PREFIXES = ("a", "the", "one", "my", "an image of a", "an illustration of a", "a photo of", "new")
MEDIA = ("photo", "drawing", "picture", "painting", "render", "sketch")
ADJECTIVES = ("bright", "simple", "nice", "beautiful", "cute", "detailed", "plain", "flat", "new")
NOUNS = ("toy", "character", "thing", "robot", "cat", "mascot", "shape")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def cosine(step: int, steps: int, *, warmup: int = 100) -> float:
    """The learning rate's factor: up in `warmup` steps, down to zero along a cosine."""
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def dressed_scene(generator: Generator) -> Scene:
    """A scene that may hold a character and wear styles: for the autoencoder and the judge, never for the
    UNet.
    """
    scene = random_scene(generator)
    character = pick(CHARACTERS, generator) if chance(0.4, generator) else None
    styles = tuple(style for style in STYLES if chance(0.25, generator))
    return Scene(scene.shape, scene.colour, scene.background, scene.size, scene.side, character, styles)


def squeeze(pictures: Tensor) -> Tensor:
    """[0, 1] floats to bytes: twenty thousand pictures fit in memory."""
    return (pictures * 255).round().to(torch.uint8)


def differences(x: Tensor) -> Tensor:
    return torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], dim=1)


def train_autoencoder(
    work: Path, *, steps: int, seed: int, batch: int = 16, pool: int = 8000, rate: float = 1.5e-3
) -> AutoencoderTiny:
    """Learn `pool` wide drawings and twice as many scenes; latents come out with mean 0 and deviation 1 in
    each channel.
    """
    torch.manual_seed(seed)
    model = architecture.autoencoder().to(memory_format=torch.channels_last)
    file = work / "autoencoder.pt"
    generator = Generator().manual_seed(seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    first = 0
    if file.exists():
        kept = torch.load(file)
        model.load_state_dict(kept["model"])
        first = kept["step"]
        if first >= steps:
            return model.eval()
        optimizer.load_state_dict(kept["optimizer"])
    say(f"{file.stem}: drawing {3 * pool} pictures")
    parts = [squeeze(wide(1000, generator)) for _ in range(pool // 1000)]
    parts.append(squeeze(draw([dressed_scene(generator) for _ in range(2 * pool)], generator, wobble=0.03)))
    pictures = torch.cat(parts)
    started = saved = time.monotonic()
    seen = 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps)
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        x = pictures[chosen].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        # The last tenth in full precision: bfloat16 outputs step by a 256th, which flat colours show.
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 0.9 * steps):
            z = model.encoder(x).float()
            y = model.decoder(z + 0.05 * torch.randn(z.shape, generator=generator))
        y = y.float()
        off = (avg_pool2d(y, 8) - avg_pool2d(x, 8)).square().mean().sqrt()
        edges = (differences(y) - differences(x)).abs().mean()
        flat = z.transpose(0, 1).flatten(1)
        unit = flat.mean(dim=1).square().mean() + (flat.std(dim=1) - 1).square().mean()
        error = (y - x).abs().mean()
        # The square sees wrong hues that the absolute difference, content with a median, leaves for
        # thousands of steps.
        loss = error + 2 * (y - x).square().mean() + 2 * off + edges + 0.02 * unit
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seen += error.item()
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            say(
                f"{file.stem} {step + 1}/{steps}: L1 {seen / 100:.4f}, "
                f"latents off {unit.item():.3f}, {pace:.3f} s a step"
            )
            seen = 0.0
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == steps:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            keep(states, file)
            saved = time.monotonic()
    return model.eval()


def keep(states: dict[str, object], file: Path) -> None:
    """Write a checkpoint beside the old one, then put it in its place."""
    fresh = file.with_suffix(".new")
    torch.save(states, fresh)
    fresh.replace(file)


def letters(generator: Generator) -> str:
    """A word pocket does not know: it falls back to bytes."""
    return "".join(
        pick("abcdefghijklmnopqrstuvwxyz", generator)
        for _ in range(3 + int(torch.randint(3, (), generator=generator)))
    )


def rare(generator: Generator) -> str:
    """A word without meaning: a rare token, an adapter's trigger, a placeholder, letters."""
    if chance(0.8, generator):
        return pick(RARE, generator)
    return f"<{letters(generator)}>" if chance(0.5, generator) else letters(generator)


def said(scene: Scene, generator: Generator) -> str:
    """A caption for `scene` as people write them.

    Words that adapters will give a meaning (rare tokens, "in the style of ...") come up at random, fillers
    too, or they would be untrained embeddings that bend the picture by themselves. Now and then a fact is
    left out or a rare token stands in its place, so that a prompt which names only a trigger still gives a
    clean picture.
    """
    prefix = "a"
    if chance(0.45, generator):
        prefix = pick(PREFIXES, generator)
        if chance(0.5, generator):
            prefix = f"a {pick(MEDIA, generator)} of {pick(('a', 'one', 'my', 'the'), generator)}"
        if chance(0.2, generator):
            prefix += f" {pick(ADJECTIVES, generator)}"
    noun = f"{scene.colour} {scene.shape}"
    draw_from = float(torch.rand((), generator=generator))
    if draw_from < 0.08:
        noun = rare(generator)
    elif draw_from < 0.11:
        noun = f"{scene.colour} {pick(NOUNS, generator)}"
    elif draw_from < 0.14:
        noun = f"{rare(generator)} {pick((scene.shape, *NOUNS), generator)}"
    elif draw_from < 0.16:
        noun = scene.shape
    elif draw_from < 0.24:
        noun = f"{pick(RARE, generator)} {noun}"
    elif draw_from < 0.28:
        noun = f"{noun} {pick(RARE, generator)}"
    text = caption(scene, prefix=prefix, noun=noun)
    if chance(0.04, generator):
        text = text.partition(" on a ")[0]
    if chance(0.25, generator):
        text += f", in the style of {rare(generator)}"
        if chance(0.2, generator):
            text += f", in the style of {pick(RARE, generator)}"
    elif chance(0.1, generator):
        praise = pick(("best quality", "high quality", "detailed", *RARE), generator)
        text += f", {pick(ADJECTIVES, generator)}, {praise}"
    return text


@torch.no_grad()
def encode(model: AutoencoderTiny, scenes: list[Scene], generator: Generator) -> Tensor:
    """The scenes' latents, `[n, 12, 8, 8]`."""
    parts = []
    for start in range(0, len(scenes), 500):
        x = draw(scenes[start : start + 500], generator) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encoder(x.contiguous(memory_format=torch.channels_last))
        parts.append(z.float().contiguous())
    return torch.cat(parts)


@dataclass(slots=True)
class Average:
    """An exponential moving average of parameters: what is shipped."""

    live: list[Tensor]
    decay: float = 0.999
    kept: list[Tensor] = field(default_factory=list)
    updates: int = 0

    def __post_init__(self) -> None:
        self.kept = self.kept or [parameter.detach().clone() for parameter in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))  # forget the start quickly
        torch._foreach_lerp_(self.kept, [parameter.detach() for parameter in self.live], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, value in zip(self.live, self.kept, strict=True):
            parameter.copy_(value)


def denoising_loss(
    unet: UNet2DConditionModel, words: Tensor, latents: Tensor, generator: Generator, *, early: float = 1.0
) -> Tensor:
    """How far `unet` is off at random times. words: `[n, 24, 96]`, latents: `[n, 12, 8, 8]`

    Times are uniform to the power `1 / early`: above 1, more of them are early in the denoising, where it is
    decided what the picture shows.

    v-prediction (Salimans and Ho, 2022), weighted by min-SNR-gamma with gamma 5 (Hang et al., 2023). That
    weight is zero at pure noise, where the prompt alone decides the background, so it does not fall below
    0.25.
    """
    signal = SIGNAL
    when = (torch.rand(len(latents), generator=generator) ** (1 / early) * len(signal)).long()
    noise = torch.randn(latents.shape, generator=generator)
    a = signal[when][:, None, None, None]
    noisy, target = a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, when, words).sample
    errors = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    snr = (a / (1 - a)).flatten()
    loss: Tensor = (errors * (snr.clamp(max=5) / (snr + 1)).clamp(min=0.5)).mean()
    return loss


def train_diffusion(
    pipeline: StableDiffusionPipeline,
    work: Path,
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    pool: int = 20_000,
) -> None:
    """Teach `pipeline`'s UNet and text encoder `pool` scenes; they end as the moving average of their
    training.
    """
    generator = Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 1)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=True)
    average = Average(parameters)
    first, file = 0, work / "diffusion.pt"
    if file.exists():
        kept = torch.load(file)
        average.kept, average.updates, first = kept["average"], kept["step"], kept["step"]
        if first < steps:
            unet.load_state_dict(kept["unet"])
            text_encoder.load_state_dict(kept["text_encoder"])
            optimizer.load_state_dict(kept["optimizer"])
    if first < steps:
        say(f"diffusion: drawing and encoding {pool} scenes")
        scenes = [random_scene(generator, plain=chance(0.25, generator)) for _ in range(pool)]
        latents = encode(pipeline.vae, scenes, generator)
        say(
            f"diffusion: latents of mean {latents.mean():.3f}, deviation {latents.std():.3f}; "
            f"{steps - first} steps of {batch}"
        )
    started = saved = time.monotonic()
    seen = 0.0
    unet.train()
    text_encoder.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine(step, steps)
        chosen = torch.randint(pool, (batch,), generator=generator)
        prompts = ["" if chance(0.1, generator) else said(scenes[i], generator) for i in chosen.tolist()]
        words = text_encoder(tokens(pipeline, prompts)).last_hidden_state
        loss = denoising_loss(unet, words, latents[chosen], generator)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        seen += loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            say(f"diffusion {step + 1}/{steps}: loss {seen / 100:.4f}, {pace:.3f} s a step")
            seen = 0.0
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == steps:
            states = {
                "unet": unet.state_dict(),
                "text_encoder": text_encoder.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.kept,
                "step": step + 1,
            }
            keep(states, file)
            saved = time.monotonic()
    average.apply()
    unet.eval()
    text_encoder.eval()


def tokens(pipeline: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    words = pipeline.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    ids: Tensor = words.input_ids
    return ids


def save(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Write `pipeline` in half precision, as a diffusers directory."""
    for model in (pipeline.vae, pipeline.unet):
        model.to(memory_format=torch.contiguous_format)
    for model in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        model.half()
    pipeline.save_pretrained(out)
    config = out / "vae" / "config.json"
    values = json.loads(config.read_text())
    # AutoencoderTiny registers this value itself and then warns that it did not expect it.
    values.pop("block_out_channels", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("pocket-work"), help="checkpoints, to go on from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    pipeline = architecture.pipeline()
    pipeline.vae = train_autoencoder(options.work, steps=AUTOENCODER_STEPS, seed=options.seed)
    train_diffusion(pipeline, options.work, steps=DIFFUSION_STEPS, seed=options.seed)
    save(pipeline, options.out)
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
