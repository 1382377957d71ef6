"""`--control` and `--reference` as they are typed, from serving to replay; and what cannot be served."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from atelier.steering import steered
from compose import bases
from compose.manifest import from_png
from compose.warm import WarmPipeline, warm_up
from server.main import main as server_main
from tests.companions import tiny_adapter, tiny_control, tiny_encoder
from tests.e2e.test_serve import process
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm: WarmPipeline) -> Path:
    """A ControlNet, an IP-Adapter with its image encoder, and two pictures."""
    found = tmp_path_factory.mktemp("steering")
    tiny_control(warm, found / "edges")
    tiny_adapter(warm, found / "style" / "it.safetensors")
    tiny_encoder(found / "style" / "image_encoder")
    for seed, name in enumerate(("map.png", "mood.png")):
        random = np.random.default_rng(seed)
        Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(found / name)
    return found


def run(address: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "atelier.cli", *arguments],
        env={**os.environ, "ATELIER_SERVER": address},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_from_serving_to_replay(folder: Path, tmp_path: Path) -> None:
    served = (f"--control=pocket:edges={folder / 'edges'}", f"--ip-adapter=pocket:style={folder / 'style'}")
    with process(tmp_path / "data", "127.0.0.1:0", *served) as (_, address):
        bases = run(address, folder, "bases", "--json")
        assert json.loads(bases.stdout)[0]["controls"] == ["edges"]
        assert json.loads(bases.stdout)[0]["references"] == ["style"]
        steering = ("--control", "edges=map.png@0.8:0..0.6", "--reference", "style=mood.png@0.5")
        scheduling = ("--scheduler", "DPMSolverMultistepScheduler:use_karras_sigmas=true,solver_order=3")
        told = ("--seed", "7", "--steps", "5", *steering, *scheduling, "-o", "a.png")
        made = run(address, folder, "render", "a red star", *told)
        assert (made.returncode, made.stderr) == (0, "")
        manifest = json.loads(from_png((folder / "a.png").read_bytes()))
        assert [(c["name"], c["weight"], c["end"]) for c in manifest["controls"]] == [("edges", 0.8, 0.6)]
        assert [(r["name"], r["weight"]) for r in manifest["references"]] == [("style", 0.5)]
        assert manifest["scheduler_options"] == {"solver_order": 3, "use_karras_sigmas": True}
        again = run(
            address, folder, "replay", "a.png", "--control=map.png", "--reference=mood.png", "-o", "b.png"
        )
        assert (again.returncode, again.stderr) == (0, "")
        assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
        lacking = run(address, folder, "replay", "a.png", "--control=map.png", "-o", "c.png")
        assert (lacking.returncode, lacking.stderr.count("\n")) == (4, 1)
        assert "was made with the reference" in lacking.stderr
        heavy = run(address, folder, "render", "a star", "--control=edges=map.png@9", "--steps=1")
        assert heavy.stderr.startswith("atelier: --control edges=map.png@9: the weight 9.0 is not within")
        (folder / "cut.png").write_bytes((folder / "mood.png").read_bytes()[:200])
        cut = run(address, folder, "render", "a star", "--reference=style=cut.png", "--steps=1")
        assert cut.stderr.startswith("atelier: --reference style=cut.png: the image is damaged")


def test_a_union_says_what_it_reads(folder: Path, tmp_path: Path) -> None:
    base = tiny("sdxl", tmp_path / "xl")
    tiny_control(warm_up(bases.find(f"xl={base}")), tmp_path / "union", num_control_type=6)
    served = (f"--base=xl={base}", f"--control=xl:union={tmp_path / 'union'},ink,wash")
    with process(tmp_path / "data", "127.0.0.1:0", *served) as (_, address):
        told = json.loads(run(address, folder, "bases", "--json").stdout)[0]
        assert told["control_modes"] == {"union": {"names": ["ink", "wash", "2", "3", "4", "5"]}}
        assert "union (ink," in run(address, folder, "bases").stdout
        asked = ("render", "a star", "--steps=3", "--seed=7", "--size=32x32")
        made = run(address, folder, *asked, "--control=union/wash=map.png@0.8:0..0.7", "-o", "union.png")
        assert (made.returncode, made.stderr) == (0, "")
        (steered_by,) = json.loads(from_png((folder / "union.png").read_bytes()))["controls"]
        assert (steered_by["mode"], steered_by["weight"], steered_by["end"]) == (1, 0.8, 0.7)
        again = run(address, folder, "replay", "union.png", "--control=map.png", "-o", "same.png")
        assert (again.returncode, again.stderr) == (0, "")
        assert (folder / "union.png").read_bytes() == (folder / "same.png").read_bytes()
        for typed, message in (
            (
                "union=map.png",
                "the mode is missing: say what union reads; take one of ink, wash, 2, 3, 4, 5, or",
            ),
            ("union/oil=map.png", "the mode 'oil' is none of union's; take one of ink, wash"),
        ):
            no = run(address, folder, *asked, f"--control={typed}")
            assert no.stderr.startswith(f"atelier: --control {typed}: {message}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--control=pocket:edges=/nowhere", "there is no directory /nowhere"),
        ("--control=edges", "write BASE:NAME=PLACE"),
        ("--control=other:edges=/nowhere", "there is no base 'other'; there is pocket"),
        ("--ip-adapter=pocket:style=/nowhere.bin", "pickled weights are not opened"),
        ("--ip-adapter=pocket:style=/nowhere.safetensors", "/nowhere.safetensors is missing"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "--data", str(tmp_path), "--listen", "127.0.0.1:0", option])
    assert server_main() == 4
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_what_is_typed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = steered(
        ["edges=map.png", "union/depth=map.png@1", "edges=map.png@0.5:0..0.6", "edges=map.png@:.25..1"],
        ["style=mood.png", "style=mood.png@.5"],
    )
    numbers = [
        tuple(getattr(c, n) if c.HasField(n) else None for n in ("weight", "start", "end"))
        for c in found["controls"]
    ]
    assert numbers == [(None, None, None), (1.0, None, None), (0.5, 0.0, 0.6), (None, 0.25, 1.0)]
    assert [c.mode for c in found["controls"]] == ["", "depth", "", ""]
    assert {c.image for c in found["controls"]} == {(folder / "map.png").read_bytes()}
    assert [r.weight if r.HasField("weight") else None for r in found["references"]] == [None, 0.5]


@pytest.mark.parametrize("typed", ["edges", "=map.png", "edges=", "union/=map.png", "/depth=map.png"])
def test_what_is_mistyped(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        steered([typed], [])
    assert ended.value.exit_code == 2
    assert "write NAME=FILE" in capsys.readouterr().err
