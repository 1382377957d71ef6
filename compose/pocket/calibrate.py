"""Measures the demo adapters: `python -m compose.pocket.calibrate [NAME ...]` writes
`NAME.moments.safetensors`.

Each is rendered alone on prompts of its own (`compose.calibrate`), a few seconds each.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from safetensors import safe_open
from torch import Generator

from compose import bases
from compose.calibrate import PICTURES, STEPS, measure, prompts, to_bytes
from compose.pocket import ADAPTERS
from compose.pocket.evaluate import read
from compose.pocket.scenes import CHARACTERS, STYLES, random_scene
from compose.render import Listener, Picture
from compose.settings import Settings
from compose.warm import WarmPipeline, alone, warm_up

SEED = 4000


def scenes(n: int = PICTURES) -> list[tuple[str, str]]:
    """What is seen and where, in pocket's words."""
    generator = Generator().manual_seed(SEED)
    drawn = [random_scene(generator) for _ in range(n)]
    return [(f"{scene.colour} {scene.shape}", f"on a {scene.background} background") for scene in drawn]


@cache
def shipped(base: str) -> dict[str, Path]:
    """The shipped moments measured on the base of this digest, by the digest of the adapter's file."""
    found = {}
    for path in sorted(ADAPTERS.glob("*.moments.safetensors")):
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        if told.get("base") == base:
            found[told.get("adapter", "")] = path
    return found


def calibrated(
    warm: WarmPipeline, path: Path, trigger: str, *, listener: Listener, pictures: int = PICTURES
) -> bytes:
    """The moments of one of the demo adapters, as a file."""
    told = prompts(trigger, scenes(pictures))
    settings = Settings(prompt="", seed=SEED, steps=STEPS, guidance=warm.base.guidance, width=64, height=64)
    moments = measure(warm, told, stack=alone(read(path)), settings=settings, listener=listener)
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    return to_bytes(
        moments, {"adapter": digest, "base": warm.base.digest, "prompts": json.dumps(sorted(set(told)))}
    )


class Silent:
    """A listener that wants everything and tells nobody."""

    def check(self) -> None: ...

    def step(self, image: int, step: int) -> None: ...

    def preview(self, image: int, step: int, picture: Picture) -> None: ...

    def picture(self, image: int, picture: Picture) -> None: ...


def main(names: Sequence[str]) -> None:
    """Measures and writes."""
    warm = warm_up(bases.find("pocket"))
    for name in names or (*CHARACTERS, *STYLES):
        start = time.monotonic()
        trigger = name if name in CHARACTERS else f"in the style of {name}"
        data = calibrated(warm, ADAPTERS / f"{name}.safetensors", trigger, listener=Silent())
        path = ADAPTERS / f"{name}.moments.safetensors"
        path.write_bytes(data)
        print(f"wrote {path}, {len(data)} bytes, {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="which ones; all without")
    main(parser.parse_args().names)
