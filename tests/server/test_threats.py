"""The dossier's threats that no other file has, by the names it gives them. The rest: CONTRIBUTING.md."""

import logging
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from atelier.client import AtelierError, Client
from atelier.v1 import catalog_pb2, catalog_pb2_grpc
from compose import formats
from compose.warm import WarmPipeline
from registry import keeping
from registry.catalog import Catalog
from registry.errors import Conflict
from server.auth import Tokens
from tests.conftest import Running, serving

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AtelierError, match=message) as caught:
        call()
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


# 7: NaN or infinity in the weights. (The dossier would keep such a file as `quarantined`; it is refused.)
@pytest.mark.parametrize(
    "kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_nan_is_refused(client: Client, lora: Path, tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {name: tensor.to(kind) for name, tensor in load_file(lora).items()}
    name = sorted(name for name in tensors if name.endswith("up.weight"))[3]
    tensors[name].view(torch.uint8).fill_(0x7F)  # NaN in all of these
    save_file(tensors, tmp_path / "bad")
    refused(lambda: client.check_in(tmp_path / "bad", name="never"), name)


# 8: surprising types.
@pytest.mark.parametrize("kind", [torch.bool, torch.int8, torch.uint8, torch.int16, torch.complex64])
def test_dtype_allowlist(client: Client, lora: Path, tmp_path: Path, kind: torch.dtype) -> None:
    save_file({name: t.to(kind) for name, t in load_file(lora).items()}, tmp_path / "bad")
    refused(lambda: client.check_in(tmp_path / "bad", name="never"), "dtype")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e9])
def test_an_alpha_must_be_a_sound_number(client: Client, lora: Path, tmp_path: Path, alpha: float) -> None:
    tensors = load_file(lora)
    stem = next(iter(tensors)).split(".")[0]
    save_file(tensors | {f"{stem}.alpha": torch.tensor(alpha)}, tmp_path / "bad")
    refused(lambda: client.check_in(tmp_path / "bad", name="never"), "alpha")


def pair(path: Path, up: tuple[int, ...], down: tuple[int, ...]) -> Path:
    """A LoRA of one layer, sparse on the disk: its header alone says how large it is."""
    sizes = [4 * torch.Size(shape).numel() for shape in (down, up)]
    entries = {
        f"{STEM}.lora_down.weight": {"dtype": "F32", "shape": list(down), "data_offsets": [0, sizes[0]]},
        f"{STEM}.lora_up.weight": {"dtype": "F32", "shape": list(up), "data_offsets": [sizes[0], sum(sizes)]},
    }
    header = str(entries).replace("'", '"').encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + sum(sizes))
    return path


# 9: ranks that explode, told from the header.
def test_rank_budget_before_io(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(formats, "_read", read)
    bad = pair(tmp_path / "bad", (64, 65536), (65536, 64))
    refused(lambda: client.check_in(bad, name="never"), "rank 65536 of .* exceeds the limit")
    many = [(f"sha256:{n:064x}", 1.0) for n in range(17)]
    refused(lambda: client.merge(many, name="never"), "a stack holds 1 to 16 adapters, not 17")


# 10: shapes that do not fit each other.
@pytest.mark.parametrize(
    ("up", "down"), [((64, 4), (5, 64)), ((64, 4, 1), (4, 64)), ((64,), (4, 64)), ((4, 64), (64, 4))]
)
def test_pair_shapes(client: Client, tmp_path: Path, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    bad = pair(tmp_path / "bad", up, down)
    with pytest.raises(AtelierError) as caught:
        client.check_in(bad, name="never", base="pocket")
    assert caught.value.code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
    assert str(list(up)) in str(caught.value) or "0 of its 1 layers" in str(caught.value)


# 18: a token in logs, errors, the database or details.
def test_token_never_appears(
    tmp_path: Path,
    warm: WarmPipeline,
    lora: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    data = tmp_path / "data"
    data.mkdir()
    tokens = Tokens(data)
    good, errors = tokens.add("ann", "reader"), []
    with serving(data, warm, tokens=tokens) as running, Client(running.address) as client:
        for canary in (good, "canary-not-a-token"):
            monkeypatch.setenv("ATELIER_TOKEN", canary)
            calls: list[Callable[[], Any]] = [
                lambda: client.check_in(lora, name="hero"),
                lambda: client.get("hero"),
                client.collect_garbage,
                lambda: list(client.render("{x}", steps=1)),
            ]
            for call in calls:
                with pytest.raises(AtelierError) as caught:
                    call()
                errors.append(repr(caught.value))
    written = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    for canary in (good, "canary-not-a-token"):
        assert canary not in caplog.text + "".join(errors)
        assert canary.encode() not in written


# 26: garbage is collected while check-ins are on their way.
def test_gc_race(tmp_path: Path) -> None:
    catalog, kept, stop = Catalog(tmp_path / "data"), 0, threading.Event()
    now = timedelta(0)

    def collect() -> None:
        while not stop.is_set():
            catalog.collect_garbage(retention=now, grace=now)
            stop.wait(0.002)  # every check-in meets a collection, and not each one loses to it

    collector = threading.Thread(target=collect)
    collector.start()
    for number in range(5_000):
        if kept == 100:
            break
        with catalog.blobs.upload() as upload:
            upload.write(b"%d" % (number % 20))  # also bytes that were collected a moment ago
            with suppress(Conflict):  # the collector came between: nothing was acknowledged
                version, _ = catalog.add(
                    upload, name="hero", kind="lora", facts={"n": number}, card=b"%d" % number
                )
                kept += 1
                assert catalog.blobs.verified(version.digest)
                catalog.delete(version.ref)
    stop.set()
    collector.join()
    catalog.close()
    assert kept == 100
    report = keeping.verify(tmp_path / "data")
    assert report.sound, report


@pytest.mark.parametrize(
    "origin",
    [
        "[1]",
        "{",
        '{"a":' * 40 + "1" + "}" * 40,
        '{"a":NaN}',
        '{"a":1e999}',
        '{"a":"\\ud800"}',
        '{"a":"' + "x" * 70_000 + '"}',
    ],
)
def test_an_origin_that_nobody_could_read_back_is_refused(server: Running, lora: Path, origin: str) -> None:
    header = catalog_pb2.CheckInHeader(name="deep-origin", origin_json=origin)
    parts = [catalog_pb2.CheckInRequest(header=header), catalog_pb2.CheckInRequest(chunk=lora.read_bytes())]
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        catalog_pb2_grpc.CatalogServiceStub(channel).CheckIn(iter(parts))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "origin_json must be a JSON object" in caught.value.details()


# 32: a sum of adapters lets its parts be recovered: the method is said wherever the merge is shown.
def test_card_states_method(server: Running, client: Client, lora: Path) -> None:
    client.check_in(lora, name="part")
    client.merge({"part": 0.5}, name="stated")
    assert '"method": "naive"' in client.get("stated").version.recipe_json
