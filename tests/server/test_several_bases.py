"""A server with several bases looks at adapters on the one that they belong to: calibrations, tunings,
`auto`, inspections and sweeps.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from atelier.client import AtelierError, Client, axis
from atelier.messages import method
from atelier.v1 import render_pb2
from compose import bases, pocket
from compose.pocket import ADAPTERS
from compose.residence import Residence
from compose.warm import warm_up
from server.calibrations import Calibrations
from server.engine import InProcessEngine
from server.served import served
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving
from tests.pipelines import tiny

STACK = {"fungo": 1.0, "frame": 1.0}
QUICK: dict[str, int] = {"pictures": 2, "steps": 2}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose first base is an SDXL, then two of pocket's family: pocket and a relation of it."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(pocket.WEIGHTS, folder / "cousin")
    weights = folder / "cousin" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: t * 0.98 for name, t in load_file(weights).items()}, weights)
    large = warm_up(bases.find(f"large={tiny('sdxl', folder / 'large')}"))
    others = [bases.find("pocket"), bases.find(f"cousin={folder / 'cousin'}")]
    others.append(replace(others[1], name="small", fp8=True))
    engine = InProcessEngine(Residence(large, others))
    with serving(folder / "data", large, engine=engine) as running:
        with Client(running.address) as client:
            for file, name in (("fungo", "fungo"), ("ochreframe", "frame")):
                card = (ADAPTERS / f"{file}.md").read_bytes()
                client.check_in(ADAPTERS / f"{file}.safetensors", name=name, card=card)
            some = random_factors(
                "sd1", seed=1, rank=1, where=lambda n: n.endswith("mid_block.resnets.0.conv1")
            )
            write_kohya(folder / "foreign", some, family="sd1")
            client.check_in(folder / "foreign", name="foreign", base="sd1", triggers=["foreign"])
        yield running


@pytest.fixture
def atelier(several: Running) -> Iterator[Client]:
    with Client(several.address, timeout=240) as client:
        yield client


def refused(call: object, code: grpc.StatusCode, part: str) -> None:
    with pytest.raises(AtelierError, match=part) as caught:
        call()  # type: ignore[operator]
    assert caught.value.code is code, caught.value


def test_an_adapter_is_calibrated_on_the_first_base_of_its_family_or_on_the_one_that_is_named(
    atelier: Client, several: Running
) -> None:
    shipped = atelier.calibrate("fungo")
    assert (shipped.known, shipped.base) == (True, "pocket")
    theirs = atelier.calibrate("fungo", base="cousin", **QUICK)
    assert (theirs.known, theirs.base) == (False, "cousin")
    assert atelier.calibrate("fungo", base="cousin").known
    mine = atelier.calibrate("fungo", again=True, **QUICK)
    assert (mine.base, mine.digest != theirs.digest) == ("pocket", True)  # by the same seeds and prompts
    digests = {base.name: base.digest for base in atelier.bases()}
    for summary in (mine, theirs):
        assert several.catalog.derived.read(
            "moments", atelier.get("fungo").version.digest, of=digests[summary.base]
        )


def test_a_merge_by_activations_takes_the_calibrations_of_one_base_and_is_made_again_from_them(
    atelier: Client,
) -> None:
    how = method("activation", mu=0.5)
    for name in STACK:
        atelier.calibrate(name, base="cousin", **QUICK)
    found = {
        base: json.loads(
            atelier.merge(STACK, name=f"by-{base or 'family'}", method=how, base=base).version.recipe_json
        )
        for base in ("", "pocket", "cousin")
    }
    moments = {base: [p["moments"] for p in recipe["parents"]] for base, recipe in found.items()}
    assert moments[""] == moments["pocket"]
    assert not {*moments["pocket"]} & {*moments["cousin"]}
    for name in ("by-family", "by-cousin"):
        assert atelier.remake(name).same


def test_a_render_by_activations_takes_those_of_its_base_and_replays(atelier: Client) -> None:
    for name in STACK:
        atelier.calibrate(name, base="cousin", **QUICK)
    how = method("activation", mu=0.5)
    for base in ("pocket", "cousin"):
        rendering = atelier.render("a fungo", stack=STACK, method=how, base=base, steps=2, seed=1)
        (picture,) = rendering.pictures()
        again = atelier.replay(picture.png)
        assert [p.png for p in again.pictures()] == [picture.png]
        assert list(again.summary.differences) == []
        used = {e["moments"] for e in json.loads(rendering.summary.manifest_json[0])["stack"]}
        assert used == {atelier.calibrate(name, base=base).digest for name in STACK}


def test_a_tuning_and_auto_look_on_the_base_of_the_stack(atelier: Client) -> None:
    tried: list[render_pb2.Trial] = []
    summary = atelier.tune(STACK, tried=tried.append, **QUICK)
    assert (summary.base, summary.scorer) == ("pocket", "judge")
    other = atelier.tune(STACK, base="cousin", **QUICK)
    assert other.base == "cousin"
    assert tried[0].value == summary.naive.value != other.naive.value
    told = json.loads(
        atelier.merge(STACK, name="by-auto", method=method("auto"), base="cousin").version.recipe_json
    )
    digests = {base.name: base.digest for base in atelier.bases()}
    assert told["looked_at"] == {"base": "cousin", "digest": digests["cousin"]}


def test_an_inspection_is_on_the_base_of_the_stack(atelier: Client) -> None:
    list(atelier.render("a star", base="pocket", steps=1))  # it is warm once
    answer = atelier.inspect(STACK, base="pocket")
    assert all(adapter.calibrated and adapter.relative > 0 for adapter in answer.adapters)
    assert atelier.inspect(STACK) == answer
    theirs = atelier.inspect({"foreign": 1.0, "foreign:1": 0.5})
    assert not any(adapter.calibrated or adapter.relative for adapter in theirs.adapters)  # no base of theirs


def test_a_sweep_is_on_the_base_that_it_names(atelier: Client) -> None:
    swept = atelier.sweep(
        stack={"fungo": 1.0}, base="cousin", axes=[axis("weight", 0.5, 1.0, of="fungo")], steps=1
    )
    document = json.loads(swept.summary.sweep_json)
    assert document["base"]["name"] == "cousin"
    assert {cell["manifest"]["base"]["name"] for cell in document["cells"]} == {"cousin"}
    assert " background" in document["prompt"]  # pocket's scenes, not those of the server's first base


def test_a_base_in_8_bits_renders_stacks_and_replays_and_says_what_it_is(atelier: Client) -> None:
    told = {base.name: base.dtype for base in atelier.bases()}
    assert (told["small"], told["cousin"]) == ("float8_e4m3fn", "float32")

    def drawn(base: str, **stack: float) -> tuple[bytes, dict[str, str]]:
        rendering = atelier.render("a fungo", stack=stack, base=base, steps=2, seed=1)
        (picture,) = rendering.pictures()
        return picture.png, json.loads(rendering.summary.manifest_json[0])["environment"]

    bare, environment = drawn("small")
    assert environment["dtype"] == "float8_e4m3fn"
    stacked, _ = drawn("small", fungo=1.0)
    assert len({bare, stacked, drawn("cousin", fungo=1.0)[0]}) == 3
    assert drawn("small")[0] == bare
    again = atelier.replay(stacked)
    assert [picture.png for picture in again.pictures()] == [stacked]
    assert list(again.summary.differences) == []


def test_what_is_calibrated_on_one_base_is_not_on_another(atelier: Client, lora: Path) -> None:
    atelier.check_in(lora, name="fresh", triggers=["fresh"])
    assert atelier.calibrate("fresh", base="pocket", **QUICK).base == "pocket"
    atelier.calibrate("fungo", base="cousin", **QUICK)
    how, stack = method("regmean"), {"fungo": 1.0, "fresh": 1.0}
    atelier.merge(stack, name="on-pocket", method=how)
    refused(
        lambda: atelier.merge(stack, name="x", method=how, base="cousin"),
        grpc.StatusCode.FAILED_PRECONDITION,
        r"fresh:1 has none on cousin: atelier calibrate fresh:1 --base cousin",
    )


def test_what_belongs_on_no_base_here_is_refused(atelier: Client) -> None:
    unmet, invalid = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
    none = r"foreign:1 is for sd1, and this server has no base of that family, but large \(sdxl\), pocket"
    refused(lambda: atelier.calibrate("foreign"), unmet, none)
    refused(lambda: atelier.tune({"foreign": 1.0}), unmet, none)
    refused(lambda: atelier.merge({"foreign": 1.0}, name="x", method=method("auto")), unmet, none)
    refused(
        lambda: atelier.tune({"fungo": 1.0, "foreign": 1.0}), unmet, "foreign:1 is for sd1, and pocket is"
    )
    other = "fungo:1 is for pocket, and large is a base of sdxl"
    refused(lambda: atelier.calibrate("fungo", base="large"), unmet, other)
    refused(lambda: atelier.tune({"fungo": 1.0}, base="large"), unmet, other)
    refused(lambda: atelier.inspect(STACK, base="large"), unmet, other)
    absent = "this server has no base 'nowhere'; it has large, pocket, cousin"
    refused(lambda: atelier.calibrate("fungo", base="nowhere"), invalid, absent)
    refused(lambda: atelier.tune({"fungo": 1.0}, base="nowhere"), invalid, absent)
    refused(lambda: atelier.merge(STACK, name="x", method=method("regmean"), base="nowhere"), invalid, absent)
    refused(lambda: atelier.inspect(STACK, base="nowhere"), invalid, absent)
    refused(lambda: atelier.tune({"fungo": 1.0}, size=100), invalid, "width 100 must be a multiple of")
    refused(lambda: atelier.tune({"fungo": 1.0}, size=2048, pictures=17), invalid, "17 pictures of 2048x2048")
    refused(lambda: atelier.calibrate("fungo", size=4096, again=True), invalid, "width 4096 must be")


def test_calibrations_in_memory_are_bounded_by_bytes(
    several: Running, atelier: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    fungo, frame = (atelier.get(name).version for name in STACK)
    known = [info.base for info in several.engine.infos.values()]
    calibrations = Calibrations(several.catalog, served(known))
    versions = [several.catalog.resolve(f"{v.name}:{v.number}") for v in (fungo, frame)]
    first, second = (calibrations.of(version, known[1]) for version in versions)
    assert first
    assert second
    assert len(calibrations._loaded) == 2
    monkeypatch.setattr("server.calibrations.KEPT_BYTES", max(first.size, second.size))
    other = Calibrations(several.catalog, served(known))
    for version in versions:
        assert other.of(version, known[1])
    assert [digest for digest, _ in other._loaded] == [frame.digest]
    again = other.kept(versions[0], first.digest)
    assert again is not None
    assert again.digest == first.digest


def test_a_render_that_names_no_base_is_made_on_the_first_that_its_stack_fits(several: Running) -> None:
    with Client(several.address, timeout=240) as client:
        bare, stacked = (client.render("a star", stack=s, steps=1, seed=1) for s in ({}, {"fungo": 1.0}))
        for rendering in (bare, stacked):
            list(rendering)
        assert [json.loads(r.summary.manifest_json[0])["base"]["name"] for r in (bare, stacked)] == [
            "large",
            "pocket",
        ]
        with pytest.raises(
            AtelierError, match="fungo:1 is for pocket, and large is a base of sdxl"
        ) as caught:
            list(client.render("a star", stack={"fungo": 1.0}, steps=1, base="large"))
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
