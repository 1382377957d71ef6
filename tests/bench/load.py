"""An open-loop load: latency and work done in time when more is asked for than can be made.

A server process on pocket, and callers who come when they come, whatever became of those before them: Poisson
arrivals at 0.3 to 3 times the capacity that a closed loop measured just before. Every latency counts from the
moment a request was due, not from when it could be sent, so that a stalled server hides nothing. Everybody
waits `PATIENCE` times as long as a lone render takes and hangs up then. Goodput: pictures that arrived in
time, a second.
Run: `python -m tests.bench.load [--seconds N]`.
"""

import argparse
import asyncio
import math
import random
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from PIL import Image, ImageDraw, ImageFont

from atelier.client import Client
from atelier.messages import OPTIONS, render_request
from atelier.v1 import render_pb2_grpc
from compose.pocket import ADAPTERS
from server.demo import server
from tests.bench.report import RESULTS, save

NAMES = ("milo", "fungo", "ochreframe", "nightbars")
USERS = ("pipeline", "ann", "bob", "cyd", "dan", "eve")
RATES = (0.3, 0.6, 0.9, 1.2, 2.0, 3.0)
STEPS, PATIENCE, CLOSED = (4, 8, 12), 10, 60
LATE, REFUSED = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED
WIDTH, HEIGHT, MARGIN = 520, 340, 64


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, due so many seconds after the beginning."""

    due: float
    user: str
    stack: Mapping[str, float]
    steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """How it ended, so many seconds after it was due."""

    outcome: str
    seconds: float


class Callers:
    """A connection for each user."""

    def __init__(self, address: str) -> None:
        self._channels = {user: grpc.aio.insecure_channel(address, options=OPTIONS) for user in USERS}

    async def close(self) -> None:
        """Closes the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def ask(self, ask: Ask, *, began: float, patience: float) -> Answer:
        """Waits until it is due, asks, and waits for the picture."""
        due = began + ask.due
        await asyncio.sleep(due - time.perf_counter())
        stub = render_pb2_grpc.RenderServiceStub(self._channels[ask.user])
        request = render_request(
            "a red star on a blue background", stack=ask.stack, steps=ask.steps, seed=ask.seed
        )
        left = max(0.001, due + patience - time.perf_counter())
        outcome = "cut off"
        try:
            async for event in stub.Render(request, timeout=left, metadata=(("atelier-user", ask.user),)):
                if event.HasField("summary"):
                    outcome = "done"
        except grpc.RpcError as error:
            outcome = {LATE: "late", REFUSED: "refused"}.get(error.code(), error.code().name)
        return Answer(outcome, time.perf_counter() - due)


def plan(rate: float, seconds: float, seed: int) -> list[Ask]:
    """Poisson arrivals."""
    dice, due, asks = random.Random(seed), 0.0, list[Ask]()
    while (due := due + dice.expovariate(rate)) < seconds:
        asks.append(mixed(due, dice))
    return asks


def mixed(due: float, dice: random.Random) -> Ask:
    """A stack of none to two adapters, a few steps; one user asks for half of everything."""
    stack = {name: round(dice.uniform(0.3, 1.2), 1) for name in dice.sample(NAMES, dice.randrange(3))}
    user = dice.choices(USERS, (5, 1, 1, 1, 1, 1))[0]
    return Ask(due, user, stack, dice.choice(STEPS), dice.getrandbits(32))


async def capacity(callers: Callers) -> tuple[float, float]:
    """Renders a second of two callers who ask again as soon as they are answered, and the seconds that a lone
    one takes.
    """
    dice = random.Random(1)

    async def many(count: int) -> list[float]:
        answers = [
            await callers.ask(mixed(0.0, dice), began=time.perf_counter(), patience=60.0)
            for _ in range(count)
        ]
        if ended := [answer.outcome for answer in answers if answer.outcome != "done"]:
            raise SystemExit(f"load: a render without any load ended as {ended[0]}")
        return [answer.seconds for answer in answers]

    await many(10)
    alone = statistics.median(await many(CLOSED // 2))
    begun = time.perf_counter()
    await asyncio.gather(many(CLOSED), many(CLOSED))
    return 2 * CLOSED / (time.perf_counter() - begun), alone


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds; {} when there are too few."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": cuts[p - 1] * 1e3 for p in (50, 90, 95, 99)}


async def at(callers: Callers, rate: float, *, seconds: float, patience: float) -> dict[str, Any]:
    """A load of `rate` requests a second for so many seconds."""
    asks = plan(rate, seconds, seed=round(rate * 1000))
    began = time.perf_counter() + 0.1
    answers = await asyncio.gather(*(callers.ask(ask, began=began, patience=patience) for ask in asks))
    done = [answer.seconds for answer in answers if answer.outcome == "done"]
    users = {user: [a for ask, a in zip(asks, answers, strict=True) if ask.user == user] for user in USERS}
    return {
        "offered_per_second": len(asks) / seconds,
        "goodput_per_second": len(done) / seconds,
        "outcomes": dict(Counter(answer.outcome for answer in answers)),
        "latency_ms_of_done": percentiles(done),
        "latency_ms_of_all": percentiles([answer.seconds for answer in answers]),
        "share_done_by_user": {
            user: sum(a.outcome == "done" for a in found) / len(found)
            for user, found in users.items()
            if found
        },
    }


async def measure(address: str, seconds: float) -> dict[str, Any]:
    """The capacity, each rate, and the capacity again: on a machine that others use it is another."""
    callers = Callers(address)
    try:
        most, alone = await capacity(callers)
        patience = PATIENCE * alone
        loads = {}
        for times in RATES:
            loads[f"{times:g}"] = await at(callers, times * most, seconds=seconds, patience=patience)
            await asyncio.sleep(patience / 2)  # what is still under way at the end is not the next one's
        again, _ = await capacity(callers)
    finally:
        await callers.close()
    best = max(load["goodput_per_second"] for load in loads.values())
    return {
        "capacity_per_second": most,
        "capacity_per_second_at_the_end": again,
        "lone_render_ms": alone * 1e3,
        "patience_ms": patience * 1e3,
        "seconds_at_each_rate": seconds,
        "by_multiple_of_capacity": loads,
        "goodput_at_3_times_over_best": loads[f"{RATES[-1]:g}"]["goodput_per_second"] / best,
    }


def picture(result: Mapping[str, Any]) -> Image.Image:
    """Goodput, and latency of what was done in time, over what was asked for."""
    loads = result["by_multiple_of_capacity"]
    times, most = [float(name) for name in loads], result["capacity_per_second"]
    goodput = [load["goodput_per_second"] / most for load in loads.values()]
    lines = {
        p: [load["latency_ms_of_done"].get(p, 0.0) for load in loads.values()] for p in ("p50", "p95", "p99")
    }
    sheet = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    asked, shown = "asked for, as multiple of capacity", f"done in time, of {most:.1f} renders a second"
    sheet.paste(_chart(times, {"": goodput}, across=asked, up=shown, level=1.0), (0, 0))
    sheet.paste(_chart(times, lines, across=asked, up="milliseconds until done, if done in time"), (WIDTH, 0))
    return sheet


def _chart(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], *, across: str, up: str, level: float = 0.0
) -> Image.Image:
    image, font = Image.new("RGB", (WIDTH, HEIGHT), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(image)
    right, most = max(x), max(level, *(value for line in lines.values() for value in line))
    tick = 10 ** math.floor(math.log10(most))
    tick = next(tick * factor for factor in (0.2, 0.5, 1, 2) if most / (tick * factor) <= 6)
    top = tick * math.ceil(most / tick)

    def place(a: float, b: float) -> tuple[float, float]:
        return (
            MARGIN + a / right * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - b / top * (HEIGHT - 2 * MARGIN),
        )

    for number in range(round(top / tick) + 1):
        y = place(0, number * tick)[1]
        draw.line((MARGIN, y, WIDTH - MARGIN, y), fill=(225, 225, 225))
        draw.text((MARGIN - 6, y), f"{round(number * tick, 6):g}", fill="black", font=font, anchor="rm")
    for value in x:
        at_x = place(value, 0)[0]
        draw.text((at_x, HEIGHT - MARGIN + 12), f"{value:g}", fill="black", font=font, anchor="mm")
    if level:
        draw.line((place(0, level), place(right, level)), fill=(178, 34, 24))
    for (name, line), shade in zip(lines.items(), ("black", (70, 110, 170), (178, 34, 24)), strict=False):
        points = [place(a, b) for a, b in zip(x, line, strict=True)]
        draw.line(points, fill=shade, width=2)
        for px, py in points:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=shade)
        draw.text((points[-1][0] + 8, points[-1][1]), name, fill=shade, font=font, anchor="lm")
    draw.text((WIDTH // 2, HEIGHT - MARGIN // 3), across, fill="black", font=font, anchor="mm")
    draw.text((MARGIN, MARGIN // 2), up, fill="black", font=font, anchor="lm")
    return image


def main() -> None:
    """Measures, prints, writes results/load.json and results/load.png."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder, server(Path(folder) / "catalog") as address:
        with Client(address) as client:
            for name in NAMES:
                path = ADAPTERS / f"{name}.safetensors"
                config = path.with_name(f"{name}.adapter_config.json")
                client.check_in(
                    path,
                    name=name,
                    base="pocket",
                    adapter_config=config.read_bytes() if config.is_file() else b"",
                )
        result = asyncio.run(measure(address, seconds))
    picture(result).save(RESULTS / "load.png")
    save("load", result)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
