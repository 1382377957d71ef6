"""`atelier sweep` as typed, against the session's server."""

import json
from pathlib import Path

import pytest
from PIL import Image

from compose.pocket import ADAPTERS
from tests.conftest import Running
from tests.e2e.test_cli import Run, atelier, failed, good


@pytest.fixture
def run(server: Running, tmp_path: Path) -> Run:
    """The command in an empty directory, with a character and a style checked in."""

    def call(*arguments: object):  # type: ignore[no-untyped-def]
        return atelier(*arguments, server=server.address, cwd=tmp_path)

    for asset, name in (("swept", "fungo"), ("swept-frame", "ochreframe")):
        call("checkin", ADAPTERS / f"{name}.safetensors", "--name", asset, "--card", ADAPTERS / f"{name}.md")
    return call


def test_one_adapter_alone_is_looked_at_in_seven_strengths(run: Run, tmp_path: Path) -> None:
    told = good(run("sweep", "swept", "--steps", 2, "--seed", 3))
    assert told == "sweep.png: 7 x 1 cells, seed 3; sweep.json tells how each was made\n"
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.width > 7 * 128
    (axis,) = json.loads((tmp_path / "sweep.json").read_text())["axes"]
    assert axis["values"] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]
    assert axis["adapter"]["ref"] == "swept:1"


def test_a_sweep_is_kept_attached_and_replayed(run: Run, tmp_path: Path) -> None:
    ask = ["sweep", "portrait of {swept}", "--stack", "swept=1,swept-frame=0.5/text_encoder=0.5"]
    ask += ["--over", "swept=0:1:3", "--by", "seed=1:2", "--steps", 2, "-o", "grid.png"]
    told = good(run(*ask, "--cells", "cells", "--attach"))
    assert "grid.png: 3 x 2 cells" in told
    assert "swept:1 is shown with it" in told
    assert "sweep: swept 0 to 1, by seed 1 to 2; portrait of fungo" in good(run("preview", "swept"))
    document = json.loads((tmp_path / "grid.json").read_text())
    cell = next(c for c in document["cells"] if (c["column"], c["row"]) == (1, 1))
    assert cell["file"] == "cells/grid-2-2.png"
    assert cell["manifest"]["stack"][1]["parts"] == {"text_encoder": 0.5}
    good(run("replay", cell["file"], "-o", "again.png"))
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / cell["file"]).read_bytes()
    assert len(list((tmp_path / "cells").iterdir())) == 6


def test_every_way_to_say_what_varies(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {swept}\n\n two {swept} \n")

    def axes(*arguments: object) -> list[tuple[str, list[object]]]:
        stack = ("--stack", "swept=1,swept-frame=0.5")
        document = json.loads(good(run("sweep", *stack, *arguments, "--steps", 1, "--json")))
        return [(axis["varies"], axis["labels"]) for axis in document["axes"]]

    method = "naive,orthogonal/side=output/strength=0.5"
    assert axes("--over", f"method={method}", "--by", "weight:swept-frame=1") == [
        ("method", ["naive", "orthogonal (side output, strength 0.5)"]),
        ("weight", ["swept-frame 1"]),
    ]
    assert axes("--over", "swept/text_encoder=0:1:2", "--by", "swept=1") == [
        ("weight", ["swept/text_encoder 0", "swept/text_encoder 1"]),
        ("weight", ["swept 1"]),
    ]
    assert axes("--over", "version:swept=1,swept:1", "--by", "prompt=prompts.txt") == [
        ("version", ["swept:1", "swept:1"]),
        ("prompt", ["a {swept}", "two {swept}"]),
    ]
    assert axes("a {swept}", "--over", "seed=+2", "--seed", 7, "--by", "guidance=1:3:2") == [
        ("seed", ["seed 7", "seed 8"]),
        ("guidance", ["guidance 1", "guidance 3"]),
    ]
    assert axes("--over", "prompt=a star, red", "--over", "prompt=a heart", "--by", "steps=1:3:3") == [
        ("prompt", ["a star, red", "a heart"]),
        ("steps", ["1 step", "2 steps", "3 steps"]),
    ]


def test_mistakes_in_a_sweep_are_one_line(run: Run) -> None:
    stack = ("sweep", "a {swept}", "--stack", "swept=1")
    for arguments, code, message in (
        (("sweep",), 2, "say what varies: --over NAME=0:1.2:7"),
        (("sweep", "a star"), 2, "say what varies"),
        (("sweep", "nobody-here"), 3, "there is no 'nobody-here'"),
        ((*stack, "--over", "swept"), 2, "write NAME=0:1.2:7, seed=1:3"),
        ((*stack, "--over", "swept=a"), 2, "write numbers, 0,0.5,1, or FROM:TO:COUNT"),
        ((*stack, "--over", "swept=0:1:999"), 2, "999 values are not within 1 and 256"),
        ((*stack, "--over", "seed=3:1"), 2, "the smaller first"),
        ((*stack, "--over", "seed=x"), 2, "write seeds, 1,2,3 or 1:3, or +4"),
        ((*stack, "--over", "swept=1", "--over", "seed=1"), 2, "said 2 times"),
        ((*stack, "--over", "method=svd/rank=x"), 2, "rank"),
        ((*stack, "--over", "steps=1,1e12"), 2, "write whole numbers, 1 to 150"),
        ((*stack, "--over", "steps=2.6,3"), 2, "write whole numbers, 1 to 150"),
        ((*stack, "--over", "steps=3,3"), 4, "'3 steps' twice"),
        ((*stack, "--over", "swept=1", "--by", "swept=2"), 4, "both axes vary the weight of swept"),
        ((*stack, "--over", "swept=1,99"), 4, "weight 99.0 must be a number within -8 and 8"),
        ((*stack, "--over", "nobody=1"), 4, "'nobody' is not in the stack, which has swept"),
        ((*stack, "-o", "x.json"), 2, "would be written twice"),
        ((*stack, "-o", "no/where.png"), 3, "no directory"),
        (("sweep", "a star", "--over", "seed=1", "--attach"), 2, "with which version"),
        ((*stack, "--by", "prompt=promts.txt"), 3, "--by prompt=promts.txt: there is no promts.txt"),
        (
            (*stack, "--by", f"prompt={ADAPTERS}/fungo.safetensors"),
            2,
            "is no file of text with a prompt a line",
        ),
    ):
        failed(run(*arguments), code, message)


def test_a_prompt_that_ends_like_a_file_is_a_prompt(run: Run, tmp_path: Path) -> None:
    done = run("sweep", "--over", "prompt=a star of letters.txt", "--steps", "1", "--json")
    assert json.loads(done.stdout)["axes"][0]["values"] == ["a star of letters.txt"]


def test_a_mistake_is_told_in_the_words_that_were_typed(run: Run) -> None:
    stack = ("sweep", "a {swept}", "--stack", "swept=1,nobody@x=0.5")
    for arguments, code, line in (
        (("sweep", "nobody@x"), 3, "nobody@x: there is no"),
        ((*stack, "--over", "swept=1"), 3, "nobody@x: there is no"),
        (("sweep", "swept", "--over", "swept=1,99"), 4, "--over swept=1,99: weight 99.0 must be"),
        (("sweep", "swept", "--over", "steps=3,3"), 4, "--over steps=3,3 has '3 steps' twice"),
        (("sweep", "swept", "--by", "method=tsv,no"), 4, "--by method=tsv,no: unknown method 'no'"),
        (("sweep", "swept", "--by", "version:swept=9"), 3, "--by version:swept=9: 'swept' has no 'swept:9'"),
        (("sweep", "swept", "--over", "seed=1", "--base", "nope"), 4, "--base: this server has no base"),
    ):
        done = run(*arguments)
        assert done.returncode == code
        assert done.stderr.startswith(f"atelier: {line}")
    prompts = ("--over", "prompt=a", "--over", "prompt=" + "b" * 9000)
    assert run("sweep", *prompts, "--stack", "swept").stderr.startswith("atelier: --over: prompt has 9000")


def test_a_sweep_takes_what_a_render_takes(run: Run, tmp_path: Path) -> None:
    good(run("render", "{swept}", "--stack", "swept=1", "--steps", 1, "-o", "start.png"))
    ask = ["sweep", "swept", "--over", "swept=0,1", "--steps", 4, "--image", "start.png", "--strength", 0.5]
    ask += ["--when", "swept=0.5..1", "--scheduler", "EulerDiscreteScheduler", "--base", "pocket"]
    cell = json.loads(good(run(*ask, "--json")))["cells"][1]["manifest"]
    assert (cell["scheduler"], cell["source"]["strength"]) == ("EulerDiscreteScheduler", 0.5)
    assert cell["stack"][0]["phases"] == [[0.5, 1, 1]]
    failed(run(*ask, "--base", "nope"), 4, "this server has no base 'nope'")
