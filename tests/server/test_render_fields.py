"""What a render can be asked for: each field does what it says, is in the manifest, and replays."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from atelier.client import AtelierError, Client, Rendering, axis, method
from atelier.v1 import render_pb2
from compose import bases
from compose.manifest import from_png, parse
from compose.residence import Residence
from compose.warm import WarmPipeline
from server.engine import InProcessEngine
from tests.adapters import random_factors, write_kohya
from tests.conftest import serving
from tests.pipelines import tiny

SMALL: dict[str, Any] = {"seed": 3, "steps": 4}
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def atelier(tmp_path_factory: pytest.TempPathFactory, warm: WarmPipeline) -> Iterator[Client]:
    """A server with two LoRAs and a second base, which is loaded when it is asked for."""
    folder = tmp_path_factory.mktemp("fields")
    second = bases.find(f"second={tiny('sdxl', folder / 'second')}")
    engine = InProcessEngine(Residence(warm, [second]))
    with (
        serving(folder / "data", warm, engine=engine) as running,
        Client(running.address, timeout=240) as client,
    ):
        for name, seed in (("one", 1), ("two", 2)):
            write_kohya(folder / name, random_factors("pocket", seed=seed, rank=4))
            client.check_in(folder / name, name=name, base="pocket", triggers=[name])
        yield client


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def same(one: bytes, other: bytes) -> bool:
    return np.array_equal(pixels(one), pixels(other))


def drawn(client: Client, prompt: str = "a red star", **more: Any) -> bytes:
    (picture,) = client.render(prompt, **{**SMALL, **more}).pictures()
    return picture.png


def told(png: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(from_png(png))
    return found


def replayed(client: Client, text: str) -> Rendering:
    call = client._render.Replay(render_pb2.ReplayRequest(manifest_json=text))
    return Rendering(call, client.address)


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A picture to start from."""
    out = io.BytesIO()
    Image.effect_noise((80, 48), 90).convert("RGB").save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def mask() -> bytes:
    """Its right half is to be painted."""
    out, image = io.BytesIO(), Image.new("L", (80, 48))
    image.paste(255, (40, 0, 80, 48))
    image.save(out, "png")
    return out.getvalue()


def png_of(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def holed(data: bytes) -> bytes:
    """The same picture, its right half transparent."""
    found = Image.open(io.BytesIO(data)).convert("RGBA")
    alpha = Image.new("L", (80, 48), 255)
    alpha.paste(0, (40, 0, 80, 48))
    found.putalpha(alpha)
    return png_of(found)


def test_a_scheduler_by_name(atelier: Client) -> None:
    euler = drawn(atelier, scheduler="EulerDiscreteScheduler")
    assert not same(euler, drawn(atelier))
    assert told(euler)["scheduler"] == "EulerDiscreteScheduler"
    (again,) = atelier.replay(euler).pictures()
    assert same(again.png, euler)
    assert told(drawn(atelier, scheduler="DDIMScheduler"))["scheduler"] == "DDIMScheduler"
    (base, _) = atelier.bases()
    assert base.schedulers[0] == "DDIMScheduler"
    assert "EulerDiscreteScheduler" in base.schedulers


def test_a_picture_to_start_from(atelier: Client, photo: bytes) -> None:
    made = drawn(atelier, image=photo, strength=0.5)
    assert pixels(made).shape == (48, 80, 3)  # the picture's own size
    assert told(made)["source"]["strength"] == 0.5
    near, far = (
        np.abs(pixels(drawn(atelier, image=photo, strength=s)).astype(int) - pixels(photo)).mean()
        for s in (0.26, 1.0)
    )
    assert near < far
    (again,) = atelier.replay(made, image=photo).pictures()
    assert same(again.png, made)
    assert pixels(drawn(atelier, image=photo, width=64, height=64)).shape == (64, 64, 3)
    for wrong in ({}, {"image": made}):
        with pytest.raises(AtelierError, match="was made from the image sha256:") as refused:
            list(atelier.replay(made, **wrong))
        assert refused.value.code is INVALID


def test_a_mask_keeps_what_is_black(atelier: Client, photo: bytes, mask: bytes) -> None:
    made = drawn(atelier, image=photo, mask=mask)
    assert np.array_equal(pixels(made)[:, :39], pixels(photo)[:, :39])
    assert not np.array_equal(pixels(made)[:, 41:], pixels(photo)[:, 41:])
    (again,) = atelier.replay(made, image=photo, mask=mask).pictures()
    assert same(again.png, made)
    with pytest.raises(AtelierError, match="was made from the mask"):
        list(atelier.replay(made, image=photo))


def test_what_is_transparent_lies_on_white_and_in_a_mask_on_black(
    atelier: Client, photo: bytes, mask: bytes
) -> None:
    clear = holed(photo)
    made, dropped = (drawn(atelier, image=picture, strength=0.5) for picture in (clear, photo))
    white = pixels(photo).copy()
    white[:, 40:] = 255
    assert same(made, drawn(atelier, image=png_of(Image.fromarray(white)), strength=0.5))
    assert not same(made, dropped)
    assert told(made)["flattened"] is True
    (again,) = atelier.replay(made, image=clear).pictures()
    assert same(again.png, made)
    before = told(made)
    del before["flattened"]  # as a picture was made before
    text = json.dumps(before)
    call = atelier._render.Replay(render_pb2.ReplayRequest(manifest_json=text, image=clear))
    (earlier,) = Rendering(call, atelier.address).pictures()
    assert same(earlier.png, dropped)
    assert told(earlier.png) == before
    painted = drawn(atelier, image=photo, mask=holed(png_of(Image.new("L", (80, 48), 255))))
    turned = drawn(atelier, image=photo, mask=png_of(Image.open(io.BytesIO(mask)).rotate(180)))
    assert same(painted, turned)  # its left half alone is white


def test_an_adapter_from_a_step_on(atelier: Client) -> None:
    both = {"one": 1.0, "two": 1.0}
    late = drawn(atelier, stack=both, schedules={"two": [(0.5, 1.0)]})
    assert not same(late, drawn(atelier, stack=both))
    assert told(late)["stack"][1]["phases"] == [[0.5, 1.0, 1.0]]
    (again,) = atelier.replay(late).pictures()
    assert same(again.png, late)
    ramp = drawn(atelier, stack=both, schedules={"one": [(0.0, 0.5, 1.0, 0.0)], "two": [(0.5, 1.0, 0.5)]})
    (again,) = atelier.replay(ramp).pictures()
    assert same(again.png, ramp)
    assert not same(ramp, late)
    whole = drawn(atelier, stack=both, schedules={"one": [(0.0, 1.0)]})
    assert same(whole, drawn(atelier, stack=both))


@pytest.mark.parametrize("how", [method("switch", every=2), method("composite")])
def test_modes_that_no_file_can_hold(atelier: Client, how: Any) -> None:
    made = drawn(atelier, stack={"one": 1.0, "two": 1.0}, method=how)
    assert told(made)["method"]["name"] == how.name
    assert not same(made, drawn(atelier, stack={"one": 1.0, "two": 1.0}))
    (again,) = atelier.replay(made).pictures()
    assert same(again.png, made)
    with pytest.raises(AtelierError, match="is a way to render a stack, not to merge it") as refused:
        atelier.merge({"one": 1.0, "two": 1.0}, name="no", method=how)
    assert refused.value.code is INVALID
    assert {m.name for m in atelier.methods() if m.renders} == {"switch", "composite"}


def test_a_batch_is_recorded_and_replayed_as_one(atelier: Client) -> None:
    made = [p.png for p in atelier.render("a red star", **SMALL, count=3, batch=2).pictures()]
    assert [told(png).get("batch") for png in made] == [
        {"size": 2, "index": 0},
        {"size": 2, "index": 1},
        None,
    ]
    assert [told(png)["seed"] for png in made] == [3, 4, 5]
    for png in made:
        (again,) = atelier.replay(png).pictures()
        assert (again.index, same(again.png, png)) == (0, True)
        assert told(again.png) == told(png)


def test_another_base_is_loaded_when_it_is_asked_for(atelier: Client) -> None:
    made = drawn(atelier, base="second", width=32, height=32)
    assert told(made)["base"]["name"] == "second"
    (again,) = atelier.replay(made).pictures()
    assert same(again.png, made)
    assert [base.name for base in atelier.bases()] == ["pocket", "second"]
    with pytest.raises(AtelierError, match="one:1 is for pocket, and second is a base of sdxl") as refused:
        drawn(atelier, base="second", width=32, height=32, stack={"one": 1.0})
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_a_prompt_beyond_the_window_is_read_in_more_of_them(atelier: Client) -> None:
    assert not same(drawn(atelier, "red " * 40 + "star"), drawn(atelier, "red " * 40 + "moon"))


def test_a_manifest_of_the_first_kind_is_read_as_it_was(atelier: Client) -> None:
    """One window of the prompt, and brackets that are brackets."""
    now = drawn(atelier, "a (red) star, " * 8)
    rendering = replayed(atelier, json.dumps(told(now) | {"manifest": 1}))
    (then,) = rendering.pictures()
    assert not same(then.png, now)
    assert told(then.png)["manifest"] == 1
    (once_more,) = atelier.replay(then.png).pictures()
    assert same(once_more.png, then.png)
    assert "did not read its last" in rendering.summary.warnings[0]


def test_the_brackets_of_a_trigger_emphasise_nothing(atelier: Client, tmp_path: Path) -> None:
    write_kohya(tmp_path / "x", random_factors("pocket", seed=9, rank=1))
    atelier.check_in(tmp_path / "x", name="booru", base="pocket", triggers=["star (series)"])
    made = drawn(atelier, "a {booru}", stack={"booru": 0.0})
    assert told(made)["prompt"] == r"a star \(series\)"
    assert same(made, drawn(atelier, r"a star \(series\)"))


def picture_of(width: int, height: int, kind: str = "png", mode: str = "1") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, kind)
    return out.getvalue()


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scheduler": "NoScheduler"}, "'NoScheduler' cannot be used with pocket; there are DDIMScheduler"),
        ({"scheduler": "__import__"}, "cannot be used with pocket"),
        ({"base": "nowhere"}, "no base 'nowhere'; it has pocket, second"),
        ({"batch": 17}, "batch 17 is not within 1 and 16"),
        ({"batch": 0}, "batch 0 is not within"),
        ({"strength": 0.5}, "strength without an image"),
        ({"mask": b"x"}, "mask without an image"),
        ({"image": b"nothing"}, "image is no PNG, JPEG or WebP"),
        ({"image": "photo", "strength": 0.0}, "strength 0.0 is not above 0"),
        ({"image": "photo", "strength": float("nan")}, "strength nan is not above 0"),
        ({"image": "photo", "strength": 0.1}, "strength 0.1 of 4 steps is less than one step"),
        ({"image": "photo", "mask": b"x"}, "mask is no PNG"),
        ({"image": "photo", "mask": picture_of(9, 9)}, "black all over"),
        ({"image": picture_of(30_001, 2)}, "30001x2 pixels"),
        ({"image": picture_of(9_000, 9_000)}, "9000x9000 pixels"),
        ({"image": cut_short(picture_of(900, 900, "jpeg", "RGB"))}, "image is damaged"),
        ({"image": "photo", "width": 63}, "width 63 must be a multiple of 16"),
        ({"stack": {"one": 1.0}, "method": method("switch", every=0)}, "every 0 is not within 1 and 150"),
        ({"stack": {"one": 1.0}, "method": method("switch", rank=4)}, "takes no rank"),
        ({"stack": {"one": 1.0}, "method": method("composite", every=2)}, "takes no every"),
        ({"stack": {"one": 1.0}, "schedules": {"one": [(0.5, 0.2)]}}, "from 0.5 to 0.2 is none"),
        ({"stack": {"one": 1.0}, "schedules": {"one": [(-1.0, 0.2)]}}, "from -1 to 0.2 is none"),
        (
            {"stack": {"one": 1.0}, "schedules": {"one": [(0.0, 0.6), (0.5, 1.0)]}},
            "starts at 0.5, before the one before it ends",
        ),
        (
            {"stack": {"one": 1.0}, "schedules": {"one": [(0.0, 1.0)]}, "method": method("svd")},
            "schedules go with the method naive",
        ),
        ({"prompt": "a (star:99)"}, "emphasises something 99 times"),
        (
            {"negative_prompt": "{nobody}"},
            "the negative prompt names {nobody}, but the stack has no adapters",
        ),
        ({"negative_prompt": "a {"}, "a lone '{' in the negative prompt"),
        ({"negative_prompt": "(a ring:99)"}, "the negative prompt emphasises something 99 times"),
        ({"prompt": "a BREAK " * 110}, "windows of the text encoder, the limit is 102"),
        ({"width": 2048, "height": 2048, "batch": 16, "count": 16}, "pixels at once, the limit is"),
        ({"scheduler": "PNDMScheduler", "steps": 1}, "cannot render 1 steps of PNDMScheduler"),
        ({"prompt": "x" * 1_000_000}, "1000000 characters"),
    ],
)
def test_what_cannot_be_rendered_is_told(
    atelier: Client, photo: bytes, more: dict[str, Any], message: str
) -> None:
    more = {key: photo if value == "photo" else value for key, value in more.items()}
    with pytest.raises(AtelierError) as refused:
        drawn(atelier, **more)
    assert message in str(refused.value)
    assert refused.value.code is INVALID
    assert drawn(atelier, steps=1)  # and the server renders on


def test_schedules_are_one_for_each_adapter(atelier: Client) -> None:
    request = render_pb2.RenderRequest(prompt="a", schedules=[render_pb2.Schedule()])
    with pytest.raises(grpc.RpcError) as refused:
        list(atelier._render.Render(request))
    assert refused.value.code() is INVALID
    with pytest.raises(ValueError, match="a schedule for 'two', which is not in the stack"):
        drawn(atelier, stack={"one": 1.0}, schedules={"two": [(0.0, 1.0)]})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m | {"batch": {"size": 2, "index": 2}},
        lambda m: m | {"batch": {"size": 99, "index": 0}},
        lambda m: m | {"batch": {"size": 16, "index": 15}, "seed": 3},
        lambda m: m | {"batch": 2},
        lambda m: m | {"source": {"image": 3, "strength": 1}},
        lambda m: m | {"source": {"image": "sha256:x"}},
        lambda m: m | {"source": {"image": "sha256:x", "strength": 0.5, "mask": 1}},
        lambda m: m | {"flattened": "yes"},
        lambda m: m | {"scheduler": "Nothing"},
        lambda m: (
            m | {"method": {"name": "composite"}, "stack": [m["stack"][0] | {"phases": [[0.0, 0.5, 1.0]]}]}
        ),
        lambda m: m | {"manifest": 3},
        lambda m: m | {"stack": [m["stack"][0] | {"phases": [[0.5]]}]},
        lambda m: m | {"stack": [m["stack"][0] | {"phases": [["a", 1, 2]]}]},
        lambda m: m | {"stack": [m["stack"][0] | {"phases": [[0.9, 0.1, 1.0]]}]},
    ],
)
def test_a_damaged_manifest_is_refused(atelier: Client, spoil: Callable[[Any], Any]) -> None:
    good = told(drawn(atelier, stack={"one": 1.0}, steps=1))
    with pytest.raises(AtelierError) as refused:
        list(replayed(atelier, json.dumps(spoil(good))))
    assert refused.value.code is INVALID


def test_an_adapter_deleted_while_it_waits_is_rendered_as_it_was_pinned(
    tmp_path: Path, warm: WarmPipeline
) -> None:
    """Its stack was composed when it was admitted; the next one is told."""
    with serving(tmp_path / "data", warm) as running, Client(running.address, timeout=60) as client:
        write_kohya(tmp_path / "gone", random_factors("pocket", seed=7, rank=2))
        client.check_in(tmp_path / "gone", name="gone", base="pocket")
        waiting = client.render("a star", stack={"gone": 1.0}, seed=1, steps=2, count=4)
        events = iter(waiting)
        next(events)
        client.delete("gone")
        assert sum(event.HasField("summary") for event in events) == 1
        with pytest.raises(AtelierError, match="gone") as refused:
            drawn(client, stack={"gone": 1.0})
        assert refused.value.code is grpc.StatusCode.NOT_FOUND


def test_a_long_prompt_of_another_script_replays(atelier: Client) -> None:
    made = drawn(atelier, "星" * 600, steps=1)
    (again,) = atelier.replay(made).pictures()
    assert same(again.png, made)
    longest = told(made) | {"prompt": "星" * 4096}
    assert parse(json.dumps(longest)) == longest


def test_parts_are_checked_whatever_is_kept(atelier: Client) -> None:
    good, typo = {"one": 1.0, "two": 1.0}, {"one": (1.0, {"typo": 0.5}), "two": 1.0}
    drawn(atelier, stack=good, method=method("svd"), steps=1)
    with pytest.raises(AtelierError, match="one:1 changes no layer in 'typo'"):
        drawn(atelier, stack=typo, method=method("svd"), steps=1)


def test_options_of_a_scheduler(atelier: Client) -> None:
    sde = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_order": 3}
    asked = {"scheduler": "DPMSolverMultistepScheduler", "count": 1}
    made = drawn(atelier, scheduler_options=sde, **asked)
    assert told(made)["scheduler_options"] == sde
    assert isinstance(told(made)["scheduler_options"]["solver_order"], int)
    assert not same(made, drawn(atelier, **asked))
    (again,) = atelier.replay(made).pictures()
    assert same(again.png, made)
    assert told(again.png) == told(made)
    assert "scheduler_options" not in told(drawn(atelier, **asked))
    for wrong, message in (
        ({"karras": True}, "has no option 'karras'"),
        ({"prediction_type": "sample"}, "not for a render to choose"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "does not work with these options"),
    ):
        with pytest.raises(AtelierError, match=message) as refused:
            drawn(atelier, scheduler_options=wrong, **asked)
        assert refused.value.code is INVALID
    nothing = render_pb2.RenderRequest(prompt="a", scheduler=asked["scheduler"])
    nothing.scheduler_options.fields["flow_shift"].number_value = float("inf")
    with pytest.raises(grpc.RpcError, match="scheduler_options cannot be read") as unread:
        list(atelier._render.Render(nothing))
    assert unread.value.code() is INVALID
    spoilt = told(made) | {"scheduler_options": [1]}
    with pytest.raises(AtelierError, match="scheduler options are damaged"):
        list(replayed(atelier, json.dumps(spoilt)))
    spoilt = told(made) | {"scheduler_options": {"beta_end": 0.5}}
    with pytest.raises(AtelierError, match="not for a render to choose"):
        list(replayed(atelier, json.dumps(spoilt)))


def test_options_of_a_scheduler_tell_renders_apart(atelier: Client) -> None:
    """Neither the queue nor a request's id takes one for the other."""
    asked = {"scheduler": "DPMSolverMultistepScheduler", "steps": 40}
    first = atelier.render("a", seed=1, scheduler_options={"solver_order": 3}, **asked)
    second = atelier.render("a", seed=1, scheduler_options={"solver_order": 1}, **asked)
    (one,), (two,) = first.pictures(), second.pictures()
    assert not same(one.png, two.png)
    drawn(atelier, request_id="options", scheduler_options={"solver_order": 3}, **asked)
    with pytest.raises(AtelierError, match="was used for another request"):
        drawn(atelier, request_id="options", scheduler_options={"solver_order": 1}, **asked)


def test_a_sweep_and_a_job_take_options(atelier: Client) -> None:
    swept = atelier.sweep(
        "a red star",
        axes=[axis("scheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler")],
        scheduler_options={"use_karras_sigmas": True},
        **SMALL,
    )
    cells = swept.document()["cells"]
    assert [cell["manifest"]["scheduler_options"] for cell in cells] == [{"use_karras_sigmas": True}] * 2
    with pytest.raises(AtelierError, match=r"axes\[0\].scheduler.values\[1\]: DDIMScheduler has no option"):
        atelier.sweep(
            "a red star",
            axes=[axis("scheduler", "DPMSolverMultistepScheduler", "DDIMScheduler")],
            scheduler_options={"use_karras_sigmas": True},
            **SMALL,
        )
    asked = {"scheduler": "DPMSolverMultistepScheduler", "scheduler_options": {"solver_order": 3}}
    job = atelier.create_job("a red star", **SMALL, **asked)
    for _ in atelier.watch_job(job.name):
        pass
    assert same(atelier.job_image(job.name), drawn(atelier, **asked))


def test_an_adapter_is_called_in_the_negative_prompt_as_in_the_prompt(atelier: Client) -> None:
    called = drawn(atelier, stack={"one": 1.0}, negative_prompt="a {one}, {{ring}}")
    assert told(called)["negative_prompt"] == "a one, {ring}"
    assert same(called, drawn(atelier, stack={"one": 1.0}, negative_prompt="a one, {{ring}}"))
    assert not same(called, drawn(atelier, stack={"one": 1.0}))
    (again,) = atelier.replay(png=called).pictures()
    assert again.png == called


@pytest.mark.parametrize(
    ("more", "notes"),
    [
        (
            {"schedules": {"one": [(0.9, 1.0)]}},
            ["one:1 acted in none of the 4 steps: no step begins in its turn"],
        ),
        ({"schedules": {"one": [(0.75, 1.0)]}}, []),
        (
            {"schedules": {"one": [(0.0, 1.0, 0.0)]}},
            ["one:1 acted in none of the 4 steps: no step begins in its turn"],
        ),
        (
            {"method": method("switch", every=4)},
            ["two:1 acted in none of the 4 steps: no step begins in its turn"],
        ),
        ({"method": method("switch", every=2)}, []),
        ({"method": method("composite")}, []),
        ({"method": method("svd")}, []),
        (
            {"prompt": "a star <lora:one:0.8> < b"},
            ["'<lora:one:0.8>' in the prompt is text here; name adapters in the stack"],
        ),
    ],
)
def test_what_looks_right_and_does_nothing_is_noted(
    atelier: Client, more: dict[str, Any], notes: list[str]
) -> None:
    asked = {"prompt": "a star", "stack": {"one": 1.0, "two": 0.5}, **SMALL, **more}
    rendering = atelier.render(**asked)
    list(rendering)
    assert list(rendering.summary.warnings) == notes
