"""What is found out of a file while it comes in is what is found out of the whole file, or nothing."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compose.arriving import DTYPES
from compose.errors import NonFinite
from compose.families import table
from compose.projection import projection
from registry.headers import ITEM_BYTES, read_header
from server import arriving as module
from server.arriving import Arriving
from server.checkin import Declared, _looked_at, arriving
from tests.adapters import random_factors, write_kohya

DECLARED = Declared(name="hero")


def told(path: Path, *, size: int | None = None, seed: int = 0) -> Arriving:
    """After the whole file went by, in pieces."""
    rng, data = random.Random(seed), path.read_bytes()
    found = arriving(DECLARED, len(data) if size is None else size)
    while data:
        length = rng.choice((1, 7, 300, 5000, 1 << 20))
        found.update(memoryview(data)[:length])
        data = data[length:]
    return found


def kohya(path: Path) -> None:
    write_kohya(path, random_factors("pocket", seed=1, rank=4), alpha=lambda name: 2.0, metadata={"a": "b"})


def half(path: Path) -> None:
    kohya(path)
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def with_what_is_no_layer(path: Path) -> None:
    kohya(path)
    save_file({**load_file(path), "stray": torch.ones(3), "none": torch.ones(0, 4)}, path)


def fused(path: Path) -> None:
    """Three layers of a base are one of the file."""
    module = table("flux")["transformer.transformer_blocks.0.attn.to_q"]
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, module.k),
        f"{stem}.lora_up.weight": torch.randn(3 * module.d, 2),
        f"{stem}.alpha": torch.tensor(2),
    }
    save_file(tensors, path)


@pytest.mark.parametrize("write", [kohya, half, with_what_is_no_layer, fused])
@pytest.mark.parametrize("seed", range(3))
def test_the_projection_is_that_of_the_whole_file(
    tmp_path: Path, write: Callable[[Path], None], seed: int
) -> None:
    write(tmp_path / "a")
    found = told(tmp_path / "a", seed=seed).found()
    assert found is not None
    seen, vector = _looked_at(tmp_path / "a", DECLARED)
    assert found == (seen, vector)
    assert seen.header == read_header(tmp_path / "a")


def damaged(path: Path, key: str) -> None:
    kohya(path)
    tensors = {**load_file(path), "stray": torch.ones(3)}
    tensors[key].view(-1)[-1] = torch.nan
    save_file(tensors, path)


def test_nothing_is_found_of_a_file_that_is_refused(tmp_path: Path) -> None:
    kohya(tmp_path / "a")
    for key in (next(iter(load_file(tmp_path / "a"))), "stray"):
        damaged(tmp_path / "b", key)
        assert told(tmp_path / "b").found() is None
        with pytest.raises(NonFinite):
            _looked_at(tmp_path / "b", DECLARED)
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-1])
    assert told(tmp_path / "cut", size=len(data)).found() is None
    assert told(tmp_path / "cut").found() is None
    (tmp_path / "pickle").write_bytes(b"PK\x03\x04" + bytes(100))
    assert told(tmp_path / "pickle").found() is None


def test_a_file_of_unknown_size_and_words_are_left_for_later(tmp_path: Path) -> None:
    kohya(tmp_path / "a")
    assert told(tmp_path / "a", size=0).found() is None
    save_file({"emb_params": torch.ones(2, 96)}, tmp_path / "words")
    assert told(tmp_path / "words").found() is None


def apart(path: Path, target: Path) -> None:
    """The same tensors, those of a layer far from each other."""
    header, data = read_header(path), path.read_bytes()
    entries, body = {}, b""
    for name, info in sorted(header.tensors.items(), key=lambda item: "lora_up" in item[0]):
        part = data[header.data_offset + info.start : header.data_offset + info.stop]
        offsets = [len(body), len(body) + len(part)]
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
        body += part
    text = json.dumps(entries).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_no_more_is_held_than_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kohya(tmp_path / "a")
    largest = max(info.stop - info.start for info in read_header(tmp_path / "a").tensors.values())
    monkeypatch.setattr(module, "HELD_LIMIT", 2 * largest)
    assert told(tmp_path / "a").found() is not None  # side by side: two at a time
    monkeypatch.setattr(module, "HELD_LIMIT", largest)
    apart(tmp_path / "a", tmp_path / "far")
    assert told(tmp_path / "far").found() is None
    monkeypatch.setattr(module, "HELD_LIMIT", largest - 1)
    assert told(tmp_path / "a").found() is None


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_that_is_let_in_is_read_as_safetensors_reads_it(tmp_path: Path, dtype: str) -> None:
    kind = DTYPES[dtype]
    assert kind.itemsize == ITEM_BYTES[dtype]
    factors = random_factors("pocket", seed=1, rank=4)
    write_kohya(tmp_path / "a", factors)
    tensors = {name: (tensor * 20).to(kind) for name, tensor in load_file(tmp_path / "a").items()}
    save_file(tensors, tmp_path / "a")
    found = told(tmp_path / "a").found()
    assert found is not None
    assert {info.dtype for info in found[0].header.tensors.values()} == {dtype}
    assert found[1] == _looked_at(tmp_path / "a", DECLARED)[1] != projection(factors)
