"""ControlNets for inpainting: where their picture is transparent they read it as diffusers has it; tiny
random ones for tiny pipelines of every family that has them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compose import bases
from compose.controls import Control, find
from compose.errors import IncompatibleBase, InvalidRequest
from compose.guiding import Guides, attached
from compose.warm import WarmPipeline, warm_up
from tests.companions import tiny_control
from tests.compose.test_controls import control, drawn, mask, noise, theirs
from tests.compose.test_families import random_stack
from tests.pipelines import tiny

SD3 = ("sd3", "sd35-medium")
UNETS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=UNETS)
def any_unet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    return warm_with_holes(request.param, tmp_path_factory.mktemp("holes"))


@pytest.fixture(scope="module", params=SD3)
def any_sd3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    return warm_with_holes(request.param, tmp_path_factory.mktemp("holes"))


def warm_with_holes(family: str, folder: Path) -> WarmPipeline:
    """A base with two ControlNets, `hole` for inpainting and `edges`."""
    warm = warm_up(bases.find(f"tiny={tiny(family, folder / 'base')}"))
    extra: dict[str, Any] = {"extra_conditioning_channels": 1} if family in SD3 else {}
    tiny_control(warm, folder / "hole", seed=3, **extra)
    tiny_control(warm, folder / "edges", seed=4)
    said = "" if extra else ",inpaint"
    told = [f"tiny:hole={folder / 'hole'}{said}", f"tiny:edges={folder / 'edges'}"]
    (warm.base,) = attached([warm.base], controls=told)
    assert [net.masked for net in warm.base.controls] == [True, False]
    return warm


def hole(**how: Any) -> Control:
    picture = np.dstack([noise(1), 255 - mask()])
    return replace(control("hole", **how), picture=picture)


def marked() -> torch.Tensor:
    """The picture as diffusers' guide to ControlNet and inpainting makes it."""
    image = noise(1).astype(np.float32) / 255.0
    image[mask().astype(np.float32) / 255.0 > 0.5] = -1.0
    return torch.from_numpy(np.expand_dims(image, 0).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["", "image", "mask"])
@pytest.mark.parametrize("stacked", [False, True])
def test_it_renders_what_diffusers_renders(any_unet: WarmPipeline, kind: str, stacked: bool) -> None:
    stack = random_stack(any_unet) if stacked else ()
    for controls, pictures in (
        ((hole(end=0.7),), [marked()]),
        ((hole(), control("edges", weight=1.5)), [marked(), Image.fromarray(noise(1))]),
    ):
        (ours,) = drawn(any_unet, *controls, kind=kind, stack=stack)
        reference = theirs(any_unet, kind, *controls, pictures=pictures)
        if kind == "mask":
            reference = np.where(mask()[..., None] == 255, reference, noise(3))
        assert np.array_equal(ours, reference)
        assert np.array_equal(ours, drawn(any_unet, *controls, kind=kind, stack=stack)[0])


@pytest.mark.parametrize("stacked", [False, True])
def test_one_of_sd3_renders_what_diffusers_renders(any_sd3: WarmPipeline, stacked: bool) -> None:
    stack, asked = random_stack(any_sd3) if stacked else (), hole(end=0.7)
    (ours,) = drawn(any_sd3, asked, stack=stack)
    name, pictures = "StableDiffusion3ControlNetInpaintingPipeline", [Image.fromarray(noise(1))]
    over = Image.fromarray(mask(), "L")
    assert np.array_equal(ours, theirs(any_sd3, "", asked, name=name, pictures=pictures, control_mask=over))
    assert np.array_equal(ours, drawn(any_sd3, asked, stack=stack)[0])
    assert not np.array_equal(ours, drawn(any_sd3, stack=stack)[0])
    one, two = drawn(any_sd3, asked, count=2, batch=2)
    assert not np.array_equal(one, two)


def test_one_of_sd3_is_known_by_its_weights(any_sd3: WarmPipeline, tmp_path: Path) -> None:
    """As alimama-creative/SD3-Controlnet-Inpainting is published."""
    warm = warm_up(replace(any_sd3.base, controls=()))
    place = tiny_control(warm, tmp_path / "net", seed=3, extra_conditioning_channels=1)
    config = (place / "config.json").read_text()
    (place / "config.json").write_text(config.replace('"extra_conditioning_channels": 1,', ""))
    (warm.base,) = attached([warm.base], controls=[f"tiny:hole={place}"])
    assert np.array_equal(drawn(warm, hole())[0], drawn(any_sd3, hole())[0])


def test_one_of_sd3_acts_alone_and_from_nothing(any_sd3: WarmPipeline) -> None:
    with pytest.raises(
        InvalidRequest, match="hole and edges cannot act in one render: diffusers takes one m"
    ):
        drawn(any_sd3, hole(), control("edges"))
    with pytest.raises(InvalidRequest, match="hole cannot act in one render: diffusers takes one mask"):
        drawn(any_sd3, hole(), hole())
    with pytest.raises(IncompatibleBase, match=r"no pipeline of sd3\S* that starts from a picture"):
        drawn(any_sd3, hole(), kind="mask")
    with pytest.raises(InvalidRequest, match="has no modes to be named inpaint"):
        find(f"tiny:hole={any_sd3.base.controls[0].path},inpaint", [any_sd3.base])


def test_a_render_without_is_what_it_was_before(any_unet: WarmPipeline) -> None:
    fresh = warm_up(replace(any_unet.base, controls=()))
    before = [drawn(fresh, kind=kind)[0] for kind in ("", "image", "mask")]
    fresh.base = any_unet.base
    drawn(fresh, hole(), stack=random_stack(fresh))
    after = [drawn(fresh, kind=kind)[0] for kind in ("", "image", "mask")]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert fresh.is_golden()


def test_what_is_half_transparent_counts_by_half(any_unet: WarmPipeline) -> None:
    asked = hole()
    for least, most in ((0, 255), (127, 128)):
        picture = asked.picture.copy()
        picture[..., 3] = np.where(mask() == 255, least, most)
        assert np.array_equal(drawn(any_unet, replace(asked, picture=picture))[0], drawn(any_unet, asked)[0])


def test_a_picture_that_is_transparent_nowhere_is_refused(any_unet: WarmPipeline) -> None:
    whole = np.dstack([noise(1), np.full((32, 32), 255, np.uint8)])
    with pytest.raises(
        InvalidRequest, match=r"controls\[0\].image is transparent nowhere; make .* hole is"
    ) as no:
        Guides((replace(hole(), picture=whole),)).check(any_unet.base, "")
    assert no.value.field == "controls[0].image"
    with pytest.raises(InvalidRequest, match="edges does not read where its picture is transparent"):
        Guides((replace(hole(), name="edges"),)).check(any_unet.base, "")
    with pytest.raises(InvalidRequest, match="hole reads where its picture is transparent"):
        Guides((replace(hole(), picture=noise(1)),)).check(any_unet.base, "")


def test_what_a_manifest_says(any_unet: WarmPipeline) -> None:
    one, other = Guides((hole(), control("edges"))).told(any_unet.base)["controls"]
    assert one["masked"] is True
    assert "masked" not in other


def test_one_of_flux_is_refused(tmp_path: Path) -> None:
    """alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta brings a pipeline of its own."""
    flux = warm_up(bases.find(f"tiny={tiny('flux', tmp_path / 'base')}"))
    config = tiny_control(flux, tmp_path / "net") / "config.json"
    config.write_text(config.read_text().replace("{", '{"extra_condition_channels": 4,', 1))
    with pytest.raises(
        IncompatibleBase, match="mask beside its picture, for which diffusers has no pipeline"
    ):
        find(f"tiny:net={tmp_path / 'net'}", [flux.base])
