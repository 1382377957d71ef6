"""Sweeps: a cell is the render it says it is, everything is pinned before the first, the grid tells all."""

import asyncio
import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client, axis, method
from atelier.sweeps import Cell
from atelier.v1 import render_pb2, sweep_pb2
from compose import grid
from compose.manifest import from_png
from compose.pocket import ADAPTERS
from compose.warm import WarmPipeline
from server.auth import Tokens
from server.orders import Order
from server.rendering import Renderings
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving

FUNGO, FRAME = "sweep-fungo", "sweep-frame"
PROMPT = f"a {{{FUNGO}}} on a blue background, {{{FRAME}}}"
BOTH = {FUNGO: 1.0, FRAME: 0.5}


def stock(client: Client) -> None:
    """A character and a style."""
    for asset, name in ((FUNGO, "fungo"), (FRAME, "ochreframe")):
        card = (ADAPTERS / f"{name}.md").read_bytes()
        client.check_in(ADAPTERS / f"{name}.safetensors", name=asset, card=card)


@pytest.fixture(autouse=True)
def studio(client: Client) -> None:
    stock(client)


@pytest.fixture
def two(client: Client, tmp_path: Path) -> str:
    """An asset with two versions, `stable` the first."""
    name = f"sweep-two-{tmp_path.name.strip('_').replace('_', '-')[:60].rstrip('-')}"
    for seed in (501, 502):
        write_kohya(tmp_path / "v", random_factors("pocket", seed=seed, rank=2))
        client.check_in(tmp_path / "v", name=name, triggers=["sks"])
    client.set_alias(name, "stable", 1)
    return name


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def manifests(found: sweep_pb2.SweepSummary) -> dict[tuple[int, int], dict]:
    return {(c["column"], c["row"]): c["manifest"] for c in json.loads(found.sweep_json)["cells"]}


def test_a_cell_is_what_render_makes_and_replays_to_the_pixel(client: Client) -> None:
    cells: list[Cell] = []
    axes = [axis("weight", 0, 0.6, 1.2, of=FUNGO), axis("seed", 5, 6)]
    client.sweep(PROMPT, stack=BOTH, axes=axes, steps=3, seen=cells.append)
    assert {(c.column, c.row) for c in cells} == {(c, r) for c in range(3) for r in range(2)}
    for cell in cells:
        stack = BOTH | {FUNGO: (0, 0.6, 1.2)[cell.column]}
        (alone,) = client.render(PROMPT, stack=stack, seed=5 + cell.row, steps=3).pictures()
        assert cell.png == alone.png
    (again,) = client.replay(cells[-1].png).pictures()
    assert again.png == cells[-1].png


def test_every_kind_of_axis_reaches_its_cells(client: Client, two: str) -> None:
    def of(*axes: sweep_pb2.Axis, prompt: str = PROMPT, **settings: object) -> dict[tuple[int, int], dict]:
        return manifests(client.sweep(prompt, axes=axes, steps=1, **settings).summary)

    weights = of(axis("weight", 0, 1, of=FUNGO), axis("weight", -1, 0.25, of=f"{FRAME}:1"), stack=BOTH)
    told = {at: [entry["weight"] for entry in m["stack"]] for at, m in weights.items()}
    assert told == {(0, 0): [0, -1], (1, 0): [1, -1], (0, 1): [0, 0.25], (1, 1): [1, 0.25]}
    parts = of(
        axis("weight", 0, 2, of=FUNGO, part="text_encoder"), axis("weight", 0.5, 1, of=FUNGO), stack=BOTH
    )
    assert parts[1, 0]["stack"][0]["weight"] == 0.5
    assert parts[1, 0]["stack"][0]["parts"] == {"text_encoder": 2}
    methods = of(
        axis("method", "naive", method("orthogonal", side="output")),
        axis("weight", 1, of=FUNGO),
        stack=BOTH,
        method=method("tsv"),
    )
    assert methods[1, 0]["method"] == {"name": "orthogonal", "side": "output"}
    assert methods[0, 0]["method"] == {"name": "naive"}
    versions = of(
        axis("version", f"{two}:2", f"{two}@stable", of=two),
        axis("prompt", f"a {{{two}}}", f"two {{{two}}}"),
        prompt="",
        stack={two: 1.0},
    )
    assert [versions[c, 0]["stack"][0]["ref"] for c in (0, 1)] == [f"{two}:2", f"{two}:1"]
    assert [versions[0, r]["prompt"] for r in (0, 1)] == ["a sks", "two sks"]
    numbers = of(axis("guidance", 1, 2.5), axis("steps", 1, 2), prompt="a star")
    assert (numbers[1, 1]["guidance"], numbers[1, 1]["steps"]) == (2.5, 2)
    seeds = of(axis("seed", count=3), prompt="a star", seed=40)
    assert [seeds[c, 0]["seed"] for c in range(3)] == [40, 41, 42]


def test_an_alias_that_moves_meanwhile_changes_nothing(
    client: Client, two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, numbers = Renderings.order, itertools.count()

    def moving(self: Renderings, request: render_pb2.RenderRequest) -> Order:
        if next(numbers) == 1:  # between the first cell and the second
            client.set_alias(two, "stable", 2)
        return order(self, request)

    monkeypatch.setattr(Renderings, "order", moving)

    axes = [axis("weight", 0.5, 1, of=two), axis("seed", 1, 2)]
    swept = client.sweep("a {" + two + "}", stack={f"{two}@stable": 1.0}, axes=axes, steps=1)
    assert {m["stack"][0]["ref"] for m in manifests(swept.summary).values()} == {f"{two}:1"}
    (named,) = swept.document()["stack"]
    digest = client.get(f"{two}:1").version.digest
    assert named == {"asked": f"{two}@stable", "ref": f"{two}:1", "digest": digest}
    assert client.set_alias(two, "stable").version.number == 2


def test_all_cells_hold_one_picture_to_start_from_and_one_mask(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    (start,) = client.render("a star", steps=1, seed=1).pictures()
    order, opening, orders, opened = Renderings.order, Image.open, list[Order](), list[int]()

    def keeping(self: Renderings, request: render_pb2.RenderRequest, who: str = "") -> Order:
        before = len(opened)
        orders.append(order(self, request, who))
        counts.append(len(opened) - before)
        return orders[-1]

    def counting(*args: Any, **more: Any) -> Image.Image:
        opened.append(1)
        return opening(*args, **more)

    counts: list[int] = []
    monkeypatch.setattr(Renderings, "order", keeping)
    monkeypatch.setattr(Image, "open", counting)
    asked: dict[str, Any] = {"image": start.png, "mask": start.png}
    cells: list[Cell] = []
    axes = [axis("steps", 2, 3), axis("seed", 1, 2)]
    client.sweep("a star", axes=axes, seen=cells.append, **asked)
    assert counts == [2, 0, 0, 0]  # each is decoded once
    for what in ("picture", "mask"):
        assert len({id(getattr(order.source, what)) for order in orders}) == 1
    monkeypatch.undo()
    (last,) = [cell.png for cell in cells if (cell.column, cell.row) == (1, 1)]
    (made,) = client.render("a star", steps=3, seed=2, **asked).pictures()
    (again,) = client.replay(last, **asked).pictures()
    assert last == made.png == again.png


def test_a_seed_that_was_not_said_is_chosen_once(client: Client) -> None:
    swept = client.sweep("a star", axes=[axis("guidance", 1, 2, 3)], steps=1)
    (seed,) = {m["seed"] for m in manifests(swept.summary).values()}
    other = client.sweep("a star", axes=[axis("guidance", 1, 2, 3)], steps=1)
    assert seed not in {m["seed"] for m in manifests(other.summary).values()}


def test_cells_of_one_stack_come_together(client: Client) -> None:
    seen: list[tuple[int, int]] = []
    axes = [axis("weight", 0.2, 0.4, of=FUNGO), axis("seed", 1, 2, 3)]
    client.sweep(
        PROMPT, stack=BOTH, axes=axes, steps=1, seen=lambda cell: seen.append((cell.column, cell.row))
    )
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_the_grid_shows_every_cell_in_its_place_and_carries_the_sweep(client: Client) -> None:
    cells: list[Cell] = []
    axes = [axis("weight", 0, 0.4, 0.8, 1.2, of=FUNGO), axis("seed", 1, 2)]
    swept = client.sweep(PROMPT, stack=BOTH, axes=axes, steps=2, seen=cells.append)
    assert (swept.columns[1], swept.rows) == (f"{FUNGO} 0.4", ["seed 1", "seed 2"])
    sheet = pixels(swept.grid)
    left, top = sheet.shape[1] - 4 * 132 - 4, sheet.shape[0] - 2 * 132 - 4
    for cell in cells:
        x, y = left + cell.column * 132, top + cell.row * 132
        shown = sheet[y : y + 128 : 2, x : x + 128 : 2]
        assert np.array_equal(shown, pixels(cell.png))
    with Image.open(io.BytesIO(swept.grid)) as image:
        assert image.info[grid.CHUNK] == swept.summary.sweep_json
    told = swept.document()
    assert told["axes"][0]["values"] == [0, 0.4, 0.8, 1.2]
    assert told["axes"][0]["adapter"]["ref"] == f"{FUNGO}:1"
    with pytest.raises(AtelierError, match="the grid of a sweep; replay one of its cells"):
        list(client.replay(swept.grid))


def test_progress_counts_cells_and_steps(client: Client) -> None:
    told: list[sweep_pb2.SweepProgress] = []
    client.sweep("a star", axes=[axis("seed", 1, 2)], steps=2, told=told.append)
    assert {(p.cells_done, p.column) for p in told} == {(0, 0), (1, 1)}
    assert {(p.cells, p.steps) for p in told} == {(2, 2)}
    assert [p.cells_done for p in told] == sorted(p.cells_done for p in told)


def test_without_a_prompt_the_stack_is_called_by_its_triggers(client: Client, lora: Path) -> None:
    def prompt(**stack: float) -> str:
        named = {ref.replace("_", "-"): weight for ref, weight in stack.items()}
        swept = client.sweep(stack=named, axes=[axis("seed", 1)], steps=1)
        return str(manifests(swept.summary)[0, 0]["prompt"])

    both = prompt(sweep_fungo=1.0, sweep_frame=0.5)
    assert both.startswith("a fungo on a ")
    assert both.endswith(" background, in the style of ochreframe")
    client.save_stack({FUNGO: 1.0}, name="sweep-saved", prompt="a {sweep-fungo} on a red background")
    assert prompt(sweep_saved=1.0) == "a fungo on a red background"
    client.check_in(lora, name="sweep-mute")
    with pytest.raises(AtelierError, match=r"sweep-mute:1 has no trigger word .*; say what to draw"):
        prompt(sweep_mute=1.0)


def test_a_saved_stack_varies_as_one(client: Client) -> None:
    client.save_stack(BOTH, name="sweep-one", prompt=PROMPT, steps=2)
    swept = client.sweep(stack={"sweep-one": 1.0}, axes=[axis("weight", 0.5, 1, of="sweep-one")])
    told = manifests(swept.summary)
    assert [entry["weight"] for entry in told[0, 0]["stack"]] == [0.5, 0.25]
    assert [entry["ref"] for entry in told[1, 0]["stack"]] == [f"{FUNGO}:1", f"{FRAME}:1"]
    assert told[0, 0]["steps"] == 2
    assert swept.document()["prompt"] == "a fungo on a blue background, in the style of ochreframe"
    assert swept.document()["stack"][0]["ref"] == "sweep-one:1"


def test_versions_of_a_saved_stack_share_what_the_grid_says_of_all(client: Client) -> None:
    told = {"negative_prompt": "blue", "steps": 2, "guidance": 3.0}
    client.save_stack(BOTH, name="sweep-drifting", prompt=PROMPT, **told)
    client.save_stack({FUNGO: 1.0, FRAME: 0.2}, name="sweep-drifting")
    client.save_stack({FUNGO: 1.0, FRAME: 0.4}, name="sweep-drifting", prompt="a {sweep-fungo}", **told)

    def swept(*numbers: int) -> tuple[list[str], bool]:
        """The prompts, and whether the grid says exactly what all cells share."""
        cells: list[Cell] = []
        versions = axis("version", *(f"sweep-drifting:{n}" for n in numbers), of="sweep-drifting")
        found = client.sweep(stack={"sweep-drifting": 1.0}, axes=[versions], seed=1, seen=cells.append)
        one, other = (json.loads(from_png(cell.png)) for cell in cells)
        same = [one[name] == other[name] for name in ("prompt", "steps", "guidance", "negative_prompt")]
        notes = ["sweep-drifting “fungo, in the style of ochreframe” at 1"]
        notes += [f"pocket · 64x64 · naive{' · 2 steps · guidance 3' if all(same[1:3]) else ''} · seed 1"]
        notes += ["without “blue”"] if same[3] else []
        expected = grid.draw(
            [("", [grid.thumbnail(cell.png, 128) for cell in cells])],
            columns=found.columns,
            title=one["prompt"] if same[0] else "sweep-drifting: version",
            notes=notes,
            side=128,
        )
        return [one["prompt"], other["prompt"]], np.array_equal(pixels(found.grid), expected)

    assert swept(1, 3) == (["a fungo on a blue background, in the style of ochreframe", "a fungo"], True)
    (one, other), told_all = swept(1, 2)  # the second has no prompt of its own
    assert (one, told_all) == (other, True)
    assert one.startswith("a fungo on a ")


def test_others_get_their_turn_between_cells(server: Running, client: Client) -> None:
    positions: list[int] = []

    def ask(cell: Cell) -> None:
        with Client(server.address, timeout=60) as other:
            events = iter(other.render("a star", steps=1))
            positions.append(next(events).queued.position)
            assert list(events)[-1].HasField("summary")

    client.sweep("a star", axes=[axis("seed", count=16)], steps=1, seen=ask)
    assert len(positions) == 16
    assert max(positions) <= 3  # one that waits, and what has just ended; never the other fifteen


def test_hanging_up_cancels_the_cell_under_way(server: Running, client: Client) -> None:
    class Enough(Exception):
        pass

    def stop(progress: sweep_pb2.SweepProgress) -> None:
        if progress.step:
            raise Enough

    with pytest.raises(Enough), Client(server.address) as leaving:
        leaving.sweep("a star", axes=[axis("seed", count=256)], steps=150, told=stop)
    end = time.monotonic() + 20
    position = 1
    while position:  # nothing of the sweep is left before the next one
        assert time.monotonic() < end
        events = iter(client.render("a star", steps=1))
        position = next(events).queued.position
        assert list(events)[-1].HasField("summary")


async def test_a_task_that_is_cancelled_ends_its_sweep(server: Running) -> None:
    async with AsyncClient(server.address, timeout=60) as atelier:
        under_way = asyncio.Event()
        sweeping = asyncio.create_task(
            atelier.sweep("a star", axes=[axis("seed", count=256)], steps=150, told=lambda _: under_way.set())
        )
        await under_way.wait()
        sweeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sweeping
        assert await atelier.render("a star", steps=1)


def test_a_deadline_holds_for_the_whole_sweep(server: Running) -> None:
    with (
        Client(server.address, timeout=0.5) as hurried,
        pytest.raises(AtelierError, match="allow more time") as caught,
    ):
        hurried.sweep("a star", axes=[axis("seed", count=64)], steps=150)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_sweep_under_way_keeps_its_place_in_a_full_queue(tmp_path: Path, warm: WarmPipeline) -> None:
    with serving(tmp_path / "data", warm, capacity=1) as small, Client(small.address, timeout=60) as client:
        refusals: list[grpc.StatusCode] = []

        def ask(cell: Cell) -> None:
            if cell.column:
                return
            with (
                Client(small.address) as other,
                pytest.raises(AtelierError, match="try again later") as caught,
            ):
                other.sweep("a star", axes=[axis("seed", 1)], steps=1)
            refusals.append(caught.value.code)

        swept = client.sweep("a star", axes=[axis("steps", 1, 150)], seen=ask)
        assert len(manifests(swept.summary)) == 2
    assert refusals[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_async_client_sweeps_alike(server: Running, client: Client) -> None:
    asked = {"stack": BOTH, "axes": [axis("weight", 0.5, 1, of=FUNGO)], "seed": 3, "steps": 1}
    seen: list[Cell] = []
    async with AsyncClient(server.address) as atelier:
        swept = await atelier.sweep(PROMPT, **asked, seen=seen.append)
    here = client.sweep(PROMPT, **asked)
    assert (swept.columns, swept.rows, swept.grid) == (here.columns, here.rows, here.grid)
    assert [cell.column for cell in seen] == [0, 1]


def test_a_reader_may_sweep(tmp_path: Path, warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    tokens = Tokens(tmp_path / "data")
    monkeypatch.setenv("ATELIER_TOKEN", tokens.add("ann", "reader"))
    with serving(tmp_path / "data", warm, tokens=tokens) as running, Client(running.address) as client:
        assert client.sweep("a star", axes=[axis("seed", 1)], steps=1).grid
