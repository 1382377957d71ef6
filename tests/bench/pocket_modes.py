"""Stacks rendered by turns, or each adapter for itself, against the plain sum: what the judge sees on pocket.

The stacks, prompts and seeds of `pocket_compose`, rendered one by one as a server does:

    naive       the weighted sum
    switch      one adapter at a time, the next after each step       (no file can hold it)
    composite   each alone in every step, the mean of the predictions (nor this)

    together    the share of the pictures in which all concepts are seen; 95% intervals over the pictures

Run: `python -m tests.bench.pocket_modes [PICTURES]`.
"""

import sys
import time

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from compose import bases
from compose.pocket import ADAPTERS
from compose.pocket.calibrate import Silent
from compose.pocket.evaluate import read
from compose.pocket.judge import Judge
from compose.pocket.scenes import caption
from compose.render import Picture, render
from compose.schedule import Plan
from compose.settings import Settings
from compose.sheet import contact_sheet
from compose.warm import warm_up
from compose.weights import AS_TRAINED
from tests.bench.pocket_compose import SEED, STACKS, interval, scenes, seen
from tests.bench.report import RESULTS, save

PLANS = {"naive": Plan(), "switch": Plan(mode="switch"), "composite": Plan(mode="composite")}
PICTURES, SHOWN = 32, 8


class Kept(Silent):
    """Keeps the last picture."""

    last: Picture

    def picture(self, image: int, picture: Picture) -> None:
        del image
        self.last = picture


def main(pictures: int = PICTURES) -> None:
    """Measures, prints, writes results/pocket_modes.json and .png."""
    warm, judge, start = warm_up(bases.find("pocket")), Judge.load(), time.monotonic()
    size = {"width": warm.base.size, "height": warm.base.size}
    together: dict[str, list[NDArray[np.float64]]] = {name: [] for name in PLANS}
    by_stack: dict[str, dict[str, float]] = {}
    rows = []
    for names in STACKS:
        stack = tuple((read(ADAPTERS / f"{name}.safetensors"), AS_TRAINED) for name in names)
        title, prompts = " + ".join(names), [caption(scene) for scene in scenes(names, pictures)]
        for how, plan in PLANS.items():
            found, kept = [], Kept()
            for i, prompt in enumerate(prompts):
                told = Settings(prompt=prompt, seed=SEED + i, guidance=warm.base.guidance, **size)
                render(warm, told, stack=stack, key=None, listener=kept, plan=plan)
                found.append(kept.last)
            verdict = judge(torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255)
            here = np.stack([seen(verdict, name) for name in names]).all(0).astype(float)
            together[how].append(here)
            by_stack.setdefault(title, {})[how] = float(here.mean())
            rows.append((f"{how}: {here.mean():.0%}\n{title}", found[:SHOWN]))
        print(f"{time.monotonic() - start:6.0f} s  {title}: {by_stack[title]}", flush=True)
    sums = {how: np.stack(values) for how, values in together.items()}
    result = {
        "pictures": pictures,
        "stacks": by_stack,
        "together": {how: interval(values) for how, values in sums.items()},
        "minus_naive": {how: interval(sums[how] - sums["naive"]) for how in ("switch", "composite")},
    }
    sheet = contact_sheet(rows, title="All adapters at weight 1, by what the judge sees of all of them")
    Image.fromarray(sheet).quantize(256).save(RESULTS / "pocket_modes.png", optimize=True)
    save("pocket_modes", result)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
