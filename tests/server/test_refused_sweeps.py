"""Sweeps that cannot be: refused before any cell, each field by name."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from atelier.client import AtelierError, Client, axis, method
from atelier.sweeps import Cell, sweep_request
from atelier.v1 import render_pb2, sweep_pb2, sweep_pb2_grpc
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running
from tests.server.test_sweeps import BOTH, FRAME, FUNGO, PROMPT, stock


@pytest.fixture(autouse=True)
def studio(client: Client) -> None:
    stock(client)


Change = Callable[[sweep_pb2.SweepRequest], None]
WEIGHTS = axis("weight", 0.5, 1, of=FUNGO)


def axes(*found: sweep_pb2.Axis) -> Change:
    def change(request: sweep_pb2.SweepRequest) -> None:
        del request.axes[:]
        request.axes.extend(found)

    return change


def common(**told: object) -> Change:
    return lambda request: request.common.MergeFrom(render_pb2.RenderRequest(**told))


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (axes(), "axes", "1 or 2 axes, not 0: say what varies"),
        (axes(WEIGHTS, axis("seed", 1), axis("steps", 1)), "axes", "1 or 2 axes, not 3"),
        (axes(sweep_pb2.Axis()), "axes[0]", "does not say what varies"),
        (
            axes(axis("weight", 1, of="nobody")),
            "axes[0].weight.adapter",
            f"'nobody' is not in the stack, which has {FUNGO}, {FRAME}; add it there",
        ),
        (
            axes(WEIGHTS, axis("weight", 2, of=f"{FUNGO}:1")),
            "axes[1]",
            f"both axes vary the weight of {FUNGO}",
        ),
        (
            axes(*[axis("weight", 1, 2, of=FUNGO, part="unet")] * 2),
            "axes[1]",
            f"both axes vary the weight of {FUNGO} in unet",
        ),
        (
            axes(axis("weight", 1, 9, of=FUNGO, part="unet")),
            "axes[0].weight.values[1]",
            "weight 9.0 of unet must be a number within",
        ),
        (axes(axis("weight", 1, of=FUNGO, part="a b")), "axes[0].weight.values[0]", "'a b' names no part"),
        (
            axes(axis("weight", 1, of=FUNGO, part="txt")),
            "axes[0].weight.values",
            f"{FUNGO}:1 changes no layer in 'txt'; it changes",
        ),
        (axes(axis("seed", 1), axis("seed", 2)), "axes[1]", "both axes vary the seed; let one of them"),
        (axes(axis("seed", count=100), axis("steps", 1, 2, 3)), "axes", "300 cells, the limit is 256"),
        (axes(axis("seed", count=1 << 30)), "axes", "the limit is 256; leave some values out"),
        (axes(axis("seed", count=-1)), "axes[0].seed.count", "give seeds, or how many"),
        (axes(axis("seed", 1, count=2)), "axes[0].seed.count", "give seeds, or how many"),
        (
            axes(axis("weight", 1, 9, of=FUNGO)),
            "axes[0].weight.values[1]",
            "weight 9.0 must be a number within",
        ),
        (axes(axis("weight", float("nan"), of=FUNGO)), "axes[0].weight.values[0]", "weight nan must be"),
        (axes(axis("weight", float("-inf"), of=FUNGO)), "axes[0].weight.values[0]", "weight -inf must be"),
        (axes(axis("weight", 1, 1, of=FUNGO)), "axes[0].weight.values", "twice; leave one out"),
        (
            axes(axis("method", "naive", "bogus")),
            "axes[0].method.values[1]",
            "unknown method 'bogus'; there are",
        ),
        (axes(axis("method", method("tsv", mu=1))), "axes[0].method.values[0]", "'tsv' takes no mu"),
        (axes(axis("weight", of=FUNGO)), "axes[0].weight.values", "is empty; give at least one"),
        (axes(axis("seed")), "axes[0].seed.values", "is empty"),
        (axes(axis("version", of=FUNGO)), "axes[0].version.refs", "is empty"),
        (
            axes(axis("version", FRAME, of=FUNGO)),
            "axes[0].version.refs[0]",
            f"{FRAME}:1 is no version of {FUNGO}",
        ),
        (axes(axis("version", f"{FUNGO}:9", of=FUNGO)), "", f"{FUNGO}:9"),
        (axes(axis("version", "../x", of=FUNGO)), "axes[0].version.refs[0]", "axes[0].version.refs[0]: "),
        (axes(axis("prompt", "a", "b\x1b[2J")), "axes[0].prompt.values[1]", "the control character"),
        (axes(axis("prompt", "x" * 5000)), "axes[0].prompt.values[0]", "5000 characters, the limit is 4096"),
        (axes(axis("prompt", "a {nobody}")), "axes[0].prompt.values[0]", "the prompt names {nobody}"),
        (axes(axis("guidance", 1, 99)), "axes[0].guidance.values[1]", "guidance 99.0 is not within 0 and 50"),
        (axes(axis("guidance", float("nan"))), "axes[0].guidance.values[0]", "guidance nan"),
        (axes(axis("steps", 0)), "axes[0].steps.values[0]", "steps 0 is not within 1 and 150"),
        (
            axes(axis("seed", (1 << 64) - 1)),
            "axes[0].seed.values[0]",
            "is not within 0 and 9223372036854775744",
        ),
        (
            lambda r: [axes(axis("seed", count=2))(r), common(seed=(1 << 64) - 1)(r)],
            "axes[0].seed.count",
            "2 seeds from 18446744073709551615 on go beyond",
        ),
        (common(count=2), "common.count", "common.count 2 is not for a sweep"),
        (common(count=0), "common.count", "count 0 is not within 1 and 64"),
        (common(batch=4), "common.batch", "is not for a sweep"),
        (common(preview_every=1), "common.preview_every", "is not for a sweep"),
        (common(request_id="x"), "common.request_id", "is not for a sweep"),
        (common(width=65), "common.width", "width 65 must be a multiple"),
        (common(base="sdxl"), "common.base", "this server has no base 'sdxl'"),
        (common(stack=[{"ref": "nobody-at-all"}]), "", "there is no 'nobody-at-all'"),
        (common(stack=[{"ref": FUNGO}] * 16), "common.stack", "1 to 16 adapters, not 18"),
        (common(stack=[{"ref": FUNGO}]), "axes[0].weight.adapter", "2 times in the stack"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_any_cell(
    server: Running, change: Change, field: str, message: str
) -> None:
    request = sweep_request(PROMPT, [WEIGHTS], stack=BOTH, steps=1)
    change(request)
    seen = []
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        seen.extend(sweep_pb2_grpc.SweepServiceStub(channel).Sweep(request))
    assert seen == []
    assert message in caught.value.details()
    code = caught.value.code()
    assert code is (grpc.StatusCode.INVALID_ARGUMENT if field else grpc.StatusCode.NOT_FOUND)
    if field:
        bad = error_details_pb2.BadRequest()
        assert rpc_status.from_call(caught.value).details[1].Unpack(bad)
        assert bad.field_violations[0].field == field


def test_what_cannot_be_composed_is_refused_before_any_cell(client: Client, tmp_path: Path) -> None:
    few = random_factors("sd1", seed=0, rank=1, where=lambda n: "unet.mid_block" in n and ".attn2." in n)
    write_kohya(tmp_path / "a", random_factors("pocket", seed=88, rank=1))
    write_kohya(tmp_path / "b", few, family="sd1")
    for name in "ab":
        client.check_in(tmp_path / name, name="sweep-mixed")
    seen: list[Cell] = []
    versions = axis("version", "sweep-mixed:1", "sweep-mixed:2", of="sweep-mixed")
    with pytest.raises(AtelierError, match="sweep-mixed:2 is for sd1, and this server has no base of that"):
        client.sweep("a star", stack={"sweep-mixed": 1.0}, axes=[versions], steps=1, seen=seen.append)
    parts = {FUNGO: (1.0, {"text_encoder": 4.0})}
    with pytest.raises(AtelierError, match="beyond 8"):
        client.sweep(
            PROMPT, stack=parts | {FRAME: 1.0}, axes=[axis("weight", 1, 3, of=FUNGO)], seen=seen.append
        )
    assert seen == []


def test_an_axis_that_is_none_is_refused_before_it_is_sent() -> None:
    for call, message in (
        (lambda: axis("colour", 1), "nothing varies by 'colour'; there are weight"),
        (lambda: axis("weight", 1), "say of which adapter"),
        (lambda: axis("seed", 1, of=FUNGO), "is not of one adapter"),
        (lambda: axis("steps", count=2), "is not counted"),
        (lambda: axis("seed", 1, part="unet"), "only a weight varies in a part"),
        (lambda: axis("steps", "many"), "steps: "),
    ):
        with pytest.raises(ValueError, match=message):
            call()
