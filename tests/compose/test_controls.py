"""ControlNets: what diffusers' own pipelines render with them, and nothing left behind; tiny random ones for
the tiny pipelines of every family.
"""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from compose import bases
from compose.bases import Base
from compose.controls import Control, find
from compose.errors import IncompatibleBase, InvalidRequest
from compose.guiding import UNGUIDED, Guides, attached
from compose.layerwise import Stack
from compose.render import Picture, render
from compose.residence import Residence, needs
from compose.schedule import Phase, Plan
from compose.schedulers import schedulers
from compose.settings import Settings
from compose.source import Source
from compose.warm import WarmPipeline, warm_up
from tests.companions import tiny_control
from tests.compose.test_families import Kept, random_stack
from tests.pipelines import FAMILIES, tiny

TOLD: dict[str, Any] = {"seed": 5, "steps": 3, "guidance": 4.0, "width": 32, "height": 32}
CLASSES = {
    "sd1": "StableDiffusionControlNet{}Pipeline",
    "sd2": "StableDiffusionControlNet{}Pipeline",
    "sdxl": "StableDiffusionXLControlNet{}Pipeline",
    "sd3": "StableDiffusion3ControlNet{}Pipeline",
    "sd35-medium": "StableDiffusion3ControlNet{}Pipeline",
    "flux": "FluxControlNet{}Pipeline",
}
KINDS = {"": "", "image": "Img2Img", "mask": "Inpaint"}


@pytest.fixture(scope="module", params=FAMILIES)
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    """A base of each family with two ControlNets, `edges` and `depth`."""
    folder = tmp_path_factory.mktemp("controls")
    return warm_with_controls(request.param, folder)


def warm_with_controls(family: str, folder: Path) -> WarmPipeline:
    """A tiny base with two ControlNets."""
    base = bases.find(f"tiny={tiny(family, folder / 'base')}")
    warm = warm_up(base)
    for seed, name in enumerate(("edges", "depth")):
        tiny_control(warm, folder / name, seed=seed)
    (warm.base,) = attached([base], controls=[f"tiny:{n}={folder / n}" for n in ("edges", "depth")])
    return warm


def noise(seed: int) -> Picture:
    return np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)


def control(name: str, **how: Any) -> Control:
    told: dict[str, Any] = {"weight": 0.8, "start": 0.0, "end": 1.0, **how}
    return Control(name, noise(1 if name == "edges" else 2), digest=f"sha256:{name}", **told)


def mask() -> np.ndarray:
    found = np.zeros((32, 32), np.uint8)
    found[8:24, 8:24] = 255
    return found


def source(kind: str) -> Source | None:
    if kind == "mask":
        return Source(noise(3), mask(), 1.0, "sha256:x", "sha256:y")
    return Source(noise(3), None, 1.0, "sha256:x") if kind else None


def drawn(
    warm: WarmPipeline,
    *controls: Control,
    stack: Stack = (),
    kind: str = "",
    plan: Plan | None = None,
    prompt: str = "a red star",
    **more: Any,
) -> list[Picture]:
    kept, guides = Kept(), Guides(controls)
    guides.check(warm.base, kind)
    how = {"plan": plan} if plan else {}
    settings = Settings(prompt=prompt, **(TOLD | more))
    render(warm, settings, stack=stack, source=source(kind), guides=guides, listener=kept, **how)
    return kept.pictures


def theirs(
    warm: WarmPipeline, kind: str, *controls: Control, name: str = "", pictures: Any = (), **more: Any
) -> np.ndarray:
    """What diffusers' own pipeline, or the one of this name, draws with the same tensors as they are now:
    products round by where they lie; from these pictures, where they are not those of the controls.
    """
    name = name or CLASSES[warm.base.family]
    cls = getattr(diffusers, name.format(KINDS[kind]))
    paths = {net.name: net.path for net in warm.base.controls}
    nets = [warm.beside[paths[c.name]] for c in controls]
    own, scheduler = warm.pipeline, type(warm.pipeline.scheduler)
    parts = {
        **own.components,
        "controlnet": nets if len(nets) > 1 else nets[0],
        "scheduler": scheduler.from_config(warm.scheduler_config),
    }
    picture = "control_image" if kind or "control_image" in cls.__call__.__annotations__ else "image"
    pipeline = cls(**{name: part for name, part in parts.items() if name in cls.__init__.__annotations__})
    pipeline.set_progress_bar_config(disable=True)

    def each(values: list[Any]) -> Any:
        return values if len(values) > 1 else values[0]

    told: dict[str, Any] = {
        picture: each(list(pictures) or [Image.fromarray(c.picture) for c in controls]),
        "controlnet_conditioning_scale": each([c.weight for c in controls]),
        "control_guidance_start": each([c.start for c in controls]),
        "control_guidance_end": each([c.end for c in controls]),
    }
    if kind:
        told |= {"image": Image.fromarray(noise(3)), "strength": 1.0}
    if kind == "mask":
        told["mask_image"] = Image.fromarray(mask(), "L")
    if warm.base.family.startswith("sd3"):
        told["max_sequence_length"] = 256
    if warm.base.family == "flux" and len(controls) > 1:
        told["control_mode"] = [None] * len(controls)
    told |= more
    torch.manual_seed(5)  # SD3's pipeline draws from no generator
    with torch.no_grad():
        (image,) = pipeline(
            "a red star",
            width=32,
            height=32,
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(5),
            **told,
        ).images
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["", "image", "mask"])
@pytest.mark.parametrize("stacked", [False, True])
def test_it_renders_what_diffusers_renders(any_base: WarmPipeline, kind: str, stacked: bool) -> None:
    if any_base.base.family.startswith("sd3") and kind:
        with pytest.raises(IncompatibleBase, match=r"no pipeline of sd3\S* that starts from a picture"):
            drawn(any_base, control("edges"), kind=kind)
        return
    stack = random_stack(any_base) if stacked else ()
    one, both = (control("edges", start=0.0, end=0.7),), (control("edges"), control("depth", weight=1.5))
    for controls in (one, both):
        (ours,) = drawn(any_base, *controls, kind=kind, stack=stack)
        (again,) = drawn(any_base, *controls, kind=kind, stack=stack)
        reference = theirs(any_base, kind, *controls)
        if kind == "mask":  # what is not painted is the source's own here
            reference = np.where(mask()[..., None] == 255, reference, noise(3))
        assert np.array_equal(ours, reference)
        assert np.array_equal(ours, again)
        (bare,) = drawn(any_base, kind=kind, stack=stack)
        assert not np.array_equal(ours, bare)


def test_a_render_without_is_what_it_was_before(any_base: WarmPipeline) -> None:
    fresh = warm_up(replace(any_base.base, controls=()))
    before = [drawn(fresh, kind=kind)[0] for kind in ("", "image", "mask")]
    fresh.base = any_base.base
    forward = type(fresh.denoiser).forward
    drawn(fresh, control("edges"), stack=random_stack(fresh))
    after = [drawn(fresh, kind=kind)[0] for kind in ("", "image", "mask")]
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)
    assert fresh.is_golden()
    assert type(fresh.denoiser).forward is forward
    assert "forward" not in vars(fresh.denoiser)
    assert "controlnet" not in fresh.pipeline.components


def test_weight_and_range_and_picture_matter(any_base: WarmPipeline) -> None:
    (whole,) = drawn(any_base, control("edges"))
    for other in (
        control("edges", weight=0.4),
        control("edges", end=0.5),
        control("edges", start=0.5),
        replace(control("edges"), picture=noise(9)),
        control("depth"),
    ):
        assert not np.array_equal(drawn(any_base, other)[0], whole)
    if any_base.base.family not in {
        "sd3",
        "sd35-medium",
        "flux",
    }:  # those draw the picture's latents before the noise
        assert np.array_equal(drawn(any_base, control("edges", weight=0.0))[0], drawn(any_base)[0])


@pytest.mark.parametrize("kind", ["", "image", "mask"])
def test_a_batch_has_the_pictures_of_its_seeds(any_base: WarmPipeline, kind: str) -> None:
    for controls in ((), (control("edges"),)):
        if controls and kind and any_base.base.family in {"sd3", "sd35-medium"}:
            continue  # there they start from nothing
        alone = drawn(any_base, *controls, kind=kind, count=3)
        together = drawn(any_base, *controls, kind=kind, count=3, batch=3)
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one.astype(int) - other).max() <= 2


def test_several_pictures_batches_previews_schedules_and_composites(any_base: WarmPipeline) -> None:
    one, two = drawn(any_base, control("edges"), count=2)
    assert np.array_equal(one, drawn(any_base, control("edges"))[0])
    assert np.array_equal(two, drawn(any_base, control("edges"), seed=6)[0])
    batch = drawn(any_base, control("edges"), control("depth"), count=2, batch=2)
    assert not np.array_equal(*batch)
    stack = (*random_stack(any_base), *random_stack(any_base))
    late = Plan(((Phase(0.5, 1.0),), ()))
    scheduled = drawn(any_base, control("edges"), stack=stack, plan=late)[0]
    assert not np.array_equal(scheduled, drawn(any_base, control("edges"), stack=stack)[0])
    together, again = (
        drawn(any_base, control("edges"), stack=stack, plan=Plan((), "composite"))[0] for _ in range(2)
    )
    assert np.array_equal(together, again)

    class Stepped(Kept):
        def step(self, image: int, step: int) -> None:
            steps.append(step)

    steps: list[int] = []
    if "HeunDiscreteScheduler" in schedulers(any_base.base):  # it asks the model twice a step
        settings = Settings(prompt="a", scheduler="HeunDiscreteScheduler", **TOLD)
        render(any_base, settings, stack=(), guides=Guides((control("edges"),)), listener=Stepped())
        assert steps == [1, 2, 3]

    class Previewed(Kept):
        def preview(self, image: int, step: int, picture: Picture) -> None:
            seen.append((image, step))

    seen: list[tuple[int, int]] = []
    kept = Previewed()
    settings = Settings(prompt="a red star", **TOLD)
    told = {"stack": (), "guides": Guides((control("edges"),)), "listener": kept, "preview_every": 1}
    rendered = render(any_base, settings, **told)  # type: ignore[arg-type]
    assert seen == [(0, 1), (0, 2)]
    assert np.array_equal(kept.pictures[0], drawn(any_base, control("edges"))[0])
    assert set(rendered.seconds) == {"patch", "embed", "guide", "denoise", "decode"}


def test_a_cancel_in_the_middle_leaves_nothing(any_base: WarmPipeline) -> None:
    (bare,) = drawn(any_base)

    class Stops(Kept):
        def step(self, image: int, step: int) -> None:
            raise TimeoutError

    guides, stack = Guides((control("edges"),)), random_stack(any_base)
    with pytest.raises(TimeoutError):
        render(any_base, Settings(prompt="a", **TOLD), stack=stack, guides=guides, listener=Stops())
    assert np.array_equal(drawn(any_base)[0], bare)
    assert any_base.is_golden()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"weight": float("nan")}, r"controls\[0\].weight nan is not within 0 and 2"),
        ({"weight": -0.1}, "weight -0.1 is not within"),
        ({"weight": 2.1}, "weight 2.1 is not within"),
        ({"start": 0.5, "end": 0.5}, "acts from 0.5 to 0.5; begin from 0 on, and end later"),
        ({"start": 0.6, "end": 0.5}, "acts from 0.6 to 0.5"),
        ({"start": -0.1}, "acts from -0.1"),
        ({"end": 1.1}, "to 1.1"),
        ({"start": float("nan")}, "acts from nan"),
    ],
)
def test_values_out_of_range_are_refused(small: WarmPipeline, how: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Guides((control("edges", **how),)).check(small.base, "")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    """A tiny SD 1.5 with its ControlNets."""
    return warm_with_controls("sd1", tmp_path_factory.mktemp("small"))


def test_names_that_are_none_and_too_many_are_refused(small: WarmPipeline) -> None:
    with pytest.raises(InvalidRequest, match="tiny has no ControlNet 'pose'; it has edges, depth") as refused:
        Guides((control("pose"),)).check(small.base, "")
    assert refused.value.field == "controls[0].name"
    with pytest.raises(InvalidRequest, match=r"it has none \(atelier serve --control\)"):
        Guides((control("edges"),)).check(replace(small.base, controls=()), "")
    with pytest.raises(InvalidRequest, match="5 controls, the limit is 4"):
        Guides((control("edges"),) * 5).check(small.base, "")
    assert not UNGUIDED


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), r"config\.json cannot be read"),
        (lambda p: (p / "config.json").write_text("[]"), "is no configuration"),
        (lambda p: (p / "diffusion_pytorch_model.safetensors").unlink(), "is missing; download it again"),
        (
            lambda p: (p / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 99),
            r"safetensors cannot be read",
        ),
        (spoilt(lambda c: c.update(_class_name="UNet2DConditionModel")), "holds a UNet2DConditionModel"),
        (spoilt(lambda c: c.update(_class_name="ControlNetUnionModel")), "takes a ControlNetModel"),
        (spoilt(lambda c: c.update(cross_attention_dim=1024)), "its cross_attention_dim is 1024, not 768"),
        (spoilt(lambda c: c.update(in_channels=9)), "its in_channels is 9, not 4"),
        (spoilt(lambda c: c.update(conditioning_embedding_out_channels=[4, 8, 8, 8])), "scale is 8, not 2"),
        (
            spoilt(lambda c: c.update(conditioning_embedding_out_channels=[4, 4])),
            "is damaged: of ",
        ),
        (spoilt(lambda c: c.update(conditioning_embedding_out_channels=5)), "picture's scale is 0, not 2"),
        (spoilt(lambda c: c.update(down_block_types=["Nope", "Nope"])), "makes no ControlNetModel"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused_before_serving(
    small: WarmPipeline, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small.base.controls[0].path, copy)
    find(f"tiny:good={copy}", [small.base])
    spoil(copy)
    with pytest.raises(IncompatibleBase, match=message) as refused:
        find(f"tiny:bad={copy}", [small.base])
    assert refused.value.field == "control"


def test_weights_in_half_precision_alone_are_weights(small: WarmPipeline, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(small.base.controls[0].path, half)
    file = half / "diffusion_pytorch_model.safetensors"
    file.rename(half / "diffusion_pytorch_model.fp16.safetensors")
    warm = warm_up(replace(small.base, controls=()))
    (warm.base,) = attached([warm.base], controls=[f"tiny:edges={half}"])
    assert np.array_equal(drawn(warm, control("edges"))[0], drawn(small, control("edges"))[0])
    file.write_bytes(b"\0" * 99)  # where both are there, it is the other that counts
    with pytest.raises(IncompatibleBase, match=r"model\.safetensors cannot be read"):
        find(f"tiny:edges={half}", [small.base])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canny", "write BASE:NAME=PLACE"),
        ("tiny:canny", "write BASE:NAME=PLACE"),
        ("canny=/x", "write BASE:NAME=PLACE"),
        ("tiny:=/x", "'' is no name"),
        ("tiny:A b=/x", "'A b' is no name"),
        ("other:canny=/x", "there is no base 'other'; there is tiny"),
        ("tiny:canny=/nowhere", "there is no directory /nowhere"),
    ],
)
def test_what_is_mistyped_is_told(small: WarmPipeline, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        find(text, [small.base])


def test_one_of_another_family_is_refused(small: WarmPipeline, tmp_path: Path) -> None:
    other = warm_with_controls("flux", tmp_path / "flux")
    with pytest.raises(IncompatibleBase, match=r"holds a FluxControlNetModel; tiny \(sd1\) takes a Control"):
        find(f"tiny:flux={other.base.controls[0].path}", [small.base])
    xl = warm_with_controls("sdxl", tmp_path / "sdxl")
    with pytest.raises(IncompatibleBase, match="its cross_attention_dim is 64, not 768"):
        find(f"tiny:xl={xl.base.controls[0].path}", [small.base])
    with pytest.raises(InvalidRequest, match="tiny has two ControlNets edges"):
        attached([small.base], controls=[f"tiny:edges={small.base.controls[0].path}"])


def test_flux_controls_that_read_otherwise_do_not_act_together(tmp_path: Path) -> None:
    flux = warm_with_controls("flux", tmp_path)
    tiny_control(flux, tmp_path / "bare", guidance_embeds=False)
    (flux.base,) = attached([flux.base], controls=[f"tiny:bare={tmp_path / 'bare'}"])
    assert drawn(flux, control("bare"))
    with pytest.raises(InvalidRequest, match="edges and bare cannot act in one render: their gui"):
        drawn(flux, control("edges"), control("bare"))


def test_what_a_manifest_says(small: WarmPipeline) -> None:
    told = Guides((control("edges", end=0.5),)).told(small.base)
    digest = small.base.controls[0].digest
    assert told == {
        "controls": [
            {
                "name": "edges",
                "digest": digest,
                "image": "sha256:edges",
                "weight": 0.8,
                "start": 0.0,
                "end": 0.5,
            }
        ]
    }
    assert UNGUIDED.told(small.base) == {}


def test_a_budget_counts_them_and_they_go_with_their_base(small: WarmPipeline, warm: WarmPipeline) -> None:
    def renamed(name: str) -> Base:
        return replace(small.base, name=name)

    one, two, bare = renamed("one"), renamed("two"), replace(small.base, controls=())
    beside = sum(net.parameters for net in one.controls) * 4
    assert needs(one, small.device) - needs(bare, small.device) == beside > 0
    with pytest.raises(InvalidRequest, match=r"needs about .* raise --memory"):
        Residence(small, [one], budget=needs(bare, small.device))
    held = Residence(small, [one, two], budget=2 * needs(one, small.device))
    first = held.warm("one")
    assert not first.beside
    size = first.nbytes()
    drawn(first, control("edges"))
    assert list(first.beside) == [small.base.controls[0].path]
    assert first.nbytes() - size >= one.controls[0].parameters * 4
    net = weakref.ref(first.beside[small.base.controls[0].path])
    assert net() is not None
    held.warm("two")
    held.warm("tiny")
    assert [w.base.name for w in held.loaded()] == ["two", "tiny"]
    del first
    assert net() is None
