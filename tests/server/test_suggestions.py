"""What an inspection suggests for stacks of every kind, and that it can be done."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atelier.client import AtelierError, Client
from atelier.v1 import compose_pb2, render_pb2
from compose.factors import Factors
from compose.pocket import ADAPTERS
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import serving

Stack = list[tuple[str, object]]


@pytest.fixture(scope="module")
def stocked(warm: WarmPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with characters, styles, and adapters of one kind of layer each, as `advise-…`. Theirs alone:
    a calibration belongs to bytes, whatever others call them.
    """
    folder = tmp_path_factory.mktemp("advise")
    with serving(folder / "data", warm) as running, Client(running.address) as client:
        for name in ("milo", "fungo", "ochreframe"):
            client.check_in(ADAPTERS / f"{name}.safetensors", name=f"advise-{name}")
        kinds = {"text": "text_encoder.", "cross": "attn2", "self": "attn1"}
        for seed, (name, kind) in enumerate(kinds.items(), start=900):
            layers = random_factors("pocket", seed=seed, rank=3, where=lambda n, kind=kind: kind in n)
            write_kohya(folder / name, layers)
            client.check_in(folder / name, name=f"advise-{name}")
        loud = random_factors("pocket", seed=950, rank=3, where=lambda n: "attn2" in n)
        write_kohya(folder / "loud", {n: Factors(3 * f.up, f.down) for n, f in loud.items()})
        client.check_in(folder / "loud", name="advise-loud")
        words = {**load_file(folder / "cross"), "bundle_emb.advisor.string_to_param.*": torch.randn(1, 96)}
        save_file(words, folder / "bundle")
        client.check_in(folder / "bundle", name="advise-bundle")
        linear = "lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        lokr = {f"{linear}.lokr_w1": torch.randn(8, 8) / 10, f"{linear}.lokr_w2": torch.randn(16, 16) / 10}
        save_file(lokr, folder / "lokr")
        client.check_in(folder / "lokr", name="advise-lokr")
        yield running.address


@pytest.fixture
def client(stocked: str) -> Iterator[Client]:
    """A client of that server."""
    with Client(stocked) as client:
        yield client


def advice(
    client: Client, stack: Stack
) -> tuple[compose_pb2.Suggestion, Mapping[tuple[str, int, int], float]]:
    answer = client.inspect(stack)
    heard = {(c.part, c.lives, c.answers): c.loudness for c in answer.crosstalk if c.HasField("loudness")}
    return answer.suggestion, heard


def refs(suggested: compose_pb2.Suggestion) -> list[str]:
    return [one.ref.removeprefix("advise-").removesuffix(":1") for one in suggested.stack]


def done(client: Client, suggested: compose_pb2.Suggestion) -> None:
    """It merges as it is told."""
    stack = [(one.ref, (one.weight, dict(one.parts))) for one in suggested.stack]
    client.merge(stack, name="advised", method=suggested.method)


def test_who_is_drowned_alone_comes_first(stocked: str, client: Client) -> None:
    suggested, heard = advice(client, [("advise-loud", 1.0), ("advise-cross", 1.0)])
    assert heard["", 1, 0] > 2 * heard["", 0, 1]
    assert (suggested.method.name, refs(suggested)) == ("orthogonal", ["cross", "loud"])
    assert (
        f"advise-loud:1 answers {heard['', 1, 0]:.2f} times as loudly as advise-cross:1" in suggested.reason
    )
    assert [(one.weight, dict(one.parts)) for one in suggested.stack] == [(1.0, {}), (1.0, {})]
    done(client, suggested)


def test_who_is_out_of_proportion_in_one_part_is_brought_in_line_there(stocked: str, client: Client) -> None:
    loud = {"up_blocks.0": 4.0}
    suggested, heard = advice(client, [("advise-milo", 1.0), ("advise-ochreframe", (1.0, loud))])
    (strong,) = (one for one in suggested.stack if "ochre" in one.ref)
    assert 0 < strong.parts["unet.up_blocks.0"] < 0.5
    assert "advise-ochreframe:1 less in unet.up_blocks.0, where it answers" in suggested.reason
    plain, _ = advice(client, [("advise-milo", 1.0), ("advise-ochreframe", 1.0)])
    assert not any(one.parts for one in plain.stack)
    _, after = advice(client, [("advise-milo", 1.0), ("advise-ochreframe", (1.0, dict(strong.parts)))])
    assert after["unet.up_blocks.0 attn2", 0, 1] < 0.5 * heard["unet.up_blocks.0 attn2", 0, 1]
    done(client, suggested)
    strong = [("advise-milo", 1.0), ("advise-ochreframe", (1.0, loud))]
    tried: list[render_pb2.Trial] = []
    client.tune(strong, pictures=1, steps=1, prompts=["a milo"], tried=tried.append)  # looks at it, too
    assert [t.method.name for t in tried].count(suggested.method.name) >= 2
    assert list(tried[-1].stack) == list(suggested.stack)
    assert list(tried[0].stack) != list(suggested.stack)


def test_two_that_drown_each_other_alike_both_make_room(stocked: str, client: Client) -> None:
    suggested, heard = advice(client, [("advise-milo", 1.0), ("advise-ochreframe", 1.0)])
    loud = sorted((heard["", 0, 1], heard["", 1, 0]))
    assert 0.5 < loud[0] <= loud[1] < 2 * loud[0]
    assert suggested.method.name == "tsv"
    done(client, suggested)


def test_those_who_never_meet_are_summed(stocked: str, client: Client) -> None:
    suggested, _ = advice(client, [("advise-text", 1.0), ("advise-cross", 0.7), ("advise-lokr", 1.0)])
    assert (suggested.method.name, refs(suggested)) == ("naive", ["text", "cross", "lokr"])
    assert [one.weight for one in suggested.stack] == [1.0, 0.7, 1.0]
    assert "nobody is heard more than 0.00 times" in suggested.reason
    done(client, suggested)


def test_a_twin_is_left_out_and_an_opposite_is_not_kept_apart(stocked: str, client: Client) -> None:
    answer = client.inspect([("advise-cross", 1.0), ("advise-self", 1.0), ("advise-cross", 0.5)])
    assert answer.findings[0].startswith("advise-cross:1 and advise-cross:1 add up as one voice")
    assert [(one.ref, one.weight) for one in answer.suggestion.stack] == [
        ("advise-cross:1", 1.0),
        ("advise-self:1", 1.0),
        ("advise-cross:1", 0.0),
    ]
    assert "one and the same" in answer.suggestion.reason
    done(client, answer.suggestion)
    answer = client.inspect([("advise-cross", 1.0), ("advise-cross", -1.0)])
    assert answer.coherence == pytest.approx(0.0, abs=1e-6)
    assert answer.findings[0].endswith("take each other back (cosine -1.00): leave both out")
    assert not any("drowns" in finding for finding in answer.findings)
    assert answer.suggestion.method.name == "naive"
    only, _ = advice(client, [("advise-cross", 0.0), ("advise-self", 1.0)])
    assert only.method.name == "naive"
    assert only.reason.startswith("nobody else speaks beside advise-self:1")
    nobody, _ = advice(client, [("advise-cross", 0.0), ("advise-self", 0.0)])
    assert nobody.reason.startswith("nobody changes anything")


def test_five_adapters_and_a_saved_stack_are_put_in_order_once_each(stocked: str, client: Client) -> None:
    names = ("milo", "fungo", "ochreframe", "loud", "self")
    suggested, heard = advice(client, [(f"advise-{name}", 1.0) for name in names])
    assert sorted(refs(suggested)) == sorted(names)
    drowned = [max(heard.get(("", i, j), 0.0) for j in range(5) if i != j) for i in range(5)]
    order = sorted(range(5), key=lambda i: -drowned[i])
    assert refs(suggested) == [names[i] for i in order]
    done(client, suggested)
    client.save_stack([("advise-loud", 1.0), ("advise-cross", 0.5)], name="advise-kept")
    inside, _ = advice(client, [("advise-kept", 1.0), ("advise-self", 1.0)])
    assert refs(inside)[:2] == ["cross", "loud"]
    done(client, inside)


def test_what_can_only_be_rendered_says_so(stocked: str, client: Client) -> None:
    suggested, _ = advice(client, [("advise-bundle", 1.0), ("advise-loud", 1.0)])
    assert "brings the words advisor along" in suggested.unmergeable
    with pytest.raises(AtelierError, match="brings the words advisor along"):
        done(client, suggested)
    stack = [(one.ref, (one.weight, dict(one.parts))) for one in suggested.stack]
    assert list(client.render("a star", stack=stack, method=suggested.method, steps=1, seed=1).pictures())
    tuned = client.tune(
        [("advise-bundle", 1.0), ("advise-loud", 1.0)], pictures=1, steps=1, prompts=["a star"]
    )
    assert tuned.unmergeable == suggested.unmergeable
    assert client.tune({"advise-loud": 1.0}, pictures=1, steps=1, prompts=["a star"]).unmergeable == ""


@pytest.mark.parametrize(
    "stack", [{"one": 1.0}, {"one": 1.0, "two": 1.0}, {"one": 1.0, "two": 0.0}, [("one", 1.0), ("one", 0.5)]]
)
def test_no_trial_is_rendered_twice(
    stack: dict[str, float] | list[tuple[str, float]], warm: WarmPipeline, tmp_path: Path
) -> None:
    """Shares of weights meet: 1.25 times 0.8 is 1, and every share of 0 is 0."""
    tried: list[render_pb2.Trial] = []
    with serving(tmp_path / "data", warm) as running, Client(running.address, timeout=240) as client:
        for seed, name in enumerate(("one", "two")):
            write_kohya(tmp_path / name, random_factors("pocket", seed=seed, rank=2))
            client.check_in(tmp_path / name, name=name, triggers=[name])
        before = running.queue.status().done
        summary = client.tune(stack, pictures=1, steps=1, weights=True, tried=tried.append)
        rendered = running.queue.status().done - before - 1 - len(stack)  # the bare base, and each alone
    told = []
    for trial in tried:
        refs = [(one.ref, one.weight, *one.parts.items()) for one in trial.stack]
        in_order = trial.method.name in {"orthogonal", "activation"}
        told.append((trial.method.SerializeToString(), tuple(refs if in_order else sorted(refs))))
    assert rendered == len(set(told))
    shares = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)  # a curve is whole, whatever of it was rendered before
    for climb in summary.climbs:
        whole = [w for _, w in (stack.items() if isinstance(stack, dict) else stack)][climb.place] or 1.0
        assert list(climb.weights) == pytest.approx([whole * s for s in shares[: len(climb.weights)]])


def test_every_layer_is_told_where_it_is_asked_for_and_sums_to_its_part(stocked: str, client: Client) -> None:
    stack = {"advise-milo": 1.0, "advise-ochreframe": 0.8}
    answer = client.inspect(stack, layers=True)
    short = client.inspect(stack)
    assert (len(short.layers), len(short.layer_crosstalk)) == (0, 0)
    overall = answer.parts[0]
    assert overall.part == ""
    assert list(overall.norms) == [one.norm for one in answer.adapters]
    assert list(overall.relative) == pytest.approx([one.relative for one in answer.adapters])
    assert overall.coherence == answer.coherence
    for place in range(2):
        for told in (answer.parts[1:], answer.layers):
            norm = math.sqrt(sum(part.norms[place] ** 2 for part in told))
            assert norm == pytest.approx(overall.norms[place])
    assert len(answer.layer_crosstalk) == 2 * len(answer.layers) == 2 * 64
    loudness = [told.loudness for told in answer.layer_crosstalk]
    assert loudness == sorted(loudness, reverse=True)
    assert all(told.in_weights > 0 for told in answer.crosstalk if not told.part)


def test_more_meetings_than_an_answer_holds_are_refused(
    stocked: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.inspection.MEETINGS_LIMIT", 100)
    stack = {"advise-milo": 1.0, "advise-ochreframe": 0.8}
    with pytest.raises(AtelierError, match="meet 128 times in single layers, and 100 can be told"):
        client.inspect(stack, layers=True)
    assert client.inspect(stack).parts
