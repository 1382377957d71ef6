"""Union ControlNets: each mode as diffusers' own pipelines read it, by name and by number; tiny random ones
for tiny pipelines of SDXL and FLUX.1.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compose import bases
from compose.companions import Companion
from compose.controls import Control, find
from compose.errors import IncompatibleBase, InvalidRequest
from compose.guiding import Guides, attached
from compose.modes import named_modes
from compose.references import Reference
from compose.render import render
from compose.settings import Settings
from compose.warm import WarmPipeline, warm_up
from tests.companions import tiny_adapter, tiny_control, tiny_encoder
from tests.compose.test_controls import TOLD, control, drawn, mask, noise, theirs
from tests.compose.test_families import Kept, random_stack
from tests.pipelines import tiny

MODES = {"sdxl": {"num_control_type": 6}, "flux": {"num_mode": 10}}
NAMES = {
    "sdxl": ("openpose", "depth", "hed", "canny", "normal", "segment"),
    "flux": ("canny", "tile", "depth", "blur", "pose", "gray", "lq", "7", "8", "9"),
}
CLASSES = {"sdxl": "StableDiffusionXLControlNetUnion{}Pipeline", "flux": "FluxControlNet{}Pipeline"}


@pytest.fixture(scope="module", params=MODES)
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    """A base with two union ControlNets, `union` and `other`, and a plain one, `edges`."""
    return warm_with_unions(request.param, tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    return warm_with_unions("sdxl", tmp_path_factory.mktemp("sdxl"))


def warm_with_unions(family: str, folder: Path) -> WarmPipeline:
    warm = warm_up(bases.find(f"tiny={tiny(family, folder / 'base')}"))
    tiny_control(warm, folder / "union", seed=3, **MODES[family])
    tiny_control(warm, folder / "other", seed=4, **MODES[family])
    tiny_control(warm, folder / "edges", seed=5)
    told = [f"tiny:{name}={folder / name}" for name in ("union", "other", "edges")]
    (warm.base,) = attached([warm.base], controls=told)
    return warm


def union(mode: str, name: str = "union", **how: Any) -> Control:
    return replace(control(name, mode=mode, **how), picture=noise(1 if mode in {"canny", "depth"} else 2))


def reference(warm: WarmPipeline, kind: str, modes: Sequence[int | None], *controls: Control) -> np.ndarray:
    name, told = CLASSES[warm.base.family], modes if len(modes) > 1 else modes[0]
    found = theirs(warm, kind, *controls, name=name, control_mode=told)
    return np.where(mask()[..., None] == 255, found, noise(3)) if kind == "mask" else found


@pytest.mark.parametrize("kind", ["", "image", "mask"])
@pytest.mark.parametrize("stacked", [False, True])
def test_it_renders_what_diffusers_renders(any_base: WarmPipeline, kind: str, stacked: bool) -> None:
    stack = random_stack(any_base) if stacked else ()
    depth, canny = (NAMES[any_base.base.family].index(name) for name in ("depth", "canny"))
    for modes, controls in (
        ([depth], [union("depth", start=0.0, end=0.7)]),
        ([depth, canny], [union("depth"), union("canny", weight=1.5, end=0.5)]),
        ([4, depth, canny], [union("4", "other"), union("depth"), union("canny", weight=0.0)]),
    ):
        (ours,) = drawn(any_base, *controls, kind=kind, stack=stack)
        assert np.array_equal(ours, reference(any_base, kind, modes, *controls))
        assert np.array_equal(ours, drawn(any_base, *controls, kind=kind, stack=stack)[0])
        assert not np.array_equal(ours, drawn(any_base, kind=kind, stack=stack)[0])


def test_a_mode_is_its_name_or_its_number_and_matters(any_base: WarmPipeline) -> None:
    names = NAMES[any_base.base.family]
    assert any_base.base.controls[0].modes == names
    same, other = control("union", mode="depth"), control("union", mode="canny")
    (ours,) = drawn(any_base, same)
    assert np.array_equal(ours, drawn(any_base, replace(same, mode=str(names.index("depth"))))[0])
    assert not np.array_equal(ours, drawn(any_base, other)[0])


def test_one_of_no_weight_leaves_the_other_alone(any_base: WarmPipeline) -> None:
    both = drawn(any_base, union("depth"), union("canny", weight=0.0))[0]
    assert any_base.base.family == "flux" or np.array_equal(both, drawn(any_base, union("depth"))[0])
    assert not np.array_equal(both, drawn(any_base, union("depth"), union("canny"))[0])


@pytest.mark.parametrize("kind", ["", "image", "mask"])
def test_a_batch_is_of_each_seed(any_base: WarmPipeline, kind: str) -> None:
    """FLUX.1's pipelines from a picture tell the mode once for all of a batch; inpainting draws otherwise in
    one.
    """
    for controls in ([union("depth")], [union("depth"), union("canny")]):
        one, two = drawn(any_base, *controls, kind=kind, count=2, batch=2)
        assert not np.array_equal(one, two)
        for seed, picture in ((5, one), (6, two)) if kind != "mask" else ():
            (alone,) = drawn(any_base, *controls, kind=kind, seed=seed)
            assert np.abs(picture.astype(int) - alone).max() <= 3


def test_a_render_without_is_what_it_was_before(any_base: WarmPipeline) -> None:
    fresh = warm_up(replace(any_base.base, controls=()))
    before = [drawn(fresh, kind=kind)[0] for kind in ("", "image", "mask")]
    fresh.base = any_base.base
    for kind in ("", "image", "mask"):
        drawn(fresh, union("depth"), union("canny"), kind=kind, stack=random_stack(fresh))
    after = [drawn(fresh, kind=kind)[0] for kind in ("", "image", "mask")]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert fresh.is_golden()
    assert "controlnet" not in fresh.pipeline.components


def test_a_union_beside_a_reference(sdxl: WarmPipeline, tmp_path: Path) -> None:
    warm = warm_up(replace(sdxl.base, controls=()))
    tiny_encoder(tmp_path / "image_encoder")
    place = tiny_adapter(warm, tmp_path / "style.safetensors")
    (warm.base,) = attached([sdxl.base], references=[f"tiny:style={place}"])

    def steered(*references: Reference) -> np.ndarray:
        kept, guides = Kept(), Guides((union("depth"),), references)
        guides.check(warm.base, "")
        render(warm, Settings(prompt="a red star", **TOLD), stack=(), guides=guides, listener=kept)
        return kept.pictures[0]

    style = Reference("style", noise(8), 0.7, "sha256:r")
    assert np.array_equal(steered(style), steered(style))
    assert not np.array_equal(steered(style), steered())
    assert np.array_equal(steered(), drawn(sdxl, union("depth"))[0])


def test_a_union_beside_a_plain_one(any_base: WarmPipeline) -> None:
    controls = union("depth"), control("edges")
    if any_base.base.family == "sdxl":
        with pytest.raises(
            InvalidRequest, match="union and edges cannot act in one render: diffusers has no"
        ):
            drawn(any_base, *controls)
        return
    (ours,) = drawn(any_base, *controls)
    assert np.array_equal(ours, reference(any_base, "", [2, None], *controls))


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        (
            "union",
            "",
            r"\.mode is missing: say what union reads; take one of openpose, .*, segment, or its n",
        ),
        ("union", "lineart", r"\.mode 'lineart' is none of union's; take one of openpose.* number, 0 to 5"),
        ("union", "6", r"\.mode '6' is none of union's"),
        ("union", "-1", r"\.mode '-1' is none"),
        ("union", "1.0", r"\.mode '1.0' is none"),
        ("union", "٣", r"\.mode '٣' is none"),
        ("union", "9" * 5000, r"\.mode '9{80}' is none"),
        (
            "edges",
            "canny",
            r"\.mode 'canny' says nothing to edges, which reads pictures of one kind; leave it",
        ),
    ],
)
def test_modes_that_are_none_are_refused(sdxl: WarmPipeline, name: str, mode: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=r"controls\[0\]" + message) as refused:
        Guides((control(name, mode=mode),)).check(sdxl.base, "")
    assert refused.value.field == "controls[0].mode"


def test_what_a_manifest_says(sdxl: WarmPipeline) -> None:
    told = Guides((control("union", mode="canny"), control("edges"))).told(sdxl.base)["controls"]
    assert told[0]["mode"] == 3
    assert "mode" not in told[1]


def test_modes_are_named_where_it_is_served(sdxl: WarmPipeline) -> None:
    place = sdxl.base.controls[0].path

    def found(words: str, base: WarmPipeline = sdxl) -> Companion:
        return find(f"tiny:mine={place}{words}", [base.base])[1]

    assert found(",ink,pencil").modes == ("ink", "pencil", "2", "3", "4", "5")
    for words, message in (
        (",ink,ink", "'ink' is no name of a mode; take up to 32 of a-z, .* each name once"),
        (",3", "'3' is no name of a mode"),
        (",", "'' is no name of a mode"),
        (",Ink", "'Ink' is no name of a mode"),
        (",a,b,c,d,e,f,g", "has 6 modes, not 7"),
    ):
        with pytest.raises(InvalidRequest, match=message) as refused:
            found(words)
        assert refused.value.field == "control"
    with pytest.raises(InvalidRequest, match="has no modes to be named ink; it may be said to be inpaint"):
        find(f"tiny:edges={sdxl.base.controls[2].path},ink", [sdxl.base])


def test_a_directory_with_a_comma_is_one(sdxl: WarmPipeline, tmp_path: Path) -> None:
    tiny_control(sdxl, tmp_path / "a,b", **MODES["sdxl"])
    assert find(f"tiny:mine={tmp_path / 'a,b'}", [sdxl.base])[1].modes == NAMES["sdxl"]


def test_published_modes_have_names() -> None:
    assert named_modes("ControlNetUnionModel", 8, (), Path("x"))[5:] == ("segment", "tile", "repaint")
    assert named_modes("ControlNetUnionModel", 3, (), Path("x")) == ("0", "1", "2")
    assert named_modes("ControlNetModel", 0, (), Path("x")) == ()


@pytest.mark.parametrize("number", [6, 8])
def test_a_union_that_is_said_to_be_plain_is_known_by_its_weights(
    sdxl: WarmPipeline, tmp_path: Path, number: int
) -> None:
    """As xinsir/controlnet-union-sdxl-1.0 is published."""
    warm = warm_up(replace(sdxl.base, controls=()))
    tiny_control(warm, tmp_path / "net", seed=3, num_control_type=number)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    del config["num_control_type"]
    config["_class_name"] = "ControlNetModel"
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    (warm.base,) = attached([warm.base], controls=[f"tiny:union={tmp_path / 'net'}"])
    assert warm.base.controls[0].kind == "ControlNetUnionModel"
    (ours,) = drawn(warm, union("depth"))
    assert number == 8 or np.array_equal(ours, drawn(sdxl, union("depth"))[0])
    assert np.array_equal(ours, reference(warm, "", [1], union("depth")))
    assert drawn(warm, union(str(number - 1)))


def test_a_plain_one_that_is_said_to_be_a_union_is_damaged(sdxl: WarmPipeline, tmp_path: Path) -> None:
    shutil.copytree(sdxl.base.controls[2].path, tmp_path / "net")
    config = (tmp_path / "net" / "config.json").read_text()
    (tmp_path / "net" / "config.json").write_text(config.replace("ControlNetModel", "ControlNetUnionModel"))
    with pytest.raises(IncompatibleBase, match=r"net is damaged: of 'control_add_embedding\S* there is none"):
        find(f"tiny:union={tmp_path / 'net'}", [sdxl.base])


def test_a_union_is_of_its_family(sdxl: WarmPipeline, tmp_path: Path) -> None:
    small = bases.find(f"small={tiny('sd1', tmp_path / 'sd1')}")
    with pytest.raises(
        IncompatibleBase, match=r"holds a ControlNetUnionModel; small \(sd1\) takes a Control"
    ):
        find(f"small:union={sdxl.base.controls[0].path}", [small])
    flux = bases.find(f"flux={tiny('flux', tmp_path / 'flux')}")
    with pytest.raises(IncompatibleBase, match=r"holds a ControlNetUnionModel; flux \(flux\) takes a FluxC"):
        find(f"flux:union={sdxl.base.controls[0].path}", [flux])
