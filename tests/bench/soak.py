"""A long day in a few minutes: renders with random stacks, callers who hang up or are in a hurry, and
nonsense, from several clients at once.

Server and clients share this process, so that its memory, files, threads and tasks are seen whole. Every 50th
picture is made again by Replay and must have the same pixels; at the end every weight must be the base's own.
The slopes are those of straight lines through the samples of the last four fifths.
Run: `python -m tests.bench.soak [--renders N]`.
"""

import argparse
import asyncio
import io
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from PIL import Image

from atelier.aio import AsyncClient
from atelier.messages import AtelierError, method
from compose import bases
from compose.pocket import ADAPTERS
from compose.warm import warm_up
from registry.catalog import Catalog
from server.engine import InProcessEngine
from server.serving import start
from tests.bench.report import save

NAMES = ("milo", "fungo", "ochreframe", "nightbars", "tealish", "rosy")
CLIENTS, STEPS, CHECKED, SAMPLED = 4, 4, 50, 25
FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
BAD: tuple[dict[str, Any], ...] = (
    {"steps": 0},
    {"steps": 100_000},
    {"width": 63},
    {"width": 1 << 20, "height": 8},
    {"guidance": float("nan")},
    {"count": 1000},
    {"stack": {"milo": float("inf")}},
    {"stack": {"milo": 1e9}},
    {"stack": {"nobody": 1.0}},
    {"stack": {"milo:999": 1.0}},
    {"stack": {"../../etc/passwd": 1.0}},
    {"stack": dict.fromkeys(NAMES, 1.0) | {f"x{i}": 1.0 for i in range(20)}},
    {"method": method("no-such-method")},
    {"base": "no-such-base"},
    {"preview_every": -1},
    {"negative_prompt": "\x07"},
    {"negative_prompt": "x" * 100_000},
)


@dataclass(slots=True)
class Day:
    """What happened."""

    wanted: int
    dice: random.Random
    done: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    replayed: int = 0
    samples: list[dict[str, float]] = field(default_factory=list)


async def caller(day: Day, address: str) -> None:
    """One client's day: it asks until there are pictures enough."""
    async with AsyncClient(address) as client:
        while day.done < day.wanted:
            kind = day.dice.choices(("render", "hang up", "hurry", "nonsense"), (72, 10, 6, 12))[0]
            try:
                await _ask(day, client, kind, address)
            except AtelierError as error:
                if error.code in FAULTS:
                    raise
                day.outcomes[f"{kind}: {error.code.name}"] += 1
                if kind == "render":
                    raise


async def _ask(day: Day, client: AsyncClient, kind: str, address: str) -> None:
    dice = day.dice
    if kind == "nonsense":
        await client.render("a red star", **dice.choice(BAD))
        raise AssertionError("nonsense was rendered")
    stack = {name: round(dice.uniform(-1, 1.5), 2) for name in dice.sample(NAMES, dice.randrange(4))}
    prompt = " ".join(["a red star on a blue background", *(f"{{{name}}}" for name in stack)])
    asked = {"stack": stack, "steps": STEPS, "seed": dice.getrandbits(32)}
    if kind == "hang up":
        left = dice.randrange(6)
        async with aclosing(client.events(prompt, **asked, count=2, preview_every=1)) as events:
            async for _ in events:
                left -= 1
                if left < 0:
                    day.outcomes["hung up"] += 1
                    return
        day.outcomes["too late to hang up"] += 1
    elif kind == "hurry":
        async with AsyncClient(address, timeout=dice.uniform(0.01, 1.0)) as hasty:
            await hasty.render(prompt, **asked)
        day.outcomes["made it"] += 1
    else:
        (png,) = await client.render(prompt, **asked)
        await _rendered(day, client, png)


async def _rendered(day: Day, client: AsyncClient, png: bytes) -> None:
    day.done += 1
    day.outcomes["rendered"] += 1
    number = day.done
    if number % CHECKED == 0:
        again = await client.replay(png)
        if not np.array_equal(_pixels(png), _pixels(again)):
            raise SystemExit(f"soak: picture {number} came out otherwise when it was replayed")
        day.replayed += 1
    if number % SAMPLED == 0:
        day.samples.append(sample(number))
    if number % 200 == 0:
        print(f"{number} of {day.wanted}: {day.samples[-1]}", file=sys.stderr)


def _pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def sample(number: int) -> dict[str, float]:
    """What the process holds after so many renders."""
    process = psutil.Process()
    return {
        "renders": number,
        "rss_mb": process.memory_info().rss / 1e6,
        "files": process.num_fds(),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }


def trend(samples: list[dict[str, float]], what: str) -> dict[str, float]:
    """Start, end, and growth for 1000 renders; of what goes up and down, each is the median of a fifth."""
    fifth = max(1, len(samples) // 5)
    later = samples[fifth:]
    x, y = ([float(s[key]) for s in later] for key in ("renders", what))
    slope = float(np.polyfit(x, y, 1)[0]) * 1000 if len(later) > 1 else 0.0
    edges = (samples[fifth : 2 * fifth] or samples, samples[-fifth:])
    start, end = (float(np.median([s[what] for s in edge])) for edge in edges)
    return {"start": round(start, 1), "end": round(end, 1), "growth_per_1000": round(slope, 2)}


async def day_of(catalog: Catalog, engine: InProcessEngine, renders: int) -> tuple[Day, dict[str, Any]]:
    """Runs the clients against a server on this loop."""
    running = await start(catalog, engine, listen="127.0.0.1:0", device="cpu")
    address, day = f"127.0.0.1:{running.port}", Day(renders, random.Random(5))
    try:
        async with AsyncClient(address) as client:
            for name in NAMES:
                path = ADAPTERS / f"{name}.safetensors"
                config = path.with_name(f"{name}.adapter_config.json")
                await client.check_in(
                    path,
                    name=name,
                    base="pocket",
                    card=path.with_suffix(".md").read_bytes(),
                    adapter_config=config.read_bytes() if config.is_file() else b"",
                )
            await asyncio.gather(*(caller(day, address) for _ in range(CLIENTS)))
            status = await client.status()
    finally:
        await running.stop(5.0)
    return day, dict(status.outcomes)


def main() -> None:
    """Soaks, prints, writes results/soak.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--renders", type=int, default=2000)
    renders = parser.parse_args().renders
    torch.set_num_threads(1)
    warm, begun = warm_up(bases.find("pocket")), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, closing(Catalog(Path(folder) / "data")) as catalog:
        day, told = asyncio.run(day_of(catalog, InProcessEngine(warm), renders))
    warm.apply({})
    if not warm.is_golden():
        raise SystemExit("soak: the weights are not the base's own any more")
    result = {
        "renders": day.done,
        "seconds": time.perf_counter() - begun,
        "clients": CLIENTS,
        "steps": STEPS,
        "asked": dict(sorted(day.outcomes.items())),
        "told_by_the_server": told,
        "replayed_to_the_same_pixels": day.replayed,
        "weights_golden_at_the_end": True,
        "process": {what: trend(day.samples, what) for what in ("rss_mb", "files", "threads", "tasks")},
        "malloc_arena_max": os.environ.get("MALLOC_ARENA_MAX", "not set"),
    }
    save("soak", result)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
