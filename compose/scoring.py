"""How much of a concept is in a picture: what `tune` and `auto` decide by.

    effect      any base, no model: how far a picture is along the way from the one without adapters to the
                one with this adapter alone (same prompt and seed),  <x - x_0, x_1 - x_0> / ||x_1 - x_0||^2
    judged      pocket: the shipped judge's probability of the character or the style a trigger names
    (clip       any base, with a model of the operator's: `compose.clip`)

A score is about 0 where the concept is absent and about 1 where it is as it is alone.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from compose.pocket.judge import CLASSES, Judge
from compose.pocket.scenes import PICTURE
from compose.render import Picture

Scores = NDArray[np.float64]


def effect(pictures: Sequence[Picture], without: Sequence[Picture], alone: Sequence[Picture]) -> Scores:
    """`[n]`: of each picture, given the same without any adapter and with the one alone; cut to [0, 1]."""
    return np.array([_share(*three) for three in zip(pictures, without, alone, strict=True)])


def _share(picture: Picture, without: Picture, alone: Picture) -> float:
    x, zero, one = (p.astype(np.float64).reshape(-1) for p in (picture, without, alone))
    way = one - zero
    return float(np.clip((x - zero) @ way / max(float(way @ way), 1e-9), 0.0, 1.0))


def concept(trigger: str) -> str:
    """The judge's name for what a trigger calls; "" for what it does not know."""
    known = {*CLASSES["character"], *CLASSES["styles"]} - {"none"}
    return next((word for word in reversed(trigger.split()) if word in known), "")


def judged(pictures: Sequence[Picture], name: str) -> Scores:
    """`[n]`: the judge's probability that the character or the style `name` is in each picture, which is
    brought to the size that the judge sees.
    """
    tensor = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    if tuple(tensor.shape[-2:]) != (PICTURE, PICTURE):
        tensor = interpolate(tensor, (PICTURE, PICTURE), mode="bilinear", antialias=True)
    field = "character" if name in CLASSES["character"] else "styles"
    chances = _judge()(tensor).probabilities[field][:, CLASSES[field].index(name)]
    scores: Scores = chances.double().numpy()
    return scores


@cache
def _judge() -> Judge:
    return Judge.load()
