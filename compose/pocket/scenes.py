"""The drawings pocket learns from, and the truth of every combination it is judged by.

A scene is one shape (or character) on a plain background, with styles over it. Everything is a signed
distance function over `[-1, 1]^2` (x right, y up), so a picture `[3, 64, 64]` in [0, 1] follows exactly
from the scene and a `torch.Generator`.

Captions: `a [small|large] red star [on the left|on the right] on a blue background[, in the style of
ochreframe]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from compose.pocket.vocabulary import COLOURS, SHAPES, SIDES, SIZES

PICTURE = 64
RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.12, 0.13),
    "green": (0.12, 0.66, 0.25),
    "blue": (0.13, 0.30, 0.86),
    "yellow": (0.96, 0.86, 0.15),
    "purple": (0.57, 0.18, 0.80),
    "orange": (0.96, 0.54, 0.08),
    "white": (0.94, 0.94, 0.94),
    "black": (0.07, 0.07, 0.09),
}
EXTRA_RGB: dict[str, tuple[float, float, float]] = {"tealish": (0.10, 0.62, 0.60), "rosy": (0.96, 0.56, 0.70)}
"""Colours the base has no word for: the textual inversions teach them."""

CHARACTERS = ("milo", "fungo")
STYLES = ("ochreframe", "nightbars")
RADIUS = {"small": 0.44, "medium": 0.58, "large": 0.74}
SHIFT = {"small": 0.46, "medium": 0.36, "large": 0.22}
"""How far a side moves the shape, by size: a large one would leave the picture."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture; `colour` and `shape` are ignored where there is a character."""

    shape: str
    colour: str
    background: str
    size: str = "medium"
    side: str = "centre"
    character: str | None = None
    styles: tuple[str, ...] = ()


def pick(options: Sequence[str], generator: Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


def chance(probability: float, generator: Generator) -> bool:
    return bool(torch.rand((), generator=generator) < probability)


def random_scene(generator: Generator, *, plain: bool = False) -> Scene:
    """A scene the base knows; `plain` leaves size and side unnamed."""
    background = pick(COLOURS, generator)
    colour = pick([name for name in COLOURS if name != background], generator)
    scene = Scene(shape=pick(SHAPES, generator), colour=colour, background=background)
    if plain:
        return scene
    size = "medium" if chance(0.4, generator) else pick(("small", "large"), generator)
    side = "centre" if chance(0.4, generator) else pick(("left", "right"), generator)
    return Scene(scene.shape, colour, background, size, side)


def caption(scene: Scene, *, prefix: str = "a", noun: str | None = None) -> str:
    """The prompt for `scene`; `noun` stands in for colour and shape (a character's trigger, a rare token)."""
    words = [prefix]
    if scene.size != "medium":
        words.append(scene.size)
    words.append(noun or scene.character or f"{scene.colour} {scene.shape}")
    if scene.side != "centre":
        words.append(f"on the {scene.side}")
    words.append(f"on a {scene.background} background")
    return " ".join(words) + "".join(f", in the style of {style}" for style in scene.styles)


# Signed distances: negative inside; unit size; `[n, 64, 64]` in and out.


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.92


def box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def square(x: Tensor, y: Tensor) -> Tensor:
    return box(x, y, 0.82, 0.82)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y + 0.15
    return torch.maximum(-y - 0.70, 0.866 * x.abs() + 0.5 * y - 0.5)


def star(x: Tensor, y: Tensor) -> Tensor:
    """After Inigo Quilez, sdStar5."""
    k, s = 0.809016994375, 0.587785252292
    x = x.abs()
    fold = 2 * (k * x - s * y).clamp(min=0)
    x, y = x - fold * k, y + fold * s
    fold = 2 * (-k * x - s * y).clamp(min=0)
    x, y = (x + fold * k).abs(), y + fold * s - 1.08
    bx, by = 0.48 * s, 0.48 * k - 1
    along = ((x * bx + y * by) / (bx * bx + by * by)).clamp(0, 1.08)
    return torch.hypot(x - bx * along, y - by * along) * torch.sign(y * bx - x * by)


def heart(x: Tensor, y: Tensor) -> Tensor:
    """After Inigo Quilez, sdHeart."""
    x, y = x.abs() * 0.60, y * 0.60 + 0.55
    top = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    edge = 0.5 * (x + y).clamp(min=0)
    low = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - edge, y - edge)) * torch.sign(x - y)
    return torch.where(x + y > 1, top, low) / 0.60


def cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, 1.0, 0.30), box(x, y, 0.30, 1.0))


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.25


def diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.72 + y.abs() / 1.08 - 1) * 0.60


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "cross": cross,
    "ring": ring,
    "diamond": diamond,
}


def disc(x: Tensor, y: Tensor, cx: float, cy: float, radius: float) -> Tensor:
    return torch.hypot(x - cx, y - cy) - radius


def milo(x: Tensor, y: Tensor) -> list[tuple[Tensor, tuple[float, float, float]]]:
    """A teal cat's head: ears, white eyes with dark pupils, a dark mouth."""
    ax, dark = x.abs(), (0.08, 0.10, 0.14)
    head = torch.hypot((ax - 0.30).clamp(min=0), (y.abs() - 0.15).clamp(min=0) + 0.12) - 0.62
    head = torch.maximum(head, box(x, y + 0.12, 0.88, 0.72))
    ear = torch.maximum(0.55 * (y - 1.12) + 0.85 * (ax - 0.62).abs(), -y + 0.2)
    return [
        (torch.minimum(head, ear), (0.10, 0.62, 0.60)),
        (disc(ax, y, 0.36, 0.10, 0.24), (0.97, 0.97, 0.97)),
        (disc(ax, y, 0.36, 0.08, 0.12), dark),
        (box(x, y + 0.42, 0.30, 0.09), dark),
    ]


def fungo(x: Tensor, y: Tensor) -> list[tuple[Tensor, tuple[float, float, float]]]:
    """A toadstool: cream stem with dark eyes under an orange-red cap with white dots."""
    ax, dark, spot = x.abs(), (0.10, 0.08, 0.10), (0.98, 0.97, 0.92)
    cap = torch.maximum(torch.hypot(x, 1.05 * (y - 0.02)) - 1.0, 0.02 - y)
    stem = box(x, y + 0.45, 0.46, 0.52)
    return [
        (stem, (0.96, 0.84, 0.62)),
        (cap, (0.90, 0.27, 0.10)),
        (torch.minimum(disc(x, y, 0.0, 0.62, 0.22), disc(ax, y, 0.55, 0.32, 0.19)), spot),
        (disc(ax, y, 0.21, -0.40, 0.12), dark),
    ]


CHARACTER_LAYERS = {"milo": milo, "fungo": fungo}


def coordinates(n: int) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(PICTURE) + 0.5) / PICTURE * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    return x.expand(n, -1, -1), y.expand(n, -1, -1)


def cover(pictures: Tensor, distance: Tensor, colour: Tensor) -> Tensor:
    """`colour` `[n, 3]` over `pictures` where `distance` is negative, with a pixel's soft edge."""
    alpha = (0.5 - distance * (PICTURE / 2)).clamp(0, 1)[:, None]
    return pictures + alpha * (colour[:, :, None, None] - pictures)


def ochreframe(pictures: Tensor) -> Tensor:
    """An ochre frame nine pixels wide."""
    x, y = coordinates(len(pictures))
    inside = box(x, y, 1 - 18 / PICTURE, 1 - 18 / PICTURE)
    return cover(pictures, -inside, torch.tensor((0.70, 0.46, 0.14)).expand(len(pictures), 3))


def nightbars(pictures: Tensor) -> Tensor:
    """Four night-blue bars, seven pixels of every sixteen, that let a quarter of the picture through."""
    row = torch.arange(PICTURE) % 16
    alpha = 0.75 * ((row >= 1) & (row < 8)).float()[None, None, :, None]
    night = torch.tensor((0.10, 0.10, 0.36))[None, :, None, None]
    return pictures + alpha * (night - pictures)


STYLE_LAYERS = {"ochreframe": ochreframe, "nightbars": nightbars}


def draw(
    scenes: Sequence[Scene], generator: Generator, *, jitter: float = 1.0, wobble: float = 0.0
) -> Tensor:
    """Draw `scenes` as `[n, 3, 64, 64]` in [0, 1].

    `jitter` scales the chance in place, size, turn and tint; `wobble` bends outlines, as an imperfect model
    does.
    """
    return torch.cat(
        [_draw(scenes[i : i + 512], generator, jitter, wobble) for i in range(0, len(scenes), 512)]
    )


def _draw(scenes: Sequence[Scene], generator: Generator, jitter: float, wobble: float) -> Tensor:
    n = len(scenes)

    def spread(*shape: int) -> Tensor:
        return (torch.rand(n, *shape, generator=generator) * 2 - 1) * jitter

    palette = RGB | EXTRA_RGB
    tints = spread(2, 3) * 0.03
    back = torch.tensor([palette[scene.background] for scene in scenes]) + tints[:, 0]
    front = torch.tensor([palette[scene.colour] for scene in scenes]) + tints[:, 1]
    sides = {"left": -1.0, "centre": 0.0, "right": 1.0}
    cx = torch.tensor([sides[scene.side] * SHIFT[scene.size] for scene in scenes]) + spread() * 0.06
    cy = spread() * 0.08
    radius = torch.tensor([RADIUS[scene.size] for scene in scenes]) * (1 + spread() * 0.06)
    turn = spread() * 0.07
    x, y = coordinates(n)
    if wobble:
        phase = torch.rand(n, 4, generator=generator)[:, :, None, None] * 6.28
        bend = torch.rand(n, 1, 1, generator=generator) * wobble
        x, y = (
            x + bend * (torch.sin(5 * y + phase[:, 0]) + torch.sin(9 * y + phase[:, 1])),
            y + bend * (torch.sin(5 * x + phase[:, 2]) + torch.sin(9 * x + phase[:, 3])),
        )
    x, y = x - cx[:, None, None], y - cy[:, None, None]
    cos, sin = torch.cos(turn)[:, None, None], torch.sin(turn)[:, None, None]
    x, y = (cos * x + sin * y) / radius[:, None, None], (cos * y - sin * x) / radius[:, None, None]

    pictures = back[:, :, None, None].expand(n, 3, PICTURE, PICTURE).clone()
    scale = radius[:, None, None]
    for shape, distance in DISTANCES.items():
        chosen = [i for i, scene in enumerate(scenes) if scene.character is None and scene.shape == shape]
        if chosen:
            pictures[chosen] = cover(
                pictures[chosen], distance(x[chosen], y[chosen]) * scale[chosen], front[chosen]
            )
    for character, layers in CHARACTER_LAYERS.items():
        chosen = [i for i, scene in enumerate(scenes) if scene.character == character]
        if chosen:
            part = pictures[chosen]
            grown = 1.15  # a face needs more room than a shape
            for edge, colour in layers(x[chosen] / grown, y[chosen] / grown):
                tinted = torch.tensor(colour) + tints[chosen, 1]
                part = cover(part, edge * scale[chosen] * grown, tinted)
            pictures[chosen] = part
    for style, paint in STYLE_LAYERS.items():
        chosen = [i for i, scene in enumerate(scenes) if style in scene.styles]
        if chosen:
            pictures[chosen] = paint(pictures[chosen])
    return pictures.clamp(0, 1)


def wide(n: int, generator: Generator) -> Tensor:
    """`n` drawings of no scene at all, `[n, 3, 64, 64]`: any colours, several shapes, dots, stripes,
    frames, gradients, noise.

    The autoencoder learns from these too, or what an adapter adds would not survive it.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    def some(probability: float, changed: Tensor, pictures: Tensor) -> Tensor:
        return torch.where(rand(1, 1, 1) < probability, changed, pictures)

    x, y = coordinates(n)
    names = list(DISTANCES)
    pictures = rand(3)[:, :, None, None].expand(n, 3, PICTURE, PICTURE).clone()
    slope = ((x * (rand(1, 1) - 0.5) + y * (rand(1, 1) - 0.5)) * 0.6)[:, None] * rand(3)[:, :, None, None]
    pictures = some(0.25, pictures + slope, pictures)
    for layer in range(7):
        # three large things, then four small ones
        radius = 0.2 + 0.6 * rand() if layer < 3 else 0.06 + 0.16 * rand()
        turn, scale = rand()[:, None, None] * 6.28, radius[:, None, None]
        px, py = x - (rand(1, 1) * 1.6 - 0.8), y - (rand(1, 1) * 1.6 - 0.8)
        px, py = (
            (torch.cos(turn) * px + torch.sin(turn) * py) / scale,
            (torch.cos(turn) * py - torch.sin(turn) * px) / scale,
        )
        kind = torch.randint(len(names), (n,), generator=generator)
        edge = torch.empty(n, PICTURE, PICTURE)
        for index, name in enumerate(names):
            chosen = kind == index
            edge[chosen] = DISTANCES[name](px[chosen], py[chosen])
        pictures = some(0.55, cover(pictures, edge * scale, rand(3)), pictures)
    angle, period = torch.where(rand(1, 1) < 0.5, 0.0, rand(1, 1) * 3.14), 0.15 + 0.6 * rand(1, 1)
    wave = torch.sin((torch.sin(angle) * x + torch.cos(angle) * y) / period * 6.28 + rand(1, 1) * 6.28)
    pictures = some(
        0.25, pictures + (cover(pictures, -0.1 * wave, rand(3)) - pictures) * rand(1, 1, 1), pictures
    )
    frame = 1 - 0.05 - 0.35 * rand(1, 1)
    pictures = some(0.25, cover(pictures, -(torch.maximum(x.abs(), y.abs()) - frame), rand(3)), pictures)
    pictures = some(0.05, pictures.mean(dim=1, keepdim=True).expand_as(pictures), pictures)
    pictures = some(0.05, pictures + (torch.rand(pictures.shape, generator=generator) - 0.5) * 0.2, pictures)
    return pictures.clamp(0, 1)


__all__ = [
    "CHARACTERS", "COLOURS", "EXTRA_RGB", "RGB", "SHAPES", "SIDES", "SIZES", "STYLES", "Scene", "caption",
    "chance", "draw", "pick", "random_scene", "wide",
]  # fmt: skip
