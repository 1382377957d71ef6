"""Controls and references over gRPC: what they do, what a manifest says, replay, jobs, sweeps, refusals."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from atelier.client import AtelierError, Client, Rendering, axis, control, reference, render_request
from atelier.v1 import render_pb2
from compose import bases
from compose.guiding import attached
from compose.manifest import from_png
from compose.residence import Residence
from compose.warm import WarmPipeline, warm_up
from server.engine import InProcessEngine
from tests.adapters import random_factors, write_kohya
from tests.companions import tiny_adapter, tiny_control, tiny_encoder
from tests.conftest import begun, serving
from tests.pipelines import tiny

SMALL: dict[str, Any] = {"seed": 3, "steps": 4}
INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm: WarmPipeline) -> Path:
    """ControlNets for pocket: `edges` and `depth`, and an IP-Adapter in `style` with its image encoder."""
    found = tmp_path_factory.mktemp("guides")
    for seed, name in enumerate(("edges", "depth")):
        tiny_control(warm, found / name, seed=seed)
    tiny_adapter(warm, found / "style" / "it.safetensors")
    tiny_encoder(found / "style" / "image_encoder")
    return found


@pytest.fixture(scope="module")
def atelier(folder: Path) -> Iterator[Client]:
    """A server whose pocket is steered by two ControlNets and an IP-Adapter, beside a base that has none."""
    second = bases.find(f"second={tiny('sd1', folder / 'second')}")
    told = [f"pocket:{name}={folder / name}" for name in ("edges", "depth")]
    (pocket,) = attached(
        [bases.find("pocket")], controls=told, references=[f"pocket:style={folder / 'style'}"]
    )
    engine = InProcessEngine(Residence(warm_up(pocket), [second]))
    with (
        serving(folder / "data", warm_up(pocket), engine=engine) as running,
        Client(running.address, timeout=240) as client,
    ):
        write_kohya(folder / "one", random_factors("pocket", seed=1, rank=4))
        client.check_in(folder / "one", name="one", base="pocket", triggers=["glim"])
        yield client


def picture(seed: int, size: tuple[int, int] = (80, 48)) -> bytes:
    out, random = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 255, (*size[::-1], 3), np.uint8)).save(out, "png")
    return out.getvalue()


EDGES, DEPTH = picture(1), picture(2)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def same(one: bytes, other: bytes) -> bool:
    return np.array_equal(pixels(one), pixels(other))


def drawn(client: Client, prompt: str = "a red star", **more: Any) -> bytes:
    (found,) = client.render(prompt, **{**SMALL, **more}).pictures()
    return found.png


def told(png: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(from_png(png))
    return found


def test_a_base_says_what_steers_it(atelier: Client) -> None:
    pocket, second = atelier.bases()
    assert list(pocket.controls) == ["edges", "depth"]
    assert list(pocket.references) == ["style"]
    assert list(second.controls) == list(second.references) == []


@pytest.mark.parametrize("behind", [0, 255], ids=["control on black", "reference on white"])
def test_what_is_transparent_steers_as_its_ground_does(atelier: Client, behind: int) -> None:
    def asked(data: bytes) -> dict[str, Any]:
        return (
            {"references": [reference("style", data)]} if behind else {"controls": [control("edges", data)]}
        )

    def png(image: Image.Image) -> bytes:
        out = io.BytesIO()
        image.save(out, "png")
        return out.getvalue()

    whole, alpha = Image.open(io.BytesIO(EDGES)), Image.new("L", (80, 48), 255)
    alpha.paste(0, (20, 10, 80, 48))
    clear, flat = whole.convert("RGBA"), whole.copy()
    clear.putalpha(alpha)
    flat.paste((behind,) * 3, (20, 10, 80, 48))
    made = drawn(atelier, **asked(png(clear)))
    assert same(made, drawn(atelier, **asked(png(flat))))
    assert not same(made, drawn(atelier, **asked(EDGES)))
    sent = {"references" if behind else "controls": [png(clear)]}
    (again,) = atelier.replay(made, **sent).pictures()
    assert same(again.png, made)
    before = told(made)
    assert before.pop("flattened") is True
    request = render_pb2.ReplayRequest(
        manifest_json=json.dumps(before),
        **{"reference_images" if behind else "control_images": [png(clear)]},
    )
    (earlier,) = Rendering(atelier._render.Replay(request), atelier.address).pictures()
    assert same(earlier.png, drawn(atelier, **asked(EDGES)))


def test_a_control_with_a_stack_is_in_the_manifest_and_replays(atelier: Client) -> None:
    asked: dict[str, Any] = {
        "stack": {"one": 0.7},
        "controls": [control("edges", EDGES, weight=0.5, end=0.5), control("depth", DEPTH)],
    }
    made = drawn(atelier, "a {one} star", **asked)
    first, second = told(made)["controls"]
    assert told(made)["prompt"] == "a glim star"
    assert (first["name"], first["weight"], first["start"], first["end"]) == ("edges", 0.5, 0.0, 0.5)
    assert (second["weight"], second["start"], second["end"]) == (1.0, 0.0, 1.0)
    assert not same(made, drawn(atelier, "a {one} star", stack={"one": 0.7}))
    for sent in ([EDGES, DEPTH], [DEPTH, EDGES]):
        (again,) = atelier.replay(made, controls=sent).pictures()
        assert same(again.png, made)
        assert told(again.png) == told(made)
    for wrong in ([], [EDGES], [EDGES, picture(9)]):
        with pytest.raises(AtelierError, match=r"was made with the control sha256:.* for .*; send") as no:
            list(atelier.replay(made, controls=wrong))
        assert no.value.code is INVALID


def test_bare_renders_are_the_same_before_and_after(atelier: Client) -> None:
    before = drawn(atelier)
    drawn(atelier, controls=[control("edges", EDGES)])
    assert same(drawn(atelier), before)
    assert "controls" not in told(before)


def test_from_a_picture_and_within_a_mask(atelier: Client) -> None:
    out, white = io.BytesIO(), Image.new("L", (80, 48))
    white.paste(255, (40, 0, 80, 48))
    white.save(out, "png")
    for more in ({"image": picture(5), "strength": 1.0}, {"image": picture(5), "mask": out.getvalue()}):
        made = drawn(atelier, controls=[control("edges", EDGES)], **more)
        assert not same(made, drawn(atelier, **more))
        sent = {name: more[name] for name in ("image", "mask") if name in more}
        (again,) = atelier.replay(made, controls=[EDGES], **sent).pictures()
        assert same(again.png, made)


def test_controls_tell_renders_apart_and_a_batch_replays(atelier: Client) -> None:
    asked = {"steps": 30, "seed": 1}
    one = atelier.render("a", controls=[control("edges", EDGES)], **asked)
    two = atelier.render("a", controls=[control("edges", EDGES, weight=0.9)], **asked)
    (first,), (second,) = one.pictures(), two.pictures()
    assert not same(first.png, second.png)
    steered = [control("edges", EDGES)]
    batch = list(atelier.render("a", controls=steered, count=3, batch=2, **SMALL).pictures())
    (again,) = atelier.replay(batch[1].png, controls=[EDGES]).pictures()
    assert same(again.png, batch[1].png)


def test_a_cancel_in_the_middle_leaves_the_next_render_whole(atelier: Client) -> None:
    before = drawn(atelier)
    rendering = atelier.render("a", steps=150, seed=1, controls=[control("edges", EDGES)])
    with begun(rendering, "step"):
        pass
    assert same(drawn(atelier), before)


def test_a_job_keeps_its_pictures(atelier: Client) -> None:
    asked = {"controls": [control("edges", EDGES), control("depth", DEPTH)]}
    job = atelier.create_job("a red star", **SMALL, **asked)
    for _ in atelier.watch_job(job.name):
        pass
    assert same(atelier.job_image(job.name), drawn(atelier, **asked))


def test_a_sweep_is_steered_in_every_cell(atelier: Client) -> None:
    steered = [control("edges", EDGES)]
    swept = atelier.sweep("a red star", axes=[axis("seed", 3, 4)], steps=4, controls=steered)
    cells = swept.document()["cells"]
    assert [cell["manifest"]["controls"][0]["name"] for cell in cells] == ["edges", "edges"]


def edges(**how: float) -> render_pb2.Control:
    return control("edges", EDGES, **how)


def field_of(error: grpc.RpcError) -> str:
    """The field that a refusal names."""
    bad = error_details_pb2.BadRequest()
    details = rpc_status.from_call(error).details
    assert any(detail.Unpack(bad) for detail in details)
    return str(bad.field_violations[0].field)


@pytest.mark.parametrize(
    ("controls", "message", "field"),
    [
        (
            [control("pose", EDGES)],
            "no ControlNet 'pose'; it has edges, depth",
            "controls[0].name",
        ),
        ([control("edges", b"")], r"controls\[0\] has no image", "controls[0].image"),
        (
            [control("edges", b"GIF89a")],
            r"controls\[0\].image is no PNG, JPEG or W",
            "controls[0].image",
        ),
        ([control("edges", EDGES[:200])], r"the controls\[0\].image is damaged", "controls[0].image"),
        (
            [edges(), edges(weight=float("nan"))],
            "nan",
            "controls[1].weight",
        ),
        ([edges(weight=2.5)], "weight 2.5 is not within 0 and 2", "controls[0].weight"),
        ([edges(start=0.5, end=0.5)], "acts from 0.5 to 0.5", "controls[0].start"),
        ([edges(start=0.5, end=0.2)], "acts from 0.5 to 0.2", "controls[0].start"),
        ([edges()] * 5, "5 controls, the limit is 4", "controls"),
    ],
)
def test_what_cannot_be_is_refused(atelier: Client, controls: list[Any], message: str, field: str) -> None:
    with pytest.raises(grpc.RpcError, match=message) as refused:
        list(atelier._render.Render(render_request("a", controls=controls)))
    assert refused.value.code() is INVALID
    assert field_of(refused.value) == field
    with pytest.raises(AtelierError, match="has no ControlNet 'edges'; it has none"):
        drawn(atelier, base="second", controls=[control("edges", EDGES)])


def test_a_manifest_that_lies_is_refused(atelier: Client) -> None:
    made = told(drawn(atelier, controls=[control("edges", EDGES)]))

    def replayed(change: dict[str, Any]) -> None:
        text = json.dumps({**made, "controls": [made["controls"][0] | change]})
        list(atelier._render.Replay(render_pb2.ReplayRequest(manifest_json=text, control_images=[EDGES])))

    for change, code, message in (
        ({"name": "pose"}, PRECONDITION, "cannot be made again: pocket has no ControlNet 'pose'"),
        ({"weight": 7}, INVALID, "cannot be made again: .*weight 7"),
        ({"start": 1}, INVALID, "acts from 1 to 1"),
        ({"weight": "x"}, INVALID, "'weight' is missing or of the wrong kind"),
        ({"image": 3}, INVALID, "'image' is missing or of the wrong kind"),
        ({"encoder": 3}, INVALID, "'encoder' is missing or of the wrong kind"),
    ):
        with pytest.raises(grpc.RpcError, match=message) as refused:
            replayed(change)
        assert refused.value.code() is code
    request = render_pb2.ReplayRequest(manifest_json=json.dumps({**made, "controls": {}}))
    with pytest.raises(grpc.RpcError, match="'controls' is missing or of the wrong kind"):
        list(atelier._render.Replay(request))
    replayed({"encoder": "sha256:none", "more": [1]})  # what a control does not have is not compared


def test_another_controlnet_of_the_name_is_told(atelier: Client) -> None:
    made = told(drawn(atelier, controls=[control("edges", EDGES)]))
    made["controls"][0]["digest"] = "sha256:other"
    request = render_pb2.ReplayRequest(manifest_json=json.dumps(made), control_images=[EDGES])
    *_, last = atelier._render.Replay(request)
    assert any("the ControlNet edges was sha256:other, here it is" in d for d in last.summary.differences)
    assert last.summary.seconds["guide"] >= 0


def test_a_reference_with_a_control_is_in_the_manifest_and_replays(atelier: Client) -> None:
    before = drawn(atelier)
    asked: dict[str, Any] = {"references": [reference("style", EDGES, weight=0.5), reference("style", DEPTH)]}
    made = drawn(atelier, stack={"one": 0.7}, controls=[edges()], **asked)
    first, second = told(made)["references"]
    assert (first["name"], first["weight"], second["weight"]) == ("style", 0.5, 1.0)
    assert first["digest"] == second["digest"] != first["encoder"]
    assert first["image"] != second["image"]
    assert not same(made, drawn(atelier, stack={"one": 0.7}, controls=[edges()]))
    (again,) = atelier.replay(made, controls=[EDGES], references=[DEPTH, EDGES]).pictures()
    assert same(again.png, made)
    assert told(again.png) == told(made)
    with pytest.raises(AtelierError, match=r"was made with the reference sha256:.* for style; send"):
        list(atelier.replay(made, controls=[EDGES], references=[EDGES]))
    assert same(drawn(atelier), before)
    job = atelier.create_job("a red star", **SMALL, **asked)
    for _ in atelier.watch_job(job.name):
        pass
    assert same(atelier.job_image(job.name), drawn(atelier, **asked))


def test_a_large_reference_is_scaled_down_and_a_cancel_leaves_nothing(atelier: Client) -> None:
    before = drawn(atelier)
    out = io.BytesIO()
    Image.effect_noise((3000, 1500), 90).save(out, "jpeg")
    large = [reference("style", out.getvalue())]
    assert not same(drawn(atelier, references=large), before)
    with begun(atelier.render("a", steps=150, seed=1, references=large), "step"):
        pass
    assert same(drawn(atelier), before)


@pytest.mark.parametrize(
    ("references", "message", "field"),
    [
        ([reference("face", EDGES)], "no IP-Adapter 'face'; it has style", "references[0].name"),
        ([reference("style", b"")], r"references\[0\] has no image", "references[0].image"),
        ([reference("style", EDGES[:200])], r"the references\[0\].image is damaged", "references[0].image"),
        ([reference("style", EDGES, weight=-1.0)], "weight -1.0 is not within", "references[0].weight"),
        ([reference("style", EDGES)] * 5, "5 references, the limit is 4", "references"),
    ],
)
def test_references_that_cannot_be_are_refused(
    atelier: Client, references: list[Any], message: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError, match=message) as refused:
        list(atelier._render.Render(render_request("a", references=references)))
    assert refused.value.code() is INVALID
    assert field_of(refused.value) == field
    with pytest.raises(AtelierError, match="has no IP-Adapter 'style'; it has none"):
        drawn(atelier, base="second", references=[reference("style", EDGES)])


def test_another_image_encoder_is_told(atelier: Client) -> None:
    made = told(drawn(atelier, references=[reference("style", EDGES)]))
    made["references"][0]["encoder"] = "sha256:other"
    request = render_pb2.ReplayRequest(manifest_json=json.dumps(made), reference_images=[EDGES])
    *_, last = atelier._render.Replay(request)
    assert any("the image encoder of style was sha256:other, here" in d for d in last.summary.differences)
    for encoder in (3, None, ["sha256:other"]):
        made["references"][0]["encoder"] = encoder
        request = render_pb2.ReplayRequest(manifest_json=json.dumps(made), reference_images=[EDGES])
        with pytest.raises(grpc.RpcError, match="'encoder' is missing or of the wrong kind") as refused:
            list(atelier._render.Replay(request))
        assert refused.value.code() is INVALID
