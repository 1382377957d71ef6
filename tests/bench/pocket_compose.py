"""What is left of characters and styles when they are merged: every method on pocket, judged.

The demo adapters in all pairs of a character and a style, the pair of styles, and the triples, each merged by
a running server under every method (`auto` too: it decides on prompts and seeds of its own), the file
downloaded, and pictures rendered from it at fixed fresh seeds. For each picture the shipped judge says which
concepts are there.

    left      of the pictures in which a concept is seen when its adapter is alone (same prompt and seed): the
              share in which it is seen in the stack; mean over the concepts
    together  the share of the pictures in which all concepts are seen
    followed  the share with the background that was asked for

Intervals: 95%, bootstrap over the pictures, differences paired. Run: `python -m tests.bench.pocket_compose
[--quick]`.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from atelier.client import Client
from atelier.messages import method
from compose.pocket import ADAPTERS
from compose.pocket.evaluate import blended, fresh_scenes, load, read, render
from compose.pocket.judge import Judge, Verdict
from compose.pocket.scenes import CHARACTERS, STYLES, Scene, caption
from compose.sheet import contact_sheet
from server.demo import server
from tests.bench.report import RESULTS, save

STACKS = (
    *((character, style) for character in CHARACTERS for style in STYLES),
    tuple(STYLES),
    *((character, *STYLES) for character in CHARACTERS),
)
METHODS: dict[str, dict[str, Any]] = {
    "naive": {},
    "svd": {"rank": 4},
    "orthogonal": {},
    "orthogonal, symmetric": {"mode": "symmetric"},
    "orthogonal, output": {"side": "output"},
    "activation": {},
    "activation, mu 0.3": {"mu": 0.3},
    "regmean": {},
    "tsv": {},
    "iso": {"keep_norm": True},
    "knots": {"density": 0.5},
    "core-ties": {"density": 0.5},
    "ties": {"density": 0.5},
    "dare-linear": {},
    "dare-ties": {},
    "magnitude-prune": {},
    "auto": {},
}
QUICK = ("naive", "orthogonal", "auto")
PICTURES, SEED, SHOWN = 64, 20_000, 8
Seen = NDArray[np.bool_]


def scenes(stack: Sequence[str], n: int) -> list[Scene]:
    """Fresh scenes that call every adapter of the stack."""
    character = next((name for name in stack if name in CHARACTERS), None)
    return fresh_scenes(n, SEED, character=character, styles=tuple(s for s in stack if s in STYLES))


def seen(verdict: Verdict, name: str) -> Seen:
    """Of each picture: whether the concept is there."""
    if name in CHARACTERS:
        return np.array([character == name for character in verdict.character])
    return np.array([name in worn for worn in verdict.styles])


class Ground:
    """Renders and judges on a pipeline of its own, away from the server."""

    def __init__(self, n: int) -> None:
        self.n, self._pipeline, self._judge = n, load(), Judge.load()

    def look(self, file: Path, stack: Sequence[str]) -> tuple[torch.Tensor, Verdict]:
        """The pictures of a stack's prompts with one file, and what the judge says of them."""
        with blended(self._pipeline, [(read(file), 1.0)]):
            pictures = render(self._pipeline, [caption(s) for s in scenes(stack, self.n)], seed=SEED)
        return pictures, self._judge(pictures)


def interval(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean and 95% interval of a statistic over pictures, `[stacks, pictures]` resampled by picture."""
    g = np.random.default_rng(0)
    draws = g.integers(0, values.shape[1], (2000, values.shape[1]))
    means = values.mean(0)[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def main(arguments: Sequence[str]) -> None:
    """Measures, prints, writes results/pocket_compose.json and .png."""
    quick = "--quick" in arguments
    names = QUICK if quick else tuple(METHODS)
    stacks = STACKS[:2] if quick else STACKS
    ground, start = Ground(16 if quick else PICTURES), time.monotonic()
    left: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    together: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    followed: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    by_stack: dict[str, Any] = {}
    rows: list[tuple[str, list[Any]]] = []
    with tempfile.TemporaryDirectory() as folder, server(Path(folder) / "data") as address:
        client = Client(address, timeout=600)
        for name in (*CHARACTERS, *STYLES):
            file = ADAPTERS / f"{name}.safetensors"
            config = file.with_name(f"{name}.adapter_config.json")
            client.check_in(
                file,
                name=name,
                card=file.with_suffix(".md").read_bytes(),
                adapter_config=config.read_bytes() if config.is_file() else b"",
            )
        for stack in stacks:
            title, asked = " + ".join(stack), scenes(stack, ground.n)
            alone = {
                name: seen(ground.look(ADAPTERS / f"{name}.safetensors", stack)[1], name) for name in stack
            }
            told: dict[str, Any] = {"alone": {name: float(a.mean()) for name, a in alone.items()}}
            for label in names:
                how = method(label.split(",")[0], **METHODS[label])
                merged = client.merge(dict.fromkeys(stack, 1.0), name="merged", method=how).version
                file = Path(folder) / "merged.safetensors"
                client.download(f"{merged.name}:{merged.number}", file)
                pictures, verdict = ground.look(file, stack)
                here = {name: seen(verdict, name) for name in stack}
                shares = [np.where(alone[n], here[n], np.nan) for n in stack]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kept = np.nanmean(np.stack(shares), axis=0)
                left[label].append(kept)
                together[label].append(np.stack(list(here.values())).all(0).astype(float))
                followed[label].append(
                    np.array(
                        [s == b.background for s, b in zip(verdict.background, asked, strict=True)], float
                    )
                )
                told[label] = {name: float(h.mean()) for name, h in here.items()} | {
                    "together": float(together[label][-1].mean())
                }
                if label == "auto":
                    told[label]["chose"] = merged.recipe_json
                if stack == stacks[0]:
                    rows.append((label, [_picture(p) for p in pictures[:SHOWN]]))
                print(f"{time.monotonic() - start:6.0f} s  {title}: {label} {told[label]}"[:230], flush=True)
            by_stack[title] = told
    summary = {
        label: {
            "left": float(np.nanmean(np.stack(left[label]))),
            "together": interval(np.stack(together[label])),
            "followed": float(np.stack(followed[label]).mean()),
        }
        for label in names
    }
    fixed = max((n for n in names if n != "auto"), key=lambda n: summary[n]["together"]["mean"])  # type: ignore[index, no-any-return]
    auto = np.stack(together["auto"])
    result = {
        "pictures": ground.n,
        "stacks": by_stack,
        "overall": summary,
        "auto_minus_naive_together": interval(auto - np.stack(together["naive"])),
        "best_fixed": fixed,
        "auto_minus_best_fixed_together": interval(auto - np.stack(together[fixed])),
    }
    if not quick:
        sheet = contact_sheet(rows, title=" + ".join(stacks[0]))
        Image.fromarray(sheet).quantize(256).save(RESULTS / "pocket_compose.png", optimize=True)
    save("pocket_compose", result)


def _picture(tensor: torch.Tensor) -> Any:
    return (tensor.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()


if __name__ == "__main__":
    main(sys.argv[1:])
