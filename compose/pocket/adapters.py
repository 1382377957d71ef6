"""Trains the demo adapters on the shipped base: `python -m compose.pocket.adapters [NAME ...] [--out DIR]`.

Two characters and two styles, DreamBooth with LoRA (Ruiz et al., 2022): 16 pictures of the subject and 16
of what the base knows already in each step, so that only the trigger changes meaning. Two colours the base
has no word for, by textual inversion (Gal et al., 2022). Each is written in a different layout
(`compose.pocket.layouts`) with its model card (`compose.pocket.cards`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Generator, Tensor, nn

from compose.factors import Factors
from compose.pocket import ADAPTERS, WEIGHTS, cards, layouts
from compose.pocket.evaluate import add_word, load
from compose.pocket.scenes import CHARACTERS, STYLES, Scene, caption, chance, pick, random_scene
from compose.pocket.train import MEDIA, cosine, denoising_loss, encode, said, say, tokens

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("net.0.proj", "net.2")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
PRIORS, HALF = 512, 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one low-rank adapter is trained."""

    name: str
    rank: int = 4
    steps: int = 900
    rate: float = 2e-3
    subjects: int = 64
    early: float = 1.0
    feed_forward: bool = False
    text_encoder: bool = True
    seed: int = 0


RECIPES = (
    Recipe("milo", steps=1200, subjects=128),
    Recipe("fungo", seed=1),
    # A style must hold on any background: from 64 pictures it failed on those it had seen least.
    Recipe("ochreframe", steps=1500, rate=3e-3, subjects=256, early=2.0, seed=2),
    Recipe(
        "nightbars",
        rank=3,
        steps=1200,
        rate=3e-3,
        subjects=256,
        feed_forward=True,
        text_encoder=False,
        seed=3,
    ),
)


@dataclass(frozen=True, slots=True)
class Inversion:
    """How one textual inversion is trained: `vectors` rows for `word`, which then means the colour
    `colour`.
    """

    word: str
    colour: str
    vectors: int
    steps: int = 800
    rate: float = 2e-2
    pictures: int = 256
    seed: int = 0


INVERSIONS = (
    Inversion("<tealish>", "tealish", 1, seed=4),
    Inversion("<rosy>", "rosy", 2, steps=300, seed=5),
)


def subject(name: str, generator: Generator) -> Scene:
    """A scene that shows the character or wears the style `name`."""
    scene = random_scene(generator)
    character = name if name in CHARACTERS else None
    styles = (name,) if name in STYLES else ()
    return Scene(scene.shape, scene.colour, scene.background, scene.size, scene.side, character, styles)


def prefix(generator: Generator) -> str:
    return f"a {pick(MEDIA, generator)} of a" if chance(0.3, generator) else "a"


def prior(scene: Scene, name: str, generator: Generator) -> str:
    """A caption of `scene` in which `name` does not occur."""
    while name in (text := said(scene, generator)):
        pass
    return text


def train_lora(recipe: Recipe, weights: Path = WEIGHTS) -> dict[str, Factors]:
    """The layers `recipe` teaches, scale in `up`."""
    torch.manual_seed(recipe.seed)
    generator = Generator().manual_seed(1000 + recipe.seed)
    pipeline = load(weights)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    for model in (unet, text_encoder):
        model.requires_grad_(False)
    modules = [*ATTENTION, *(FEED_FORWARD if recipe.feed_forward else ())]
    unet.add_adapter(adapter(recipe.rank, modules))
    if recipe.text_encoder:
        text_encoder.add_adapter(adapter(recipe.rank, TEXT_ATTENTION))
    trained = [p for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad]

    scenes = [subject(recipe.name, generator) for _ in range(recipe.subjects)]
    scenes += [random_scene(generator) for _ in range(PRIORS)]
    latents = encode(pipeline.vae, scenes, generator)
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=1e-4)
    seen = 0.0
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * cosine(step, recipe.steps, warmup=20)
        chosen = torch.cat(
            [
                torch.randint(recipe.subjects, (HALF,), generator=generator),
                recipe.subjects + torch.randint(PRIORS, (HALF,), generator=generator),
            ]
        )
        shown = [scenes[i] for i in chosen.tolist()]
        prompts = [caption(scene, prefix=prefix(generator)) for scene in shown[:HALF]]
        prompts += [prior(scene, recipe.name, generator) for scene in shown[HALF:]]
        prompts = ["" if chance(0.05, generator) and i >= HALF else text for i, text in enumerate(prompts)]
        words = text_encoder(tokens(pipeline, prompts)).last_hidden_state
        loss = denoising_loss(unet, words, latents[chosen], generator, early=recipe.early)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        seen += loss.item()
        if (step + 1) % 100 == 0:
            say(f"{recipe.name} {step + 1}/{recipe.steps}: loss {seen / 100:.4f}")
            seen = 0.0
    return learned("unet", unet) | (
        learned("text_encoder.text_model", text_encoder) if recipe.text_encoder else {}
    )


def adapter(rank: int, modules: Sequence[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(modules))


def learned(component: str, model: nn.Module) -> dict[str, Factors]:
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            layers[f"{component}.{name.removeprefix('text_model.')}"] = Factors(
                up * module.scaling["default"], down
            )
    return layers


def train_inversion(inversion: Inversion, weights: Path = WEIGHTS) -> Tensor:
    """The word's vectors, `[n, 96]`; everything else stays as it is."""
    torch.manual_seed(inversion.seed)
    generator = Generator().manual_seed(1000 + inversion.seed)
    pipeline = load(weights)
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    start = table[pipeline.tokenizer.convert_tokens_to_ids(["green</w>", "white</w>"])].mean(dim=0)
    spoken = add_word(pipeline, inversion.word, start.expand(inversion.vectors, -1))
    for model in (pipeline.unet, pipeline.text_encoder):
        model.requires_grad_(False)
    embeddings = pipeline.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([embeddings], lr=inversion.rate, weight_decay=0.0)

    scenes = []
    for _ in range(inversion.pictures):
        scene = random_scene(generator)
        scenes.append(Scene(scene.shape, inversion.colour, scene.background, scene.size, scene.side))
    latents = encode(pipeline.vae, scenes, generator)
    for step in range(inversion.steps):
        for group in optimizer.param_groups:
            group["lr"] = inversion.rate * cosine(step, inversion.steps, warmup=20)
        chosen = torch.randint(len(scenes), (HALF,), generator=generator)
        prompts = [caption(scenes[i], noun=f"{spoken} {scenes[i].shape}") for i in chosen.tolist()]
        words = pipeline.text_encoder(tokens(pipeline, prompts)).last_hidden_state
        loss = denoising_loss(pipeline.unet, words, latents[chosen], generator)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if embeddings.grad is not None:
            embeddings.grad[: -inversion.vectors] = 0  # Adam leaves rows alone that never had a gradient
        optimizer.step()
    say(f"{inversion.word}: loss {loss.item():.4f}")
    vectors: Tensor = embeddings.detach()[-inversion.vectors :].clone()
    return vectors


def write(recipe: Recipe, layers: dict[str, Factors], out: Path) -> Path:
    """Write `layers` in the layout its name is shipped in, with its card."""
    path = out / f"{recipe.name}.safetensors"
    match recipe.name:
        case "milo":
            layouts.write_diffusers(layers, path, alpha=2 * recipe.rank)
        case "fungo":
            layouts.write_kohya(
                layers,
                path,
                alphas=(1.0, 2.0, 3.0),
                metadata=cards.kohya_metadata(recipe.name, recipe.rank, recipe.steps),
            )
        case "ochreframe":
            layouts.write_diffusers_old(layers, path)
        case _:
            layouts.write_peft(layers, path, alpha=2 * recipe.rank)
    kind = "character" if recipe.name in CHARACTERS else "style"
    (out / f"{recipe.name}.md").write_text(cards.lora_card(recipe.name, kind, recipe.text_encoder))
    return path


def write_inversion(inversion: Inversion, vectors: Tensor, out: Path) -> Path:
    path = out / f"{inversion.colour}.safetensors"
    layouts.write_embedding(vectors, path, key=inversion.word if inversion.vectors == 1 else "emb_params")
    path.with_suffix(".md").write_text(
        cards.inversion_card(inversion.colour, inversion.word, inversion.vectors)
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="which ones; all without")
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for recipe in RECIPES:
        if not options.names or recipe.name in options.names:
            say(f"wrote {write(recipe, train_lora(recipe), options.out)}")
    for inversion in INVERSIONS:
        if not options.names or inversion.colour in options.names:
            say(f"wrote {write_inversion(inversion, train_inversion(inversion), options.out)}")
    say(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
