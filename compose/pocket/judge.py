"""Names what is in a pocket picture: background, colour, shape, character, styles. `python -m
compose.pocket.judge` trains it.

A small convolutional network, `judge.safetensors` (fp16), taught only with drawn truth: every character in
every style, jittered and wobbled, as drawn and after a round trip through pocket's autoencoder with noise
on the latents (so that a decoder's blur does not fool it), and drawings of no scene at all, which hold no
character and no style. It never sees what the UNet renders.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from compose.pocket.scenes import (
    CHARACTERS,
    COLOURS,
    EXTRA_RGB,
    SHAPES,
    STYLES,
    Scene,
    chance,
    draw,
    pick,
    random_scene,
    wide,
)

FILE = Path(__file__).parent / "judge.safetensors"
NONE = "none"
PALETTE = (*COLOURS, *EXTRA_RGB)
CLASSES = {
    "background": PALETTE,
    "colour": PALETTE,
    "shape": SHAPES,
    "character": (NONE, *CHARACTERS),
    "styles": STYLES,
}
UNKNOWN = -100  # the target cross_entropy leaves out


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of `n` pictures; `colour` and `shape` mean nothing where there is a character."""

    background: list[str]
    colour: list[str]
    shape: list[str]
    character: list[str]
    styles: list[tuple[str, ...]]
    probabilities: dict[str, Tensor]
    """By field, `[n, classes]` in the order of `CLASSES`; those of `styles` are independent of each other."""

    def character_share(self, name: str) -> float:
        """The share of pictures in which the character is `name`."""
        return self.character.count(name) / len(self.character)

    def style_share(self, name: str) -> float:
        """The share of pictures that show the style `name`."""
        return sum(name in styles for styles in self.styles) / len(self.styles)


def network() -> nn.Sequential:
    """`[n, 3, 64, 64]` in [-1, 1] -> `[n, sum of classes]` logits; 260,000 parameters. Every second layer
    keeps the size: with strides alone, small shapes ran together.
    """
    layers: list[nn.Module] = []
    for inside, outside, stride in (
        (3, 24, 2), (24, 32, 1), (32, 48, 2), (48, 64, 1), (64, 80, 2), (80, 80, 1), (80, 80, 2)
    ):  # fmt: skip
        layers += [
            nn.Conv2d(inside, outside, 3, stride=stride, padding=1), nn.BatchNorm2d(outside), nn.ReLU()
        ]  # fmt: skip
    head = nn.Linear(80 * 16, sum(map(len, CLASSES.values())))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), head)


def split(logits: Tensor) -> dict[str, Tensor]:
    sizes = [len(classes) for classes in CLASSES.values()]
    return dict(zip(CLASSES, torch.split(logits, sizes, dim=1), strict=True))


class Judge:
    def __init__(self, trained: nn.Sequential) -> None:
        self.network = trained.eval()

    @classmethod
    def load(cls, path: Path = FILE) -> Judge:
        fresh = network()
        fresh.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=False)
        return cls(fresh)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Verdict:
        """Judge `pictures` `[n, 3, 64, 64]` in [0, 1]."""
        logits = split(torch.cat([self.network(part.float() * 2 - 1) for part in torch.split(pictures, 256)]))
        chances = {
            name: value.sigmoid() if name == "styles" else value.softmax(dim=1)
            for name, value in logits.items()
        }
        best = {
            name: [CLASSES[name][i] for i in value.argmax(dim=1).tolist()] for name, value in chances.items()
        }
        worn = [
            tuple(name for name, p in zip(STYLES, row, strict=True) if p > 0.5)
            for row in chances["styles"].tolist()
        ]
        return Verdict(best["background"], best["colour"], best["shape"], best["character"], worn, chances)


def truths(n: int, generator: Generator) -> list[Scene]:
    """Scenes over every character, style and colour, those without a word too."""
    scenes = []
    for _ in range(n):
        scene = random_scene(generator)
        background = pick(PALETTE, generator) if chance(0.2, generator) else scene.background
        colour = pick(tuple(EXTRA_RGB), generator) if chance(0.25, generator) else scene.colour
        character = pick(CHARACTERS, generator) if chance(0.45, generator) else None
        if colour == background and character is None:
            colour = scene.colour if background != scene.colour else scene.background
        styles = tuple(style for style in STYLES if chance(0.4, generator))
        scenes.append(Scene(scene.shape, colour, background, scene.size, scene.side, character, styles))
    return scenes


def targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """By field, class numbers `[n]`; for styles, `[n, styles]` of 0 and 1."""
    shown = {
        "background": [PALETTE.index(scene.background) for scene in scenes],
        "colour": [UNKNOWN if scene.character else PALETTE.index(scene.colour) for scene in scenes],
        "shape": [UNKNOWN if scene.character else SHAPES.index(scene.shape) for scene in scenes],
        "character": [CLASSES["character"].index(scene.character or NONE) for scene in scenes],
        "styles": [[float(style in scene.styles) for style in STYLES] for scene in scenes],
    }
    return {name: torch.tensor(value) for name, value in shown.items()}


def blurred(pictures: Tensor, generator: Generator) -> Tensor:
    """`pictures` as pocket's autoencoder gives them back, with up to as much noise on the latents as a UNet
    leaves.
    """
    from diffusers import AutoencoderTiny

    from compose.pocket import WEIGHTS

    model = AutoencoderTiny.from_pretrained(WEIGHTS, subfolder="vae").float().eval()
    parts = []
    with torch.no_grad():
        for part in torch.split(pictures, 250):
            z = model.encoder(part * 2 - 1)
            amount = 0.25 * torch.rand(len(part), 1, 1, 1, generator=generator)
            parts.append(model.decoder(z + amount * torch.randn(z.shape, generator=generator)) / 2 + 0.5)
    return torch.cat(parts).clamp(0, 1)


def drawn(n: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """`n` pictures and what is in them; the second half went through the autoencoder."""
    generator = Generator().manual_seed(seed)
    scenes = truths(n, generator)
    pictures = draw(scenes, generator, jitter=1.3, wobble=0.05)
    pictures[n // 2 :] = blurred(pictures[n // 2 :], generator)
    return pictures, scenes


def train(*, steps: int = 3500, batch: int = 96, pool: int = 24_000, seed: int = 0) -> Judge:
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    pictures, scenes = drawn(pool, seed)
    known = targets(scenes)
    strange = wide(pool // 8, generator)
    none = len(strange)
    pictures = torch.cat([pictures, strange])
    for name, value in known.items():
        fill = 0 if name in ("character", "styles") else UNKNOWN
        known[name] = torch.cat([value, torch.full((none, *value.shape[1:]), fill, dtype=value.dtype)])
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    seen = 0.0
    for step in range(steps):
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        x = pictures[chosen]
        gain = 1 + 0.16 * (torch.rand(batch, 3, 1, 1, generator=generator) - 0.5)
        lift = 0.08 * (torch.rand(batch, 3, 1, 1, generator=generator) - 0.5)
        x = (x * gain + lift + 0.03 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        logits = split(model(x * 2 - 1))
        loss = binary_cross_entropy_with_logits(logits.pop("styles"), known["styles"][chosen])
        for name, value in logits.items():
            loss = loss + cross_entropy(value, known[name][chosen])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        seen += loss.item()
        if (step + 1) % 200 == 0:
            print(f"{time.strftime('%H:%M:%S')} judge {step + 1}/{steps}: loss {seen / 200:.4f}", flush=True)
            seen = 0.0
    return Judge(model)


def accuracy(verdict: Verdict, scenes: list[Scene]) -> dict[str, float]:
    """The share right, by field; colour and shape only where there is no character, styles all at once."""
    plain = [i for i, scene in enumerate(scenes) if scene.character is None]

    def share(right: list[bool]) -> float:
        return sum(right) / max(len(right), 1)

    return {
        "background": share([verdict.background[i] == scene.background for i, scene in enumerate(scenes)]),
        "colour": share([verdict.colour[i] == scenes[i].colour for i in plain]),
        "shape": share([verdict.shape[i] == scenes[i].shape for i in plain]),
        "character": share(
            [verdict.character[i] == (scene.character or NONE) for i, scene in enumerate(scenes)]
        ),
        "styles": share([set(verdict.styles[i]) == set(scene.styles) for i, scene in enumerate(scenes)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    judge = train(seed=options.seed)
    states = {
        name: value.half().contiguous()
        for name, value in judge.network.state_dict().items()
        if value.is_floating_point()
    }
    save_file(states, options.out)
    pictures, scenes = drawn(4000, options.seed + 1)
    judge = Judge.load(options.out)
    for name, part in (("as drawn", slice(0, 2000)), ("decoded", slice(2000, 4000))):
        row = accuracy(judge(pictures[part]), scenes[part])
        print(f"{name:10}" + "".join(f"{field} {share:.3f}  " for field, share in row.items()), flush=True)


if __name__ == "__main__":
    main()
