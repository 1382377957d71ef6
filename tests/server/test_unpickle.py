"""Pickles become safetensors in a limited process; what runs code, or claims too much, is refused."""

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atelier.client import Client
from compose.formats import load_words
from server import unpickle
from server.unpickle import Refused, named
from tests.adapters import random_factors, sketch, write_kohya

WIDTH = 96


def convert(file: Path, output: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "atelier.cli", "convert", str(file), "-o", str(output), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def embedding(words: int = 1) -> dict[str, Any]:
    """A file as A1111 writes it."""
    held = torch.nn.ParameterDict({f"w{i}": torch.nn.Parameter(torch.randn(2, WIDTH)) for i in range(words)})
    return {"string_to_token": {"*": 265}, "string_to_param": held, "name": "glow", "step": 500}


def test_an_a1111_embedding_is_converted_and_checked_in(client: Client, tmp_path: Path) -> None:
    told = embedding()
    torch.save(told, tmp_path / "glow.pt")
    done = convert(tmp_path / "glow.pt", tmp_path / "glow.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 tensors" in done.stdout
    kept = load_file(tmp_path / "glow.safetensors")
    assert torch.equal(kept["emb_params"], told["string_to_param"]["w0"].detach())
    version = client.check_in(tmp_path / "glow.safetensors", name="from-a1111", base="pocket").version
    assert (version.layout, version.rank) == ("emb_params", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["glow.pt", "glow.safetensors"]


def test_nothing_but_a_file_gives_its_place_to_what_is_converted(tmp_path: Path) -> None:
    torch.save({"<w>": torch.randn(WIDTH)}, tmp_path / "word.bin")
    os.mkfifo(tmp_path / "pipe")
    for place, told in (
        (tmp_path, " is no file; choose another --output"),
        (tmp_path / "pipe", " is no file; choose another --output"),
        (tmp_path / ("n" * 300), ": File name too long"),
    ):
        done = convert(tmp_path / "word.bin", place)
        assert (done.returncode, done.stderr) == (4, f"atelier: {place}{told}\n")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "word.bin"]


def test_what_is_safetensors_already_is_said_to_be(lora: Path) -> None:
    done = convert(lora, lora.with_name("again.safetensors"))
    assert (done.returncode, done.stderr) == (
        4,
        f"atelier: {lora} is safetensors already; check it in as it is\n",
    )


class Canary:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"emb_params": Canary(tmp_path / "canary")}, tmp_path / "evil.pt")
    done = convert(tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert "is not a pickle of tensors that can be read safely: Trying to load unsupported GLOBAL" in line
    assert "weights_only" not in line  # torch's advice on how to run it
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def stretched(path: Path) -> None:
    torch.save({"<bomb>": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)


def deflated(path: Path) -> None:
    torch.save({"<bomb>": torch.zeros(1 << 18, 64)}, path)  # 64 MiB
    with zipfile.ZipFile(path) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name, data in members.items():
            small.writestr(name, data)


@pytest.mark.parametrize("bomb", [stretched, deflated])
def test_converter_survives_bombs(tmp_path: Path, bomb: Callable[[Path], None]) -> None:
    bomb(tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    done = convert(tmp_path / "bomb.pt", tmp_path / "out.safetensors")
    assert (done.returncode, "claims more numbers than the file holds" in done.stderr) == (4, True)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_no_pickle_or_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "poem.pt").write_text("not a pickle")
    assert convert(tmp_path / "poem.pt", tmp_path / "a").returncode == 4
    assert convert(tmp_path / "none.pt", tmp_path / "a").returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["poem.pt"]


def test_loras_keep_their_names_and_lists_get_them(tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=2))
    tensors = load_file(tmp_path / "a")
    assert named({"state_dict": tensors}, "a.ckpt", 1 << 30).keys() == tensors.keys()
    listed = named([torch.ones(4, 2), torch.ones(2, 4)] * 2, "lora.pt", 1000)
    assert list(listed) == ["unet:0:up", "unet:0:down", "unet:1:up", "unet:1:down"]
    assert (
        next(iter(named([torch.ones(4, 2), torch.ones(2, 4)], "x.text_encoder.pt", 1000)))
        == "text_encoder:0:up"
    )
    assert list(named({"<cat>": torch.ones(WIDTH)}, "learned_embeds.bin", 1 << 20)) == ["<cat>"]
    several = {"<cat>": torch.ones(WIDTH), "<dog>": torch.ones(2, WIDTH)}
    assert list(named(several, "learned_embeds.bin", 1 << 20)) == ["<cat>", "<dog>"]


@pytest.mark.parametrize("order", [1, -1])
def test_the_two_files_of_a_word_for_sdxl_become_one_word(client: Client, tmp_path: Path, order: int) -> None:
    """As diffusers' textual_inversion_sdxl.py leaves them: each fits no encoder but its own."""
    small, large = torch.randn(2, 768), torch.randn(2, 1280)
    save_file({"<hat>": small}, tmp_path / "learned_embeds.safetensors")
    torch.save({"<hat>": large}, tmp_path / "learned_embeds_2.bin")
    files = [tmp_path / "learned_embeds.safetensors", tmp_path / "learned_embeds_2.bin"][::order]
    done = convert(files[0], tmp_path / "hat.safetensors", f"--second={files[1]}")
    assert (done.returncode, done.stderr) == (0, "")
    version = client.check_in(tmp_path / "hat.safetensors", name=f"hat-{order + 1}").version
    assert (version.family, [t.word for t in version.triggers]) == ("sdxl", ["<hat>"])
    (word,) = load_words(tmp_path / "hat.safetensors", sketch(tmp_path / "hat.safetensors"))
    assert torch.equal(word.vectors["clip_l"], small)
    assert torch.equal(word.vectors["clip_g"], large)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"<hat>": torch.ones(2, 768)}, "hold vectors of 768 and of 1280"),
        ({"<cap>": torch.ones(2, 1280)}, "hold different words: <hat>, <cap>"),
        ({"<hat>": torch.ones(2, 2, 1280)}, "hold vectors of 768 and of 1280"),
    ],
)
def test_halves_that_are_of_no_word_are_refused(
    tmp_path: Path, second: dict[str, Tensor], message: str
) -> None:
    save_file({"<hat>": torch.ones(2, 768)}, tmp_path / "a")
    save_file(second, tmp_path / "b")
    done = convert(tmp_path / "a", tmp_path / "c", f"--second={tmp_path / 'b'}")
    assert done.returncode == 4
    assert message in done.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "holds dict"),
        (3, "holds int"),
        (embedding(words=2), "holds 2 words"),
        ({"a": 1}, "is int, not a tensor"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, "neither an embedding nor a LoRA"),
        ({"a": torch.ones(2, 2, 2)}, "neither an embedding nor a LoRA"),
        ([torch.ones(2)], "holds list"),
    ],
)
def test_the_rest_is_refused(found: object, message: str) -> None:
    with pytest.raises(Refused, match=message):
        named(found, "x.pt", 1 << 20)


def test_the_process_that_reads_has_no_network_or_the_command_says_so(tmp_path: Path) -> None:
    torch.save(embedding(), tmp_path / "glow.pt")
    told = convert(tmp_path / "glow.pt", tmp_path / "glow.safetensors").stdout
    script = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=60)"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        free, limited = (
            subprocess.run(
                [sys.executable, "-c", script, port], capture_output=True, preexec_fn=limit, timeout=120
            )
            for limit in (None, unpickle._limit)
        )
    assert free.returncode == 0
    assert (limited.returncode != 0) == ("in a process with network" not in told)
