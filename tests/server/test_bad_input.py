"""Bad input: the right status, a line that says what to do, nothing stored, and the server goes on."""

import json
import os
import pickle
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.torch import load_file, save_file

from atelier.client import AtelierError, Client, method, render_request
from atelier.v1 import catalog_pb2, catalog_pb2_grpc, render_pb2, render_pb2_grpc
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving
from tests.server.test_previews import chunk

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


def everything(server: Running) -> tuple[list[str], list[str]]:
    """Names of all assets, and of all files in the data directory."""
    files = sorted(str(p) for p in server.catalog.blobs.incoming.parent.rglob("*") if p.is_file())
    return [v.ref for v in server.catalog.newest(limit=1000)], [
        f for f in files if not f.endswith(("-wal", "-shm"))
    ]


@pytest.fixture
def unharmed(server: Running, client: Client) -> Iterator[None]:
    """Whatever the test does, the catalog holds what it held and renders go on."""
    before = everything(server)
    yield
    assert everything(server) == before
    assert len(list(client.render("a star", seed=1, steps=1).pictures())) == 1


def refused(call: Callable[[], object], code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(AtelierError, match=message) as caught:
        call()
    assert caught.value.code is code, caught.value
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def text_file(path: Path) -> None:
    path.write_text("this is a poem about safetensors")


def truncated(path: Path) -> None:
    write_kohya(path, random_factors("pocket", seed=1, rank=4))
    path.write_bytes(path.read_bytes()[:-100])


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")


def pickled(path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {path}.pwned",)

    path.write_bytes(pickle.dumps(Boom()))


def torch_zip(path: Path) -> None:
    torch.save({"emb_params": torch.zeros(2, 96)}, path)


def misfit(path: Path) -> None:
    down, up = torch.zeros(4, 8, 3, 3), torch.zeros(80, 5, 1, 1)
    save_file({"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}, path)


def nan(path: Path) -> None:
    write_kohya(path, random_factors("pocket", seed=1, rank=4))
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


def foreign(path: Path) -> None:
    few = random_factors("sd1", seed=0, rank=1, where=lambda n: "unet.mid_block" in n and ".attn2." in n)
    write_kohya(path, few, family="sd1")


def checkpoint(path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3)}, path)


@pytest.mark.parametrize(
    ("write", "code", "message"),
    [
        (text_file, INVALID, "not safetensors"),
        (truncated, INVALID, "cut short"),
        (endless_header, INVALID, "the header claims 9223372036854775808 bytes"),
        (pickled, INVALID, "torch pickle, which can run code"),
        (torch_zip, INVALID, "torch pickle, which can run code"),
        (misfit, INVALID, r"the up \[80, 5, 1, 1\] and the down \[4, 8, 3, 3\]"),
        (nan, INVALID, "holds NaN, infinity"),
        (foreign, PRECONDITION, "bad.safetensors is for sd1, not for pocket: 0 of its 4 layers"),
        (checkpoint, INVALID, "this is a whole checkpoint .*; atelier extract makes a LoRA of it"),
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_a_bad_file_is_refused_under_any_name(
    client: Client, tmp_path: Path, write: Callable[[Path], None], code: grpc.StatusCode, message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    write(path)
    refused(lambda: client.check_in(path, name="bad", base="pocket"), code, message)
    assert not Path(f"{path}.pwned").exists()


@pytest.mark.parametrize(
    "name",
    ["", "../x", "x" * 300, "a\x00b", "a\nb", "/etc/passwd", "Hero", "a/b", "-a", "ümlaut", "sha256"],
)
@pytest.mark.usefixtures("unharmed")
def test_a_name_that_is_none_is_refused_everywhere(client: Client, lora: Path, name: str) -> None:
    refused(lambda: client.check_in(lora, name=name), INVALID, "name")
    refused(lambda: client.history(name), INVALID, "name")
    refused(lambda: client.merge({"sha256:" + "0" * 64: 1}, name=name), INVALID, "name")


@pytest.mark.usefixtures("unharmed")
def test_other_bad_check_ins(client: Client, lora: Path) -> None:
    refused(lambda: client.check_in(lora, name="x", base="sd9"), INVALID, "unknown base 'sd9'; known: pocket")
    refused(lambda: client.check_in(lora, name="x", alias="3"), INVALID, "not an alias")
    refused(lambda: client.check_in(lora, name="x", card=b"---\na: &b 1\nc: *b\n---"), INVALID, "alias")
    refused(lambda: client.check_in(lora, name="x", card=b"x" * 300_000), INVALID, "the limit is")
    refused(lambda: client.check_in(lora, name="x", triggers=["a{b}"]), INVALID, "no trigger")


@pytest.mark.usefixtures("unharmed")
def test_what_is_not_there_is_not_found(client: Client, tmp_path: Path) -> None:
    missing = grpc.StatusCode.NOT_FOUND
    refused(lambda: client.get("nobody"), missing, "there is no 'nobody'")
    refused(lambda: client.get("sha256:" + "0" * 64), missing, "there is no 'sha256")
    refused(lambda: client.download("nobody:3", tmp_path / "x"), missing, "there is no")
    assert not list(tmp_path.iterdir())
    refused(lambda: client.set_alias("nobody", "stable", 1), missing, "there is no")
    refused(lambda: client.merge({"nobody": 1}, name="x"), missing, "there is no")
    refused(lambda: list(client.render("a", stack={"nobody": 1})), missing, "there is no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"steps": 100_000}, "steps 100000"),
        ({"width": 63}, "width 63"),
        ({"height": -64}, "height -64"),
        ({"count": 1000}, "count 1000"),
        ({"guidance": float("inf")}, "guidance inf"),
        ({"seed": (1 << 64) - 1}, "seed 18446744073709551615"),
        ({"base": "sdxl"}, "no base 'sdxl'"),
        ({"preview_every": -1}, "preview_every -1"),
        ({"negative_prompt": "\x1b[31m"}, "control character"),
        ({"method": method("svd")}, "a stack holds 1 to 16"),
        ({"method": method("magic"), "stack": {"nobody": 1}}, "unknown method 'magic'; there are naive"),
        ({"method": method("naive", rank=3), "stack": {"nobody": 1}}, "'naive' takes no rank"),
        ({"method": method("svd", rank=0), "stack": {"nobody": 1}}, "rank 0 is not within"),
        ({"method": method("svd", rank=3, energy=0.5), "stack": {"nobody": 1}}, "exclude each other"),
        ({"stack": {"nobody": float("nan")}}, "weight nan"),
        ({"stack": {"nobody": 9.0}}, "weight 9.0 must be"),
        ({"stack": [("nobody", 1.0)] * 17}, "1 to 16 adapters, not 17"),
        ({"stack": {"No Body": 1}}, "is not a name"),
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_a_render_out_of_range_is_refused(client: Client, settings: dict[str, object], message: str) -> None:
    refused(lambda: list(client.render("a star", **settings)), INVALID, message)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30_000, 30_000), "the image's pixels are more than the limit, 50000000"),
        ((30_001, 8), "30001x8 pixels, the limit is 50000000, and 30000 a side"),
        ((64, 64), "damaged"),  # its header promises more than there is
    ],
)
def test_a_picture_with_a_large_or_lying_header_is_refused(
    client: Client, size: tuple[int, int], message: str
) -> None:
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 4))
    with pytest.raises(AtelierError, match=message) as refused:
        list(client.render("a star", image=png + chunk(b"IEND", b""), steps=2))
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(client.render("a star", steps=2).pictures())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a {hero}", "the stack has no adapters"), ("a { star", "a lone '{'"), ("a {} star", "the stack has")],
)
def test_a_prompt_with_odd_braces_is_refused(client: Client, prompt: str, message: str) -> None:
    refused(lambda: list(client.render(prompt)), INVALID, message)
    assert list(client.render("a {{literal}} brace", seed=1, steps=1).pictures())


def test_an_adapter_without_a_trigger_cannot_be_called_by_name(client: Client, lora: Path) -> None:
    client.check_in(lora, name="silent")
    refused(lambda: list(client.render("a {silent}", stack={"silent": 1})), INVALID, "has no trigger word")


def test_merges_that_cannot_be(client: Client, lora: Path, tmp_path: Path, server: Running) -> None:
    client.check_in(lora, name="merge-a")
    foreign(tmp_path / "f")
    client.check_in(tmp_path / "f", name="merge-foreign")
    save_file({"emb_params": torch.zeros(2, 96)}, tmp_path / "w")
    client.check_in(tmp_path / "w", name="merge-words")
    before = everything(server)
    refused(lambda: client.merge({}, name="m"), INVALID, "not 0")
    refused(lambda: client.merge({"merge-a": float("nan")}, name="m"), INVALID, "weight nan")
    mixed = {"merge-a": 1.0, "merge-foreign": 1.0}
    refused(lambda: client.merge(mixed, name="m"), PRECONDITION, "merge-foreign:1 is for sd1, not for pocket")
    words = {"merge-a": 1.0, "merge-words": 1.0}
    refused(lambda: client.merge(words, name="m"), INVALID, "merge-words:1 is a textual inversion")
    taken = grpc.StatusCode.ABORTED
    refused(lambda: client.merge({"merge-a": 1.0}, name="merge-words"), taken, "choose another name")
    one_word_twice = [("merge-words", 1.0), ("merge-words:1", 0.5)]
    refused(lambda: list(client.render("a", stack=one_word_twice)), INVALID, "claim the word")
    assert everything(server) == before


def test_of_two_who_move_an_alias_at_once_one_is_told_it_lost(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    client.check_in(lora, name="race")
    for seed in (2, 3):
        write_kohya(tmp_path / "x", random_factors("pocket", seed=seed, rank=2))
        client.check_in(tmp_path / "x", name="race")
    client.set_alias("race", "stable", 1)

    def move(number: int) -> object:
        try:
            return client.set_alias("race", "stable", number, expected=1).version.number
        except AtelierError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(move, (2, 3)))
    (won,) = [o for o in outcomes if isinstance(o, int)]
    (lost,) = [o for o in outcomes if isinstance(o, AtelierError)]
    assert lost.code is grpc.StatusCode.ABORTED
    assert f"race@stable names race:{won}, not 1 as you thought" in str(lost)
    assert client.set_alias("race", "stable").version.number == won


@pytest.mark.usefixtures("unharmed")
def test_cancel_leaves_nothing(server: Running) -> None:
    gone = threading.Event()

    def parts() -> Iterator[catalog_pb2.CheckInRequest]:
        yield catalog_pb2.CheckInRequest(header=catalog_pb2.CheckInHeader(name="gone"))
        yield catalog_pb2.CheckInRequest(chunk=b"x" * 1000)
        gone.wait(10)

    with grpc.insecure_channel(server.address) as channel:
        call = catalog_pb2_grpc.CatalogServiceStub(channel).CheckIn.future(parts())
        wait_for(lambda: any(server.catalog.blobs.incoming.iterdir()))
        call.cancel()
        gone.set()
    wait_for(lambda: not any(server.catalog.blobs.incoming.iterdir()))


@pytest.mark.usefixtures("unharmed")
def test_check_in_messages_out_of_order_are_refused(server: Running) -> None:
    header = catalog_pb2.CheckInRequest(header=catalog_pb2.CheckInHeader(name="order"))
    chunk = catalog_pb2.CheckInRequest(chunk=b"x")
    with grpc.insecure_channel(server.address) as channel:
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)
        for parts in ([], [chunk], [header, header], [header, catalog_pb2.CheckInRequest()], [header]):
            with pytest.raises(grpc.RpcError) as caught:
                stub.CheckIn(iter(parts))
            assert caught.value.code() is INVALID


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.usefixtures("unharmed")
def test_a_deadline_shorter_than_the_render_ends_it(server: Running) -> None:
    with Client(server.address, timeout=0.3) as hurried:
        late = grpc.StatusCode.DEADLINE_EXCEEDED
        refused(lambda: list(hurried.render("a star", steps=150, count=64)), late, "allow more")
    start = time.monotonic()
    with Client(server.address, timeout=30) as patient:
        list(patient.render("a star", seed=1, steps=1))
    assert time.monotonic() - start < 20


@pytest.mark.usefixtures("unharmed")
def test_a_client_gone_in_mid_render_frees_the_pipeline(server: Running, client: Client) -> None:
    with Client(server.address) as patient:
        rendering = patient.render("a star", steps=150, count=64)
        for event in rendering:
            if event.HasField("step"):
                break
        rendering.cancel()
    (picture,) = client.render("a star", seed=1, steps=1).pictures()
    assert picture.png


def test_a_full_queue_refuses_before_any_work(tmp_path: Path, warm: WarmPipeline) -> None:
    with serving(tmp_path / "data", warm, capacity=2) as small, Client(small.address) as client:
        running = client.render("a star", steps=150, count=64)
        events = iter(running)
        while not next(events).HasField("started"):
            pass
        waiting = [iter(client.render("a star", steps=1)) for _ in range(2)]
        assert [next(told).queued.position for told in waiting] == [1, 2]
        with pytest.raises(AtelierError, match="2 renders are waiting") as caught:
            list(client.render("a star", steps=1))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        running.cancel()


def test_errors_carry_googles_details(server: Running) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = render_pb2_grpc.RenderServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Render(render_request("a", steps=0)))
        status = rpc_status.from_call(caught.value)
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        assert status.details[0].Unpack(info)
        assert status.details[1].Unpack(bad)
        assert (info.reason, info.domain) == ("INVALID_REQUEST", "atelier")
        assert bad.field_violations[0].field == "steps"


@pytest.mark.usefixtures("unharmed")
def test_replays_of_what_was_never_made_here(client: Client, server: Running) -> None:
    refused(lambda: list(client.replay(b"")), INVALID, "this is no PNG; send one that Atelier rendered")
    refused(lambda: list(client.replay(b"\x89PNG\r\n\x1a\n" + b"x" * 100)), INVALID, "this is no PNG")
    rendering = client.render("a star", seed=1, steps=1)
    list(rendering)
    told = rendering.summary.manifest_json[0]
    entry = {"ref": "x:1", "digest": "y", "adapter_config": "", "weight": 1.0, "words": []}
    with grpc.insecure_channel(server.address) as channel:
        stub = render_pb2_grpc.RenderServiceStub(channel)
        for damaged in (
            "",
            "{",
            told.replace('"naive"', '"magic"'),
            told.replace('"naive"', "7"),
            told.replace('"stack": []', '"stack": [{"ref": "x"}]'),
            told.replace('"stack": []', '"stack": [{"ref": "../x", "digest": "y", "weight": 1}]'),
            told.replace('"steps": 1', '"steps": true'),
            told.replace('"torch"', '"\\ud800"'),
            told.replace('"name": "naive"', '"name": "naive", "\\ud800": 1'),
            told.replace('"name": "naive"', f'"name": "orthogonal", "strength": {10**400}'),
            told.replace('"device": "', '"device": "' + "x" * 20_000),
            told + " " * 300_000,
            told.replace('"guidance": 4.0', f'"guidance": {10**400}'),
            told.replace('"guidance": 4.0', '"guidance": NaN'),
            told.replace('"stack": []', f'"stack": [{json.dumps({**entry, "words": 3})}]'),
            told.replace('"stack": []', f'"stack": [{json.dumps({**entry, "weight": float("nan")})}]'),
            told.replace('"stack": []', f'"stack": [{json.dumps({**entry, "digest": 7})}]'),
            told.replace('"steps": 1', '"steps": 1000000'),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Replay(render_pb2.ReplayRequest(manifest_json=damaged)))
            assert caught.value.code() is INVALID, damaged
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Replay(render_pb2.ReplayRequest()))
        assert caught.value.code() is INVALID


@pytest.mark.usefixtures("unharmed")
def test_what_safetensors_alone_refuses_is_refused_too(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"emb_params": torch.zeros(1, 96)}, path, metadata={"note": "abcdef"})
    path.write_bytes(path.read_bytes().replace(b"abcdef", b"\\ud800"))
    refused(lambda: client.check_in(path, name="odd"), INVALID, "safetensors cannot read this file")


@pytest.mark.usefixtures("unharmed")
def test_errors_fit_into_a_reply_whatever_the_script(client: Client, lora: Path) -> None:
    refused(lambda: client.check_in(lora, name="x", base="é" * 3000), INVALID, "unknown base 'é")
    refused(lambda: list(client.render("{" + "é" * 3000 + "}")), INVALID, "the prompt names {é")
    odd = method("🎨" * 3000)
    refused(lambda: list(client.render("a", stack={"nobody": 1}, method=odd)), INVALID, "unknown method '🎨")
    broken = b"---\na: [\nb: }\n---\n"
    refused(lambda: client.check_in(lora, name="x", card=broken), INVALID, "not YAML")


def test_a_prompt_that_grows_beyond_the_limit_is_refused(client: Client, lora: Path) -> None:
    client.check_in(lora, name="grows", triggers=["x" * 200])
    refused(
        lambda: list(client.render("{grows} " * 100, stack={"grows": 1})),
        INVALID,
        "prompt has 20100 characters",
    )


def test_a_merge_nobody_waits_for_is_not_kept(client: Client, tmp_path: Path, server: Running) -> None:
    write_kohya(tmp_path / "a", random_factors("sd1", seed=1, rank=48), family="sd1")
    client.check_in(tmp_path / "a", name="late-a")
    with Client(server.address, timeout=0.05) as hurried, pytest.raises(AtelierError):
        hurried.merge({"late-a": 1.0}, name="late", method=method("svd", rank=40))
    client.merge({"late-a": 0.5}, name="late-b")  # merges take turns: by now the other is over
    assert "late" not in {v.name for v in client.list()}


def test_enospc(tmp_path: Path, warm: WarmPipeline) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=4))
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        client.check_in(tmp_path / "a", name="first")
        connection = running.catalog._db._writer
        (pages,) = connection.execute("pragma page_count").fetchone()
        connection.execute(f"pragma max_page_count={pages}")  # SQLite says "database or disk is full"
        card = b"---\ntags: [" + b"long, " * 4000 + b"end]\n---\n"
        with pytest.raises(AtelierError, match="the server's disk is full; nothing was stored") as caught:
            client.check_in(tmp_path / "a", name="second", card=card)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        connection.execute("pragma max_page_count=1000000")
        assert [version.name for version in client.list()] == ["first"]
        assert client.check_in(tmp_path / "a", name="second", card=card).version.number == 1
