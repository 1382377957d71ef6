"""The README's commands work as written, in order, as a newcomer would type them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from registry.hub.endpoint import token_variable
from tests.e2e.test_serve import process
from tests.hub.standin import TOKEN, StandIn

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(sh|python|make)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)


def test_every_command_of_the_readme_works(tmp_path: Path) -> None:
    (tmp_path / "compose").symlink_to(ROOT / "compose")
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = []
    (tmp_path / "hub").mkdir()
    with (
        StandIn(tmp_path / "hub") as hub,
        process(
            tmp_path / "atelier-data", "127.0.0.1:0", "--hub", hub.url, **{token_variable(hub.url): TOKEN}
        ) as (_, address),
    ):
        environment = {**os.environ, "PATH": binaries, "ATELIER_SERVER": address, "OMP_NUM_THREADS": "1"}
        for language, block in BLOCKS:
            if language == "make" or block.startswith("atelier serve"):
                continue  # the targets: below; the server: `process`, with the same command
            if block.startswith("grpcurl") and not shutil.which("grpcurl"):
                continue
            command = ["bash", "-eu", "-c", block.replace("127.0.0.1:7431", address)]
            if language == "python":
                command = [sys.executable, "-c", block]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
            )
            assert (done.returncode, done.stderr) == (0, ""), (block, done.stdout, done.stderr)
            ran.append(block)
    assert len(ran) >= 4
    assert (tmp_path / "framed.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    for name in ("milo", "framed", "sheet-1", "sheet-4", "npc-0", "npc-1"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (64, 64)
    assert (tmp_path / "milo-framed.safetensors").stat().st_size > 10_000
    cards = [commit.files.get("README.md") for commit in hub.repos["studio/milo"].commits]
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert [card for card in cards if card and pictured(card.data.decode()).startswith(pictured(shown))]


def pictured(card: str) -> str:
    """Without what pictures are called, which depends on their pixels."""
    return re.sub(r"images/[0-9a-f]{16}\.png", "images/….png", card)


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = [
        line.split()[1] for language, block in BLOCKS if language == "make" for line in block.splitlines()
    ]
    assert targets == ["demo", "test"]
    for target in (*targets, "lint", "bench", "protos"):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_picture_of_the_readme_is_there() -> None:
    (path,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    with Image.open(ROOT / path) as image:
        assert image.width > 600
