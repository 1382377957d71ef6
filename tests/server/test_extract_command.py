"""`atelier extract` as a command: the file it writes, what it tells, and its exit status."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compose.pocket import WEIGHTS
from server import extract
from tests.adapters import delta, random_factors, read

UNET = "unet/diffusion_pytorch_model.safetensors"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["extract", *map(str, arguments)])
    return extract.main()


def test_it_writes_what_was_trained_and_tells_how_much_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = layers = random_factors("pocket", seed=1, rank=3, where="unet.conv_out".__eq__)
    shutil.copytree(WEIGHTS, tmp_path / "tuned")
    tensors = {key: tensor.float() for key, tensor in load_file(tmp_path / "tuned" / UNET).items()}
    tensors["conv_out.weight"] += delta(layers[name]).float().view_as(tensors["conv_out.weight"])
    save_file(tensors, tmp_path / "tuned" / UNET)
    assert run(monkeypatch, tmp_path / "tuned", tmp_path / "a", "--energy", "0.9999", "--json") == 0
    said = capsys.readouterr()
    assert said.err == ""  # no bar, and no empty line of one, where nobody watches
    told = json.loads(said.out)
    assert (told["layers"], told["rank"]["most"], told["left_behind"]) == (1, 3, [])
    found = delta(read(tmp_path / "a")[name])
    assert (found - delta(layers[name])).norm() < 1e-3 * found.norm()


def test_where_nothing_can_be_written_nothing_is_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, WEIGHTS, tmp_path / "nowhere" / "a") == 3
    assert f"there is no directory {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert run(monkeypatch, WEIGHTS, tmp_path / "a") == 4
    assert "does not differ" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
