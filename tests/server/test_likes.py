"""Near-duplicates are found by what they do, not by their bytes."""

import sqlite3
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from atelier.client import AtelierError, Client
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import serving


def trained_on(path: Path, out: Path, *, noise: float, scale: float = 1.0) -> Path:
    """As if training went on: every tensor a little off."""
    g = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor * (scale if "lora_up" in name else 1.0)
        + (noise * tensor.std() * torch.randn(tensor.shape, generator=g) if tensor.dim() > 1 else 0)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, out)
    return out


def test_a_check_in_says_what_it_is_nearly_the_same_as(client: Client, lora: Path, tmp_path: Path) -> None:
    assert list(client.check_in(lora, name="original").similar) == []
    half = {name: tensor.half() for name, tensor in load_file(lora).items()}
    save_file(half, tmp_path / "half")
    later = trained_on(lora, tmp_path / "later", noise=0.1)
    rounded = client.check_in(tmp_path / "half", name="in-half")
    assert [(s.version.name, round(s.cosine, 3)) for s in rounded.similar] == [("original", 1.0)]
    assert (list(rounded.same_bytes), list(rounded.same_tensors)) == ([], [])
    found = client.check_in(later, name="later").similar
    assert {s.version.name for s in found} == {"original", "in-half"}
    assert all(0.96 < s.cosine <= 1.0 for s in found)


def test_what_points_the_same_way_is_found_whatever_its_strength(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    client.check_in(lora, name="base-of")
    client.check_in(trained_on(lora, tmp_path / "strong", noise=0.0, scale=7.0), name="stronger")
    client.check_in(trained_on(lora, tmp_path / "far", noise=0.7), name="far-off")
    found = {s.version.name: s.cosine for s in client.similar("base-of")}
    assert found["stronger"] == pytest.approx(1.0, abs=1e-6)
    assert 0.5 < found["far-off"] < 0.9
    assert list(found) == ["stronger", "far-off"]
    assert [s.version.name for s in client.similar("base-of", at_least=0.99)] == ["stronger"]


def test_the_cosine_is_the_one_of_the_comparison(client: Client, lora: Path, tmp_path: Path) -> None:
    client.check_in(lora, name="exact-a")
    client.check_in(trained_on(lora, tmp_path / "b", noise=0.3), name="exact-b")
    (like,) = client.similar("exact-a")
    assert like.cosine == pytest.approx(client.compare("exact-a", "exact-b").total.cosine, abs=1e-6)


def test_words_are_alike_too(client: Client, tmp_path: Path) -> None:
    vector = torch.randn(1, 96, generator=torch.Generator().manual_seed(3))
    save_file({"<a>": vector}, tmp_path / "a")
    save_file({"<b>": vector * 2 + 0.01}, tmp_path / "b")
    save_file({"<c>": -vector}, tmp_path / "c")
    client.check_in(tmp_path / "a", name="word-a")
    client.check_in(tmp_path / "c", name="word-c")
    answer = client.check_in(tmp_path / "b", name="word-b")
    assert [s.version.name for s in answer.similar] == ["word-a"]


def test_versions_of_before_are_found_and_deleted_ones_are_not(
    tmp_path: Path, warm: WarmPipeline, lora: Path
) -> None:
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        client.check_in(lora, name="old")
        client.check_in(trained_on(lora, tmp_path / "x", noise=0.05), name="new")
    with sqlite3.connect(tmp_path / "data" / "catalog.db") as database:
        database.execute("delete from projections")
    database.close()
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        assert [s.version.name for s in client.similar("new")] == ["old"]
        client.delete("old")
        assert list(client.similar("new")) == []


def test_what_has_no_weights_and_odd_bounds_are_refused(client: Client, lora: Path) -> None:
    client.check_in(lora, name="member")
    client.save_stack({"member": 1.0}, name="weightless")
    with pytest.raises(AtelierError, match="is a stack: it has no weights") as caught:
        client.similar("weightless")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    for bound in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(AtelierError, match="is not above 0 and at most 1"):
            client.similar("member", at_least=bound)
    with pytest.raises(AtelierError, match="there is no"):
        client.similar("nobody-is-here")


def test_another_family_is_never_alike(client: Client, tmp_path: Path) -> None:
    write_kohya(tmp_path / "sd1", random_factors("sd1", seed=9, rank=1), family="sd1")
    client.check_in(tmp_path / "sd1", name="other-family")
    assert list(client.similar("other-family", at_least=0.01)) == []
