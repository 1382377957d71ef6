"""Union ControlNets, and those for inpainting, over gRPC: what a base tells, replay, refusals."""

import io
import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from atelier.client import AtelierError, Client, axis, control, render_request
from atelier.v1 import render_pb2
from compose import bases
from compose.guiding import attached
from compose.residence import Residence
from compose.warm import warm_up
from server.engine import InProcessEngine
from tests.companions import tiny_control
from tests.conftest import serving
from tests.pipelines import tiny
from tests.server.test_guides import EDGES, INVALID, PRECONDITION, field_of, picture, same, told

SMALL: dict[str, Any] = {"seed": 3, "steps": 3, "width": 32, "height": 32, "base": "large"}


@pytest.fixture(scope="module")
def atelier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with a tiny SDXL, `large`, that has a union, and a tiny SD 1.5, `small`, that has a hole."""
    folder = tmp_path_factory.mktemp("modes")
    large = bases.find(f"large={tiny('sdxl', folder / 'large')}")
    small = bases.find(f"small={tiny('sd1', folder / 'small')}")
    tiny_control(warm_up(large), folder / "union", num_control_type=8)
    tiny_control(warm_up(large), folder / "edges")
    tiny_control(warm_up(small), folder / "hole")
    places = [f"large:union={folder / 'union'}", f"large:own={folder / 'union'},ink,wash"]
    places += [f"large:edges={folder / 'edges'}", f"small:hole={folder / 'hole'},inpaint"]
    large, small = attached([large, small], controls=places)
    engine = InProcessEngine(Residence(warm_up(large), [small]))
    with (
        serving(folder / "data", warm_up(large), engine=engine) as running,
        Client(running.address, timeout=240) as client,
    ):
        yield client


def drawn(client: Client, **more: Any) -> bytes:
    (found,) = client.render("a red star", **{**SMALL, **more}).pictures()
    return found.png


def union(mode: str, image: bytes = EDGES, **how: Any) -> render_pb2.Control:
    return control("union", image, mode=mode, **how)


def test_a_base_tells_the_modes(atelier: Client) -> None:
    large, small = atelier.bases()
    assert list(large.controls) == ["union", "own", "edges"]
    names = {name: list(modes.names) for name, modes in large.control_modes.items()}
    assert names["union"] == ["openpose", "depth", "hed", "canny", "normal", "segment", "tile", "repaint"]
    assert names["own"] == ["ink", "wash", "2", "3", "4", "5", "6", "7"]
    assert names.keys() == {"union", "own"}
    assert not small.control_modes


def test_a_mode_is_in_the_manifest_and_replays(atelier: Client) -> None:
    before, other = drawn(atelier), picture(2)
    made = drawn(atelier, controls=[union("canny", weight=0.5, end=0.7), union("0", other)])
    assert [c["mode"] for c in told(made)["controls"]] == [3, 0]
    (again,) = atelier.replay(made, controls=[other, EDGES]).pictures()
    assert same(again.png, made)
    assert told(again.png) == told(made)
    by_number = drawn(atelier, controls=[union("3", weight=0.5, end=0.7), union("openpose", other)])
    assert same(by_number, made)
    assert not same(made, drawn(atelier, controls=[union("depth", weight=0.5, end=0.7), union("0", other)]))
    assert same(drawn(atelier), before)


def test_a_job_and_a_sweep_keep_it(atelier: Client) -> None:
    asked = [union("tile")]
    job = atelier.create_job("a red star", **SMALL, controls=asked)
    for _ in atelier.watch_job(job.name):
        pass
    assert same(atelier.job_image(job.name), drawn(atelier, controls=asked))
    swept = atelier.sweep("a red star", axes=[axis("seed", 3, 4)], **SMALL | {"seed": None}, controls=asked)
    assert [cell["manifest"]["controls"][0]["mode"] for cell in swept.document()["cells"]] == [6, 6]


@pytest.mark.parametrize(
    ("asked", "message", "field"),
    [
        (union(""), r"controls\[0\].mode is missing: say what union reads; take one of openpose", "mode"),
        (union("8"), r"controls\[0\].mode '8' is none of union's; .*, or its number, 0 to 7", "mode"),
        (control("own", EDGES, mode="canny"), "'canny' is none of own's; take one of ink, wash, 2", "mode"),
        (control("edges", EDGES, mode="canny"), "'canny' says nothing to edges, which reads", "mode"),
    ],
)
def test_modes_that_are_none_are_refused(
    atelier: Client, asked: render_pb2.Control, message: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError, match=message) as refused:
        list(atelier._render.Render(render_request("a", base="large", controls=[asked])))
    assert refused.value.code() is INVALID
    assert field_of(refused.value) == f"controls[0].{field}"


def test_a_union_beside_another_kind_is_refused(atelier: Client) -> None:
    with pytest.raises(AtelierError, match="union and edges cannot act in one render") as refused:
        drawn(atelier, controls=[union("canny"), control("edges", EDGES)])
    assert refused.value.code is INVALID


def test_a_manifest_that_lies_about_its_mode_is_refused(atelier: Client) -> None:
    made = told(drawn(atelier, controls=[union("canny")]))
    for change, code, message in (
        ({"mode": 99}, PRECONDITION, "cannot be made again: .*mode '99' is none of union's"),
        ({"mode": -1}, PRECONDITION, "mode '-1' is none"),
        ({"name": "edges"}, PRECONDITION, "mode '3' says nothing to edges"),
        ({"masked": True}, PRECONDITION, "union does not read where its picture is transparent"),
        ({"mode": "canny"}, INVALID, "'mode' is missing or of the wrong kind"),
        ({"mode": True}, INVALID, "'mode' is missing or of the wrong kind"),
        ({"masked": 1}, INVALID, "'masked' is neither true nor false"),
    ):
        text = json.dumps({**made, "controls": [made["controls"][0] | change]})
        request = render_pb2.ReplayRequest(manifest_json=text, control_images=[EDGES])
        with pytest.raises(grpc.RpcError, match=message) as refused:
            list(atelier._render.Replay(request))
        assert refused.value.code() is code
    whole = json.dumps({**made, "controls": [made["controls"][0] | {"weight": 1}]})
    *_, last = atelier._render.Replay(render_pb2.ReplayRequest(manifest_json=whole, control_images=[EDGES]))
    assert not last.summary.differences


def clear(seed: int) -> bytes:
    """A picture with a hole in it."""
    out, image = io.BytesIO(), Image.open(io.BytesIO(picture(seed))).convert("RGBA")
    alpha = np.full((48, 80), 255, np.uint8)
    alpha[10:40, 20:60] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(out, "png")
    return out.getvalue()


def test_a_hole_is_in_the_manifest_and_replays(atelier: Client) -> None:
    asked: dict[str, Any] = {"base": "small", "controls": [control("hole", clear(1))]}
    made = drawn(atelier, **asked)
    assert told(made)["controls"][0]["masked"] is True
    (again,) = atelier.replay(made, controls=[clear(1)]).pictures()
    assert same(again.png, made)
    assert told(again.png) == told(made)
    lying = told(made)
    del lying["controls"][0]["masked"]
    request = render_pb2.ReplayRequest(manifest_json=json.dumps(lying), control_images=[clear(1)])
    with pytest.raises(grpc.RpcError, match="hole reads where its picture is transparent") as refused:
        list(atelier._render.Replay(request))
    assert refused.value.code() is PRECONDITION
    with pytest.raises(grpc.RpcError, match=r"controls\[0\].image is transparent nowhere") as refused:
        list(atelier._render.Render(render_request("a", base="small", controls=[control("hole", EDGES)])))
    assert refused.value.code() is INVALID
    assert field_of(refused.value) == "controls[0].image"
