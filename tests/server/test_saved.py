"""Saved stacks: pinned, versioned, usable wherever an adapter is, and what they are made of stays."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from atelier.client import AtelierError, Client
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import serving

SMALL = {"seed": 3, "steps": 2}


@pytest.fixture(scope="module")
def atelier(tmp_path_factory: pytest.TempPathFactory, warm: WarmPipeline) -> Iterator[Client]:
    """A client of a catalog with `hero` (aliased stable) and `glow`."""
    folder = tmp_path_factory.mktemp("saved")
    with serving(folder / "data", warm) as running, Client(running.address, timeout=60) as client:
        for seed, name in enumerate(("hero", "glow")):
            write_kohya(folder / name, random_factors("pocket", seed=seed, rank=4))
            client.check_in(folder / name, name=name, triggers=[f"{name} word"], alias="stable")
        yield client


def png(client: Client, prompt: str, stack: dict[str, float]) -> bytes:
    (picture,) = client.render(prompt, stack=stack, **SMALL).pictures()
    return picture.png


def test_a_saved_stack_renders_what_its_members_do_and_never_drifts(atelier: Client, tmp_path: Path) -> None:
    saved = atelier.save_stack({"hero@stable": 0.9, "glow": 0.5}, name="duo", prompt="a {hero} star")
    assert (saved.created, saved.version.kind, saved.version.family) == (True, 3, "pocket")
    again = atelier.save_stack({"hero@stable": 0.9, "glow": 0.5}, name="duo", prompt="a {hero} star")
    assert (again.created, again.version.number) == (False, 1)
    before = png(atelier, "", {"duo": 1.0})
    assert before == png(atelier, "a {hero} star", {"hero:1": 0.9, "glow:1": 0.5})
    write_kohya(tmp_path / "a", random_factors("pocket", seed=7, rank=4))
    atelier.check_in(tmp_path / "a", name="hero", alias="stable")
    assert png(atelier, "", {"duo": 1.0}) == before
    halved = png(atelier, "a star", {"duo": 0.5})
    assert halved == png(atelier, "a star", {"hero:1": 0.45, "glow:1": 0.25})
    moved = atelier.save_stack({"hero@stable": 0.9, "glow": 0.5}, name="duo", dry_run=True)
    assert [m["ref"] for m in json.loads(moved.stack_json)["members"]] == ["hero:2", "glow:1"]
    assert not moved.HasField("version")
    assert [v.number for v in atelier.history("duo")] == [1]


def test_a_stack_stands_in_stacks_and_merges_by_its_members(atelier: Client) -> None:
    atelier.save_stack({"hero:1": 1.0, "glow:1": 0.5}, name="inner")
    outer = json.loads(atelier.save_stack({"inner": 0.5, "glow": 1.0}, name="outer").stack_json)
    assert [(m["ref"], m["weight"]) for m in outer["members"]] == [
        ("hero:1", 0.5),
        ("glow:1", 0.25),
        ("glow:1", 1.0),
    ]
    merged = atelier.merge({"inner": 1.0}, name="inner-merged").version
    assert [p["ref"] for p in json.loads(merged.recipe_json)["parents"]] == ["hero:1", "glow:1"]
    rendering = atelier.render("a {inner} star", stack={"inner": 1.0}, **SMALL)
    list(rendering)
    assert json.loads(rendering.summary.manifest_json[0])["prompt"] == "a hero word, glow word star"


def test_the_weights_of_a_stack_and_its_member_multiply_within_the_limit(atelier: Client) -> None:
    told = atelier.save_stack({"hero:1": 8.0}, name="strong", guidance=0.0)
    assert json.loads(told.stack_json)["guidance"] == 0.0
    with pytest.raises(AtelierError, match="weight 64"):
        list(atelier.render("a star", stack={"strong": 8.0}, **SMALL))


def test_what_a_stack_is_made_of_is_not_deleted(atelier: Client, tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=11, rank=4))
    atelier.check_in(tmp_path / "a", name="needed")
    atelier.save_stack({"needed": 1.0}, name="needs")
    with pytest.raises(AtelierError, match="needs:1 is made of needed:1; delete that first") as caught:
        atelier.delete("needed")
    assert caught.value.code is grpc.StatusCode.ABORTED
    atelier.delete("needs")
    atelier.delete("needed")


@pytest.mark.parametrize(
    ("stack", "more", "message"),
    [
        ({"nobody": 1.0}, {}, "there is no 'nobody'"),
        ({"hero": float("nan")}, {}, "weight"),
        ({}, {}, "1 to 16 adapters"),
        ({"hero": 1.0}, {"steps": 100_000}, "steps 100000 is not within"),
        ({"hero": 1.0}, {"steps": 0}, "steps 0 is not within"),
        ({"hero": 1.0}, {"prompt": "a {villain}"}, "the stack has hero"),
        ({"hero": 1.0}, {"name": "../x"}, "is not a name"),
    ],
)
def test_stacks_that_cannot_be_kept(
    atelier: Client, stack: dict[str, float], more: dict[str, object], message: str
) -> None:
    with pytest.raises(AtelierError, match=message):
        atelier.save_stack(stack, **{"name": "never", **more})  # type: ignore[arg-type]
    assert "never" not in {v.name for v in atelier.list()}


def test_a_stack_of_two_families_is_refused(atelier: Client, tmp_path: Path) -> None:
    few = random_factors("sd1", seed=0, rank=1, where=lambda n: "unet.mid_block" in n and ".attn2." in n)
    write_kohya(tmp_path / "a", few, family="sd1")
    atelier.check_in(tmp_path / "a", name="foreign")
    with pytest.raises(
        AtelierError, match="no base takes all of these: hero:1 for pocket, foreign:1 for sd1"
    ):
        atelier.save_stack({"hero:1": 1.0, "foreign": 1.0}, name="mixed")
