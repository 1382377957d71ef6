"""Renders are repeatable to the bit, cancellable between steps, and carry what made them."""

import io
import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from compose import manifest
from compose.errors import InvalidRequest
from compose.render import Picture, Rendered, render
from compose.settings import Settings
from compose.warm import WarmPipeline, alone
from tests.adapters import random_factors

SETTINGS = Settings(
    prompt="a red star on a blue background", seed=5, steps=4, guidance=4.0, width=64, height=64
)


@dataclass
class Watcher:
    """Keeps what a render says; stops it after `allowed` checks."""

    allowed: int = 10_000
    checks: int = 0
    steps: list[tuple[int, int]] = field(default_factory=list)
    previews: list[tuple[int, int]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def check(self) -> None:
        self.checks += 1
        if self.checks > self.allowed:
            raise TimeoutError

    def step(self, image: int, step: int) -> None:
        self.steps.append((image, step))

    def preview(self, image: int, step: int, picture: Picture) -> None:
        assert picture.shape == (64, 64, 3)
        self.previews.append((image, step))

    def picture(self, image: int, picture: Picture) -> None:
        assert image == len(self.pictures)
        self.pictures.append(picture)


def run(warm: WarmPipeline, settings: Settings = SETTINGS, *, preview_every: int = 0, **how: int) -> Watcher:
    watcher = Watcher(**how)
    rendered = render(warm, settings, stack=(), listener=watcher, preview_every=preview_every)
    assert isinstance(rendered, Rendered)
    assert set(rendered.seconds) == {"patch", "embed", "denoise", "decode"}
    return watcher


def test_the_same_settings_give_the_same_pixels_whatever_ran_before(warm: WarmPipeline) -> None:
    first = run(warm).pictures[0]
    run(warm, replace(SETTINGS, seed=6, steps=2))
    assert np.array_equal(run(warm).pictures[0], first)
    assert np.array_equal(run(warm, preview_every=2).pictures[0], first)


def test_picture_i_of_many_is_the_one_with_seed_plus_i(warm: WarmPipeline) -> None:
    many = run(warm, replace(SETTINGS, count=3)).pictures
    alone = [run(warm, replace(SETTINGS, seed=5 + i)).pictures[0] for i in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(many, alone, strict=True))


def test_it_is_the_picture_that_diffusers_renders(warm: WarmPipeline) -> None:
    theirs = warm.pipeline(
        SETTINGS.prompt,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="pil",
    ).images[0]
    assert np.array_equal(run(warm).pictures[0], np.asarray(theirs))


def test_progress_and_previews_are_told(warm: WarmPipeline) -> None:
    watcher = run(warm, replace(SETTINGS, count=2), preview_every=2)
    assert watcher.steps == [(image, step) for image in range(2) for step in range(1, 5)]
    assert watcher.previews == [(0, 2), (1, 2)]


@pytest.mark.parametrize("allowed", range(6))
def test_a_render_stops_at_the_first_check_that_says_so(warm: WarmPipeline, allowed: int) -> None:
    with pytest.raises(TimeoutError):
        run(warm, allowed=allowed)
    layers = random_factors("pocket", seed=0, rank=1)
    watcher = Watcher(allowed=2)
    with pytest.raises(TimeoutError):
        render(warm, SETTINGS, stack=alone(layers), key="x", listener=watcher)
    warm.apply(())
    assert warm.is_golden()


def test_sizes_come_from_the_base(warm: WarmPipeline) -> None:
    assert (warm.base.size, warm.base.granularity) == (64, 16)
    watcher = Watcher()
    wide = replace(SETTINGS, width=96, height=32, steps=1)
    render(warm, wide, stack=(), listener=watcher)
    assert watcher.pictures[0].shape == (32, 96, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0 is not within 1 and 150"),
        ({"steps": 100_000}, "steps 100000 is not within"),
        ({"guidance": float("nan")}, "guidance nan is not within"),
        ({"guidance": -1.0}, "guidance -1.0 is not within"),
        ({"count": 65}, "count 65 is not within 1 and 64"),
        ({"seed": -1}, "seed -1 is not within"),
        ({"width": 63}, "width 63 must be a multiple of 16"),
        ({"height": 0}, "height 0 must be a multiple of 16"),
        ({"width": 4096}, "width 4096 must be a multiple of 16, from 16 to 2048"),
        ({"prompt": "x" * 5000}, "prompt has 5000 characters"),
        ({"negative_prompt": "a\x00b"}, "negative_prompt holds the control character"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        replace(SETTINGS, **change).check(16)  # type: ignore[arg-type]
    assert caught.value.field == next(iter(change))


@pytest.mark.parametrize(
    "prompt", ["赤い星\u3000夜", "un château\u00a0: nuit", "👩\u200d🎨 paints", "a\r\nred\tstar"]
)
def test_prompts_are_of_any_script(warm: WarmPipeline, prompt: str) -> None:
    told = replace(SETTINGS, prompt=prompt, steps=1)
    told.check(16)
    (picture,) = run(warm, told).pictures
    assert picture.shape == (64, 64, 3)
    made = json.dumps({"prompt": prompt}, ensure_ascii=False)
    assert json.loads(manifest.from_png(manifest.to_png(picture, made)))["prompt"] == prompt


def test_a_manifest_survives_its_png(warm: WarmPipeline) -> None:
    told = json.dumps({"manifest": 1, "prompt": "ein schöner Stern ⭐"}, ensure_ascii=False)
    png = manifest.to_png(run(warm).pictures[0], told)
    assert manifest.from_png(png) == told
    for bad in (b"", b"\x89PNG\r\n\x1a\n", png[:60], manifest.to_png(run(warm).pictures[0])):
        with pytest.raises(InvalidRequest):
            manifest.from_png(bad)


def chunks_of(png: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        found.append(png[at:end])
        at = end
    return found


def with_text_last(png: bytes) -> bytes:
    """As some tools write it: what is no pixel comes after them."""
    head, *rest, end = chunks_of(png)
    return png[:8] + b"".join([head, *sorted(rest, key=lambda chunk: chunk[4:8] != b"IDAT"), end])


def test_a_manifest_is_found_behind_the_pixels(warm: WarmPipeline) -> None:
    made = manifest.to_png(run(warm).pictures[0], "told")
    moved = with_text_last(made)
    assert moved != made
    assert moved.index(b"IDAT") < moved.index(b"iTXt")
    assert manifest.from_png(moved) == "told"


def test_no_more_pixels_are_read_to_find_it_than_a_render_may_have() -> None:
    large = with_text_last(manifest.to_png(np.zeros((4097, 4097, 3), np.uint8), "told"))
    with pytest.raises(InvalidRequest, match="no manifest before its pixels, and 4097x4097 of them"):
        manifest.from_png(large)


def test_a_text_behind_the_pixels_that_expands_is_refused(warm: WarmPipeline) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("atelier", " " * (8 << 20), zip=True)
    out = io.BytesIO()
    Image.fromarray(run(warm).pictures[0]).save(out, "png", pnginfo=info)
    with pytest.raises(InvalidRequest, match="this is no PNG: "):
        manifest.from_png(with_text_last(out.getvalue()))


def test_a_seed_below_zero_is_named() -> None:
    told = {
        "manifest": 2, "base": {}, "stack": [], "method": {"name": "naive"}, "prompt": "",
        "negative_prompt": "", "seed": -3, "steps": 1, "guidance": 1, "width": 64, "height": 64,
        "environment": {},
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="the manifest's seed -3 is below 0"):
        manifest.parse(json.dumps(told))


@pytest.mark.parametrize("text", ["", "[]", '{"manifest": 2}', '{"manifest": 1, "base": {}}', "[" * 5000])
def test_a_damaged_manifest_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        manifest.parse(text)
