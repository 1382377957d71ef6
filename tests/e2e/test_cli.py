"""The command as people and scripts use it: output, JSON, exit statuses, one line of error."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def atelier(*arguments: object, server: str = "127.0.0.1:1", cwd: Path | None = None) -> Done:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "atelier.cli", *map(str, arguments)]
    environment = {**os.environ, "ATELIER_SERVER": server}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


@pytest.fixture
def run(server: Running, tmp_path: Path) -> Run:
    """The command, talking to the session's server, in an empty directory."""

    def call(*arguments: object) -> Done:
        return atelier(*arguments, server=server.address, cwd=tmp_path)

    return call


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def good(done: Done) -> str:
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def failed(done: Done, code: int, message: str) -> None:
    assert done.returncode == code, (done.returncode, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("atelier: ")
    assert message in line
    assert done.stdout == ""


def test_an_artists_five_minutes(run: Run, tmp_path: Path) -> None:
    write_kohya(tmp_path / "hero.safetensors", random_factors("pocket", seed=1, rank=4))
    write_kohya(tmp_path / "wash.safetensors", random_factors("pocket", seed=2, rank=4))
    (tmp_path / "card.md").write_text("---\ninstance_prompt: sks\n---\n# Hero\n\nA *fine* character.\n")
    told = good(run("checkin", "hero.safetensors", "--name", "cli-hero", "--card", "card.md"))
    assert told.startswith("cli-hero:1\n")
    assert "sks (from card)" in told
    assert "64 of 64 layers" in told
    good(
        run("checkin", "wash.safetensors", "--name", "cli-wash", "--trigger", "in wash", "--alias", "stable")
    )
    assert "cli-hero:1" in good(run("list"))
    assert "A fine character." in good(run("show", "cli-hero"))
    assert good(run("alias", "cli-hero", "stable", "1")) == "cli-hero@stable is cli-hero:1\n"
    assert good(run("alias", "cli-hero", "stable")) == "cli-hero@stable is cli-hero:1\n"
    assert "cli-hero:1" in good(run("history", "cli-hero"))
    good(run("download", "cli-hero@stable", "-o", "again.safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "hero.safetensors").read_bytes()
    both = ("cli-hero=0.9", "cli-wash@stable=0.4", "--method", "orthogonal", "--name", "cli-both")
    told = good(run("merge", *both))
    assert "cli-both:1" in told
    assert "orthogonal: cli-hero:1 × 0.9 + cli-wash:1 × 0.4" in good(run("show", "cli-both"))
    stack = ("--stack", "cli-hero=0.9,cli-wash=0.4")
    prompt = "a {cli-hero} star {cli-wash}"
    assert good(run("render", prompt, *stack, "--seed", 7, "--steps", 2, "-o", "a.png")) == "a.png: seed 7\n"
    assert size(tmp_path / "a.png") == (64, 64)
    good(run("replay", "a.png", "-o", "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    good(run("render", "a star", "--count", 2, "--steps", 1, "--size", "32x48", "-o", "many.png"))
    assert [size(tmp_path / f"many-{i}.png") for i in (1, 2)] == [(32, 48)] * 2


def test_what_is_damaged_on_the_server_ends_as_verify_ends(tmp_path: Path, warm: WarmPipeline) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=3, rank=4))
    with serving(tmp_path / "data", warm) as server:
        told = good(atelier("checkin", tmp_path / "a", "--name", "hero", "--json", server=server.address))
        blob = server.catalog.blobs.path(json.loads(told)["version"]["digest"])
        blob.chmod(0o644)
        blob.write_bytes(b"x" * blob.stat().st_size)
        message = "was changed on disk; restore it from a backup"
        failed(atelier("download", "hero", "-o", tmp_path / "b", server=server.address), 5, message)
    assert atelier("verify", "--data", tmp_path / "data").returncode == 5


def test_every_reading_command_speaks_json(run: Run, tmp_path: Path) -> None:
    save_file({"<json>": torch.zeros(1, 96)}, tmp_path / "w.safetensors")
    assert (
        json.loads(good(run("checkin", "w.safetensors", "--name", "cli-json", "--json")))["created"] is True
    )
    assert json.loads(good(run("show", "cli-json", "--json")))["version"]["layout"] == "learned_embeds"
    assert "cli-json" in {v["name"] for v in json.loads(good(run("list", "--json")))}
    assert [v["number"] for v in json.loads(good(run("history", "cli-json", "--json")))] == [1]
    good(run("alias", "cli-json", "stable", 1))
    assert json.loads(good(run("alias", "cli-json", "stable", "--json")))["version"]["number"] == 1
    told = json.loads(good(run("render", "a star", "--steps", 1, "--seed", 5, "-o", "x.png", "--json")))
    assert told["files"] == ["x.png"]
    assert told["manifests"][0]["seed"] == 5


def test_a_card_is_shown_and_found(run: Run, tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=5, rank=4))
    card = "---\ntags: [badger]\nauthor: ann\n---\nRecommended weight: 0.8 (0.6 to 1)\n"
    (tmp_path / "card.md").write_text(card)
    told = good(run("checkin", "a", "--name", "brock", "--card", "card.md"))
    assert "0.8, 0.6 to 1 (from card text)" in told
    assert "ann (from card)" in told
    assert "brock:1" in good(
        run("list", "badg", "--tag", "badger", "--author", "ANN", "--after", "2020-01-01")
    )
    assert "nothing answers that" in good(run("list", "badger", "--base", "sdxl"))
    assert json.loads(good(run("list", "badger", "--json")))[0]["about"]["tags"] == ["badger"]


def test_a_stack_is_kept_and_says_what_would_move(run: Run, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_kohya(tmp_path / str(seed), random_factors("pocket", seed=seed, rank=4))
    good(run("checkin", "1", "--name", "vera", "--trigger", "vera", "--alias", "stable"))
    told = good(
        run("stack", "save", "vera-look", "vera@stable=0.9", "--prompt", "a {vera} star", "--steps", "2")
    )
    assert "vera:1 × 0.9" in told
    assert "nothing moved" in good(run("stack", "update", "vera-look"))
    good(run("render", "--stack", "vera-look", "--seed", "1", "-o", "a.png"))
    good(run("checkin", "2", "--name", "vera", "--trigger", "vera", "--alias", "stable"))
    told = good(run("stack", "update", "vera-look"))
    assert "vera:1 × 0.9 -> vera:2 × 0.9" in told
    assert "nothing was changed" in told
    good(run("render", "--stack", "vera-look", "--seed", "1", "-o", "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "saved as vera-look:2" in good(run("stack", "update", "vera-look", "--yes"))
    assert "a {vera} star" in good(run("show", "vera-look"))
    failed(run("stack", "update", "vera"), 4, "vera is no stack")


def test_two_versions_are_told_apart(run: Run, tmp_path: Path) -> None:
    for seed, card in ((1, "first\nboth\n"), (2, "second\nboth\n")):
        write_kohya(tmp_path / str(seed), random_factors("pocket", seed=seed, rank=3 + seed))
        (tmp_path / "card.md").write_text(card)
        good(run("checkin", seed, "--name", "twin", "--card", "card.md"))
    told = good(run("diff", "twin:1", "twin:2"))
    for part in ("rank 4", "rank 5", "-first", "+second", "the 12 that moved most"):
        assert part in told
    layers = json.loads(good(run("diff", "twin:1", "twin:1", "--json")))["layers"]
    assert {round(layer["cosine"], 6) for layer in layers} == {1.0}
    failed(run("diff", "twin:1", "twin:9"), 3, "'twin' has no 'twin:9'")


def test_a_peft_directory_is_checked_in_with_its_configuration(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    module = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    only = random_factors("pocket", seed=0, rank=4)[module.replace("base_model.model", "unet")]
    tensors = {f"{module}.lora_A.weight": only.down, f"{module}.lora_B.weight": only.up}
    save_file(tensors, folder / "adapter_model.safetensors")
    failed(run("checkin", "peft", "--name", "cli-peft"), 4, "adapter_config.json, which was not given")
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    (folder / "README.md").write_text("# From PEFT\n")
    assert "peft layout" in good(run("checkin", "peft", "--name", "cli-peft"))
    assert "From PEFT" in good(run("show", "cli-peft"))


def test_failures_are_one_line_with_the_promised_status(run: Run, tmp_path: Path) -> None:
    (tmp_path / "poem.safetensors").write_text("not an adapter at all")
    write_kohya(tmp_path / "ok.safetensors", random_factors("pocket", seed=1, rank=1))
    failed(run("show", "nobody"), 3, "there is no 'nobody'")
    failed(run("checkin", "missing.safetensors", "--name", "x"), 3, "there is no missing.safetensors")
    failed(run("replay", "missing.png", "-o", "x.png"), 3, "there is no missing.png")
    failed(run("checkin", "poem.safetensors", "--name", "x"), 4, "not safetensors")
    failed(run("checkin", "ok.safetensors", "--name", "../x"), 4, "is not a name")
    failed(run("render", "a", "--steps", 0), 4, "steps 0")
    failed(run("render", "a", "--stack", "x=nan"), 4, "weight nan")
    failed(run("render", "a", "--size", "63x64"), 4, "width 63")
    failed(run("render", "a", "--stack", "x=much"), 2, "is not a weight")
    failed(run("render", "a", "--size", "large"), 2, "is not a size")
    failed(run("render", "a", "--stack", "b=1,c", "--when", "d=0..1"), 2, "--when d=0..1: the stack has b, c")
    failed(run("render", "a", "--steps", 150, "--count", 64, "--timeout", "0.5"), 6, "allow more time")
    good(run("checkin", "ok.safetensors", "--name", "cli-ok"))
    failed(run("alias", "cli-ok", "stable", 1, "--expect", 7), 5, "does not exist, not 7 as you thought")
    failed(run("render", "a", "--seed", 10**23), 4, "out of range")
    failed(run("render", "a", "--steps", 3 * 10**9), 4, "out of range")
    failed(run("alias", "cli-ok", "stable", 10**11), 4, "out of range")
    failed(run("render", "a", "-o", "nowhere/x.png"), 3, "there is no directory nowhere")
    for command in (
        ("render", "a"),
        ("replay", "x.png"),
        ("sweep", "cli-ok"),
        ("job", "fetch", "jobs/1"),
        ("inspect", "cli-ok", "cli-ok"),
        ("tune", "cli-ok"),
    ):
        failed(run(*command, "-o", "x.JPG"), 2, "x.JPG: pictures are PNG, which carry what made them")
    failed(run("download", "cli-ok", "-o", "nowhere/x"), 3, "there is no directory nowhere")
    failed(run("download", "cli-ok", "-o", "."), 4, ". is a directory; name a file in it")
    (tmp_path / "big.png").write_bytes(b"x" * (65 << 20))
    failed(run("replay", "big.png", "-o", "x.png"), 4, "the limit is")
    assert run("render").returncode == 2
    assert run("nonsense").returncode == 2


def test_without_a_server_it_says_how_to_start_one() -> None:
    failed(atelier("list"), 6, "no server answers at 127.0.0.1:1; start one with `atelier serve`")


def test_the_client_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'numpy', 'PIL', 'registry', 'compose', 'server'}"
    script = f"import atelier.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def hear_interrupts() -> None:
    """A process started in a shell's background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_keeps_what_is_finished_and_says_so(server: Running, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atelier.cli", "render", "a red star", "--count", "64", "-o", "a.png"]
    environment = {**os.environ, "ATELIER_SERVER": server.address}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        preexec_fn=hear_interrupts,
    ) as process:
        while not (written := list(tmp_path.iterdir())) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told.strip()) == (130, "atelier: interrupted")
    assert 0 < len(written) < 64
    assert all(size(path) == (64, 64) for path in tmp_path.iterdir())


def test_keeping_a_catalog(tmp_path: Path) -> None:
    write_kohya(tmp_path / "hero.safetensors", random_factors("pocket", seed=1, rank=4))
    command = [sys.executable, "-m", "atelier.cli", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]

        def run(*arguments: object) -> Done:
            return atelier(*arguments, server=address, cwd=tmp_path)

        good(run("checkin", "hero.safetensors", "--name", "hero"))
        assert "1 versions in 1 files" in good(run("verify"))
        assert "copy: sound, 1 versions" in good(run("backup", "copy"))
        assert "hero:1 is deleted" in good(run("delete", "hero"))
        assert "hero:1 (deleted)" in good(run("history", "hero"))
        assert "hero:1 is back" in good(run("undelete", "hero:1"))
        assert "would purge 0 deleted versions" in good(run("gc", "--dry-run"))
        events = good(run("watch", "--no-follow", "--json")).splitlines()
        assert [json.loads(line)["action"] for line in events] == ["checkin", "delete", "undelete"]
        failed(run("backup", "atelier-data"), 5, "is the catalog itself")
        failed(run("verify", "--data", "copy/blobs"), 3, "there is no catalog in")
        failed(run("undelete", "hero:1"), 5, "is not deleted")
        process.terminate()
    good(run("restore", "copy", "--data", "again"))
    (blob,) = (path for path in (tmp_path / "again" / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(b"broken")
    broken = run("verify", "--data", "again")
    assert (broken.returncode, broken.stderr) == (5, "")
    assert "DAMAGED" in broken.stdout
    assert "corrupt: hero:1 (sha256:" in broken.stdout
    partial = run("backup", "partial", "--data", "again")
    assert (partial.returncode, partial.stderr) == (5, "")
    assert partial.stdout.startswith("partial: INCOMPLETE, 1 versions in 0 files\n  missing: hero:1 (sha256:")
    assert ", corrupt in again" in partial.stdout
    restored = run("restore", "partial", "--data", "once-more")
    assert (restored.returncode, restored.stderr) == (5, "")
    assert restored.stdout.startswith(
        "once-more: INCOMPLETE, 1 versions in 0 files\n  missing: hero:1 (sha256:"
    )
    assert ", missing in partial" in restored.stdout
    (tmp_path / "again" / "catalog.db").write_bytes(b"no database at all")
    failed(run("verify", "--data", "again"), 5, "is damaged (file is not a database)")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("token add ann --role king", 4, "'king' is no role; choose --role reader, writer or admin"),
        ("token list --role king", 4, "'king' is no role"),
        ("token frob", 2, "token has no 'frob'; it has add, list, revoke"),
        ("token add", 2, "whose token? atelier token add NAME"),
        ("token revoke", 2, "whose token? atelier token revoke NAME"),
        ("token revoke ann", 3, "there is no token of 'ann'; `atelier token list` shows"),
        ("token add -- -x", 4, "'-x' is no new name"),
        ("backup --data=-d -- -t", 3, "there is no catalog in -d"),
        ("restore -- -t", 3, "there is no catalog in -t"),
        ("verify --data=-d", 3, "there is no catalog in -d"),
        ("convert -o x.safetensors -- -e.pt", 3, "there is no -e.pt"),
    ],
)
def test_mistakes_of_local_commands_are_one_line(
    tmp_path: Path, arguments: str, code: int, message: str
) -> None:
    failed(atelier(*arguments.split(" "), cwd=tmp_path), code, message)


@pytest.mark.parametrize("module", ["server", "server.keep", "server.unpickle", "server.demo"])
def test_the_programs_themselves_tell_mistakes_in_one_line(module: str) -> None:
    command = [sys.executable, "-m", module, "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert "usage:" not in done.stderr
    assert last.startswith("atelier")
    assert "--help` shows what it takes" in last
