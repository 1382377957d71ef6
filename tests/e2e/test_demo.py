"""`atelier demo` does the main job from an empty directory."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from registry.catalog import Catalog


def test_the_demo_checks_in_merges_and_renders(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atelier.cli", "demo", "-o", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    for name, rows in (("contact-sheet", 11), ("sweep", 5)):
        path = Path("out/run-1") / f"{name}.png"
        assert str(path) in done.stdout
        with Image.open(tmp_path / path) as sheet:
            assert sheet.height > rows * 128
    assert "atelier serve --data out/run-1/catalog" in done.stdout
    catalog = Catalog(tmp_path / "out/run-1/catalog")
    found = {v.name: v.facts["layout"] for v in catalog.newest()}
    catalog.close()
    merged = {f"milo-framed-{name}" for name in ("naive", "svd", "orthogonal")}
    assert merged | {"milo", "fungo", "ochreframe", "nightbars", "tealish", "rosy"} == set(found)
    assert {"diffusers", "diffusers-old", "kohya", "peft", "learned_embeds", "emb_params"} == set(
        found.values()
    )
