"""Calibration, inspection and weights by part over gRPC."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from atelier.client import AtelierError, Client
from atelier.console import pair
from atelier.messages import method
from atelier.v1 import render_pb2
from compose.pocket import ADAPTERS
from compose.pocket.calibrate import shipped
from tests.adapters import random_factors, write_kohya
from tests.conftest import DEVICE, Running


@pytest.fixture(scope="module")
def stocked(server: Running) -> str:
    """The server's address, with two characters and a style in its catalog."""
    with Client(server.address) as client:
        for name, asset in (("milo", "cast-milo"), ("fungo", "cast-fungo"), ("ochreframe", "cast-frame")):
            client.check_in(
                ADAPTERS / f"{name}.safetensors", name=asset, card=(ADAPTERS / f"{name}.md").read_bytes()
            )
    return server.address


def refused(call: object, code: grpc.StatusCode, part: str) -> None:
    with pytest.raises(AtelierError, match=part) as caught:
        call()  # type: ignore[operator]
    assert caught.value.code is code, caught.value


def test_the_demo_adapters_are_calibrated_where_they_are_checked_in_and_can_be_measured_anew(
    stocked: str, client: Client
) -> None:
    shipped = client.calibrate("cast-milo")
    assert (shipped.known, shipped.base, list(shipped.prompts)) == (True, "pocket", [])
    seen: list[tuple[int, int]] = []
    fresh = client.calibrate(
        "cast-milo", again=True, pictures=2, steps=2, progress=lambda done, total: seen.append((done, total))
    )
    assert not fresh.known
    assert fresh.digest != shipped.digest
    assert fresh.inputs == shipped.inputs > 20
    assert len(fresh.prompts) == 2
    assert all("milo" in prompt for prompt in fresh.prompts)
    assert seen[-1] == (4, 4)
    told = client.calibrate("cast-milo", prompts=["a {cast-milo} on a red background"], pictures=2, steps=2)
    assert list(told.prompts) == ["a milo on a red background"]
    assert client.calibrate("cast-milo").digest == told.digest  # kept


def test_a_merge_that_nobody_could_read_is_not_kept(client: Client, tmp_path: Path) -> None:
    for seed in (1, 2):
        wide = random_factors(
            "pocket", seed=seed, rank=600, where=lambda name: name.endswith("layers.0.mlp.fc1")
        )
        write_kohya(tmp_path / f"{seed}", wide)
        client.check_in(tmp_path / f"{seed}", name=f"wide-{seed}")
    stack = {"wide-1": 1.0, "wide-2": 1.0}
    refused(
        lambda: client.merge(stack, name="wide-sum"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "the merge has rank 1200, and a file's limit is 1024: .*--method svd --rank",
    )
    refused(lambda: client.get("wide-sum"), grpc.StatusCode.NOT_FOUND, "no 'wide-sum'")
    client.merge(stack, name="wide-cut", method=method("svd", rank=1024))
    client.save_as("wide-cut", "diffusers")


def test_a_merge_by_activations_keeps_the_first_and_names_its_calibrations(
    stocked: str, client: Client
) -> None:
    stack = {"cast-fungo": 1.0, "cast-frame": 1.0}
    merged = client.merge(stack, name="cast-both", method=method("activation", mu=2))
    assert [m.ref for m in merged.members] == ["cast-fungo:1", "cast-frame:1"]
    assert merged.members[0].kept == 1.0
    assert merged.members[1].kept != 1.0
    recipe = merged.version.recipe_json
    assert recipe.count('"moments": "sha256:') == 2
    picture = next(
        client.render("a fungo", stack=stack, method=method("activation"), steps=2, seed=1).pictures()
    )
    replayed = client.replay(picture.png)
    again = next(replayed.pictures())
    assert list(replayed.summary.differences) == []
    assert Image.open(io.BytesIO(again.png)).tobytes() == Image.open(io.BytesIO(picture.png)).tobytes()


def test_what_is_not_calibrated_says_how_to_calibrate_it(stocked: str, client: Client, lora: Path) -> None:
    client.check_in(lora, name="cast-plain")
    refused(
        lambda: client.merge({"cast-milo": 1, "cast-plain": 1}, name="x", method=method("regmean")),
        grpc.StatusCode.FAILED_PRECONDITION,
        r"cast-plain:1 has none on pocket: atelier calibrate cast-plain:1",
    )
    silent = {"cast-milo": 1.0, "cast-plain": 0.0, "cast-fungo": 0.5}
    without = {name: weight for name, weight in silent.items() if weight}
    made = [client.merge(told, name="silent", method=method("activation")) for told in (silent, without)]
    assert made[0].version.digest == made[1].version.digest


def test_parts_are_weighed_in_merges_renders_and_saved_stacks(stocked: str, client: Client) -> None:
    half = {"cast-milo": 1.0, "cast-frame": (1.0, {"text_encoder": 0.0, "up_blocks": 0.5})}
    merged = client.merge(half, name="cast-parts")
    assert dict(merged.members[1].parts) == {"text_encoder": 0.0, "up_blocks": 0.5}
    assert '"parts": {"text_encoder": 0.0, "up_blocks": 0.5}' in merged.version.recipe_json
    baked, live, whole = (
        next(client.render("a milo", stack=stack, steps=2, seed=1).pictures()).png
        for stack in ({"cast-parts": 1.0}, half, {"cast-milo": 1.0, "cast-frame": 1.0})
    )
    pixels = [np.asarray(Image.open(io.BytesIO(png))) for png in (baked, live, whole)]
    off = [abs(other.astype(int) - pixels[1]).max() for other in (pixels[0], pixels[2])]
    assert off[0] <= (0 if DEVICE == "cpu" else 1) < off[1]  # on a GPU to rounding
    saved = client.save_stack(half, name="cast-saved")
    kept = next(client.render("a milo", stack={"cast-saved": 1.0}, steps=2, seed=1).pictures()).png
    assert saved.created
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept))), pixels[1])


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ((1.0, {"up_block": 0.5}), r"cast-milo:1 changes no layer in 'up_block'; it changes text_encoder"),
        ((1.0, {"text encoder": 0.5}), "names no part of a base"),
        ((1.0, {"text_encoder": float("inf")}), "weight inf of text_encoder must be a number within"),
        ((1.0, {"text_encoder": 9.0}), "weight 9.0 of text_encoder"),
    ],
)
def test_a_wrong_part_is_named(
    stocked: str, client: Client, weight: tuple[float, dict[str, float]], part: str
) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    refused(lambda: client.merge({"cast-milo": weight}, name="x"), invalid, part)
    refused(lambda: list(client.render("a", stack={"cast-milo": weight}, steps=1).pictures()), invalid, part)


def test_words_and_saved_stacks_have_no_parts(stocked: str, client: Client) -> None:
    client.check_in(ADAPTERS / "tealish.safetensors", name="cast-word")
    client.save_stack({"cast-milo": 1.0}, name="cast-inner")
    for ref, said in (("cast-word", "it has words and no parts"), ("cast-inner", "give its members weights")):
        refused(
            lambda ref=ref: client.save_stack({ref: (1.0, {"unet": 0.5})}, name="x"),
            grpc.StatusCode.INVALID_ARGUMENT,
            said,
        )


def test_an_inspection_says_who_drowns_whom_and_where(stocked: str, client: Client, lora: Path) -> None:
    answer = client.inspect({"cast-fungo": 1.0, "cast-frame": 2.0}, picture=True)
    assert [a.ref for a in answer.adapters] == ["cast-fungo:1", "cast-frame:1"]
    assert all(a.calibrated and a.relative > 0 for a in answer.adapters)
    overall = {(told.lives, told.answers): told.loudness for told in answer.crosstalk if not told.part}
    assert overall.keys() == {(0, 1), (1, 0)}
    single = client.inspect({"cast-fungo": 1.0, "cast-frame": 1.0})
    (plain,) = (told.loudness for told in single.crosstalk if not told.part and told.lives == 0)
    assert overall[0, 1] == pytest.approx(2 * plain, rel=1e-6)  # twice the weight, twice as loud
    assert "cast-frame:1 drowns cast-fungo:1" in answer.findings[0]
    assert any(told.part == "text_encoder" for told in answer.crosstalk)
    assert Image.open(io.BytesIO(answer.picture)).width > 200
    assert not single.picture
    loud = client.inspect({"cast-fungo": 1.0, "cast-frame": (2.0, {"attn1": 0.9})})
    ref, (weight, parts) = pair(loud.findings[0].rsplit(": ", 1)[1])  # what to do, as it would be typed
    assert (ref, weight, parts.pop("attn1"), list(parts.values())) == ("cast-frame:1", 2.0, 0.9, [0.5])
    parts["attn1"] = 0.9
    softer = client.inspect({"cast-fungo": 1.0, ref: (weight, parts)})
    heard = [
        next(told.loudness for told in answer.crosstalk if (told.part, told.lives) == ("", 0))
        for answer in (loud, softer)
    ]
    assert heard[1] < heard[0]
    quiet = client.inspect({"cast-fungo": (1.0, {"unet": 0.0}), "cast-frame": (1.0, {"text_encoder": 0.0})})
    apart = {(t.lives, t.answers): t.loudness for t in quiet.crosstalk if t.part == "text_encoder"}
    assert apart == {(0, 1): 0.0, (1, 0): 0.0}
    client.check_in(lora, name="cast-bare")
    assert "not calibrated: cast-bare:1" in client.inspect({"cast-bare": 1, "cast-milo": 1}).findings[-1]


def test_who_weighs_nothing_is_not_said_to_get_on_with_the_others(stocked: str, client: Client) -> None:
    (said,) = client.inspect({"cast-milo": 0, "cast-frame": 1}).findings
    assert said == "cast-milo:1 changes nothing at weight 0: as if it were not there"


def test_wrong_calibrations_and_inspections_are_refused(stocked: str, client: Client, lora: Path) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    client.check_in(lora, name="cast-mute")
    client.check_in(ADAPTERS / "rosy.safetensors", name="cast-rosy", triggers=["<rosy>"])
    refused(lambda: client.calibrate("cast-milo", pictures=65), invalid, "pictures 65 is not within 1 and 64")
    refused(lambda: client.calibrate("cast-milo", steps=0, again=True), invalid, "steps 0")
    refused(lambda: client.calibrate("cast-milo", prompts=["{nobody}"]), invalid, "names {nobody}")
    refused(lambda: client.calibrate("cast-milo", prompts=["x" * 5000]), invalid, "5000 characters")
    refused(lambda: client.calibrate("cast-mute"), invalid, "has no trigger word; give prompts")
    refused(lambda: client.calibrate("cast-rosy"), invalid, "is no LoRA")
    refused(lambda: client.calibrate("nobody"), grpc.StatusCode.NOT_FOUND, "there is no")
    refused(lambda: client.inspect({"cast-milo": 1}), invalid, "2 adapters or more")
    refused(lambda: client.inspect({"cast-milo": 1, "cast-rosy": 1}), invalid, "is a textual inversion")


def test_a_merge_is_made_again_to_the_byte_from_its_recipe(
    server: Running, stocked: str, client: Client
) -> None:
    stack = {"cast-fungo": 1.0, "cast-frame": (0.8, {"text_encoder": 0.5}), "cast-milo": -0.2}
    for name, how in (
        ("svd", {"rank": 6}),
        ("activation", {"mu": 2.0}),
        ("dare-ties", {"seed": 3, "rank": 4}),
    ):
        client.merge(stack, name=f"again-{name}", method=method(name, **how))
        answer = client.remake(f"again-{name}")
        assert (answer.same, list(answer.differences)) == (True, [])
        assert answer.digest == answer.version.digest
    before = len(list(client.history("cast-milo")))
    client.calibrate("cast-fungo", again=True, pictures=2, steps=2)
    parents = json.loads(client.get("again-activation").version.recipe_json)["parents"]
    digest, then = next((p["digest"], p["moments"]) for p in parents if p["ref"] == "cast-fungo:1")
    measured = {"kind": "moments", "digest": digest, "of": f"{server.engine.info.base.digest} {then}"}
    kept = server.catalog.derived.read(**measured)
    server.catalog.derived.write(**measured, data=b"lost")
    changed = client.remake("again-activation")
    assert (changed.same, list(changed.differences)) == (False, ["cast-fungo:1 was calibrated otherwise"])
    server.catalog.derived.write(**measured, data=kept)
    still = client.remake("again-activation")  # by what was measured then
    assert (still.same, list(still.differences)) == (True, [])
    anew = client.merge(stack, name="anew", method=method("activation", mu=2.0)).version
    assert anew.digest == changed.digest != still.digest
    assert len(list(client.history("cast-milo"))) == before
    version = client.get("again-svd").version
    threads = {"threads": torch.get_num_threads()} if DEVICE == "cpu" else {}
    assert json.loads(version.recipe_json)["made_with"].items() >= threads.items()
    with pytest.raises(AtelierError, match="cast-milo:1 was not made by a merge"):
        client.remake("cast-milo")


def test_whatever_the_method_the_recipe_tells_how_the_adapters_got_on(
    stocked: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = {"cast-milo": 1.0, "cast-frame": (0.8, {"text_encoder": 0.5})}
    told = client.inspect(stack)
    for how in (method("naive"), method("svd", rank=4), method("activation")):
        version = client.merge(stack, name=f"met-{how.name}", method=how).version
        met = json.loads(version.recipe_json)["interference"]
        assert met["norm"] == [pytest.approx(one.norm, rel=1e-3) for one in told.adapters]
        assert met["relative"] == [pytest.approx(one.relative, rel=1e-3) for one in told.adapters]
        assert met["calibrated"] == [one.calibrated for one in told.adapters]
        for each in told.crosstalk[:2]:
            assert each.part == ""
            assert met["crosstalk"][each.lives][each.answers] == pytest.approx(each.loudness, rel=1e-3)
            assert met["cosine"][each.lives][each.answers] == pytest.approx(each.cosine, rel=1e-3)
        assert met["coherence"] == pytest.approx(told.coherence, rel=1e-3)
        assert met["findings"] == list(told.findings)
        assert met["apart"] == [pytest.approx(one.apart, rel=1e-3) for one in told.adapters]
        assert met["suggestion"]["reason"] == told.suggestion.reason
        assert met["suggestion"]["method"] == told.suggestion.method.name
        assert client.remake(f"met-{how.name}").same
    alone = client.merge({"cast-milo": 0.5}, name="met-nobody").version
    assert "interference" not in json.loads(alone.recipe_json)
    silent = client.merge({"cast-milo": 0.0, "cast-frame": 1.0}, name="met-silence").version
    assert json.loads(silent.recipe_json)["interference"]["crosstalk"] == [[1.0, 0.0], [0.0, 1.0]]
    monkeypatch.setattr("server.inspection.RECORDED_BYTES", 1)
    large = client.merge(stack, name="met-large", method=method("naive")).version
    assert "atelier inspect" in json.loads(large.recipe_json)["interference"]["left_out"]


def test_a_resized_adapter_has_the_rank_it_needs_and_tells_the_error(stocked: str, client: Client) -> None:
    whole = client.get("cast-milo").version
    small = client.merge({"cast-milo": 1.0}, name="small", method=method("svd", rank=2))
    assert (small.version.rank, whole.rank) == (2, 4)
    assert 0 < small.truncation_error < 1
    loose = client.merge({"cast-milo": 1.0}, name="loose", method=method("svd", ratio=3))
    tight = client.merge({"cast-milo": 1.0}, name="tight", method=method("svd", ratio=1e6))
    assert loose.truncation_error > tight.truncation_error
    refused(
        lambda: client.merge({"cast-milo": 1.0}, name="x", method=method("svd", ratio=0.5)),
        grpc.StatusCode.INVALID_ARGUMENT,
        r"ratio 0.5 is not within \[1, 1e\+06\]",
    )


def test_a_tuning_tries_methods_orders_and_weights_and_shows_the_pictures(
    stocked: str, client: Client
) -> None:
    tried: list[render_pb2.Trial] = []
    stack = {"cast-fungo": 1.0, "cast-frame": 1.0}
    with Client(stocked, timeout=240) as patient:
        summary = patient.tune(stack, pictures=2, steps=2, weights=True, tried=tried.append)
    methods = {told.method.name for told in tried}
    assert {"naive", "tsv", "magnitude-prune", "orthogonal", "activation"} == methods
    orders = {tuple(ref.ref for ref in told.stack) for told in tried if told.method.name == "orthogonal"}
    assert orders == {("cast-fungo:1", "cast-frame:1"), ("cast-frame:1", "cast-fungo:1")}
    assert {0.8, 0.9, 1.0, 1.1, 1.25} <= {ref.weight for told in tried for ref in told.stack}
    assert summary.best.value == max(told.value for told in tried)
    assert summary.naive.method.name == "naive"
    assert all(0 <= share <= 1 for told in tried for share in (*told.retention, told.value))
    assert summary.scorer == "judge"
    assert len(summary.prompts) == 2
    assert all("fungo" in prompt and "in the style of ochreframe" in prompt for prompt in summary.prompts)
    assert Image.open(io.BytesIO(summary.picture)).height > 300


def test_what_no_judge_knows_is_scored_by_its_effect(stocked: str, client: Client, lora: Path) -> None:
    client.check_in(lora, name="cast-odd", triggers=["oddity"])
    alone = client.tune({"cast-odd": 1.0}, pictures=2, steps=2)
    assert (alone.scorer, alone.best.method.name) == ("effect", "naive")
    assert alone.best.value == pytest.approx(1.0, abs=1e-6)  # alone it is as it is alone
    half = client.tune({"cast-odd": 0.0}, pictures=2, steps=2)
    assert half.best.value == pytest.approx(0.0, abs=1e-6)


def test_weights_go_up_one_adapter_after_the_other_until_each_just_takes_effect(
    stocked: str, client: Client, tmp_path: Path
) -> None:
    for seed, name in enumerate(("cast-dim", "cast-dark")):
        write_kohya(tmp_path / name, random_factors("pocket", seed=seed, rank=2))
        client.check_in(tmp_path / name, name=name, triggers=[name])
    tried: list[render_pb2.Trial] = []
    stack = [("cast-dim", 1.0), ("cast-dark", (-1.0, {"unet": 0.9}))]
    summary = client.tune(stack, pictures=2, steps=2, weights=True, tried=tried.append)
    assert summary.scorer == "effect"
    first, second = summary.climbs
    assert (first.place, second.place) == (0, 1)
    shares = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
    for climb, whole in ((first, 1.0), (second, -1.0)):
        assert list(climb.weights) == pytest.approx([whole * share for share in shares][: len(climb.weights)])
        assert all(share < 0.75 for share in climb.retention[:-1])  # it goes no further than it must
        assert climb.retention[-1] >= 0.75
        assert climb.chosen == climb.weights[-1]
    assert first.retention[0] < 0.5 < first.retention[-1]
    weights = [{ref.ref: ref.weight for ref in trial.stack} for trial in tried]
    alone = [one["cast-dim:1"] for one in weights if one["cast-dark:1"] == 0]
    assert alone == list(first.weights)
    start = weights.index({"cast-dim:1": first.chosen, "cast-dark:1": second.weights[0]})
    beside = weights[start : start + len(second.weights)]
    assert beside == [{"cast-dim:1": first.chosen, "cast-dark:1": at} for at in second.weights]
    assert summary.best.value == max(trial.value for trial in tried)
    assert len(client.tune(stack, pictures=1, steps=1).climbs) == 0
    (weak,) = client.tune({"cast-dim": 0.1}, pictures=1, steps=1, weights=True).climbs
    assert list(weak.weights) == pytest.approx([0.1 * share for share in shares])
    assert weak.chosen == weak.weights[list(weak.retention).index(max(weak.retention))]
    far = client.tune({"cast-dim": (8.0, {"unet": 0.1})}, pictures=1, steps=1, weights=True)
    assert max(far.climbs[0].weights) <= 8.0


def test_auto_merges_by_what_it_found_best_and_records_what_it_compared(stocked: str, client: Client) -> None:
    stack = {"cast-fungo": 1.0, "cast-frame": 1.0}
    with Client(stocked, timeout=240) as patient:
        merged = patient.merge(stack, name="cast-auto", method=method("auto"))
    recipe = json.loads(merged.version.recipe_json)
    best = max(recipe["compared"], key=lambda told: told["value"])
    assert (recipe["method"], recipe["parameters"]) == (best["method"], best["parameters"])
    assert [parent["ref"] for parent in recipe["parents"]] == best["order"]
    assert (recipe["chosen_by"], recipe["scorer"]) == ("auto", "judge")
    said = client.inspect(stack).suggestion
    assert recipe["suggested"]["reason"] == said.reason
    assert said.method.name in {told["method"] for told in recipe["compared"]}
    assert client.remake("cast-auto").same


def test_wrong_tunings_are_refused(stocked: str, client: Client, lora: Path) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    client.check_in(lora, name="cast-still")
    client.check_in(ADAPTERS / "rosy.safetensors", name="cast-rose", triggers=["<rosy>"])
    refused(lambda: client.tune({}), invalid, "not 0")
    refused(lambda: client.tune([("cast-milo", 1.0)] * 5), invalid, "1 to 4 adapters, not 5")
    refused(lambda: client.tune({"cast-milo": 1, "cast-rose": 1}), invalid, "cast-rose:1 is no LoRA")
    refused(
        lambda: client.tune({"cast-milo": 1, "cast-still": 1}), invalid, "cast-still:1 has no trigger word"
    )
    refused(lambda: client.tune({"cast-milo": 1}, pictures=0), invalid, "pictures 0")
    refused(lambda: client.tune({"cast-milo": 1}, steps=1000), invalid, "steps 1000")
    refused(lambda: client.tune({"cast-milo": 1}, prompts=["a {nobody}"]), invalid, "names {nobody}")
    refused(lambda: client.tune({"cast-milo": (1, {"nowhere": 1})}), invalid, "changes no layer in 'nowhere'")
    methods = ", ".join(one.name for one in client.methods() if not one.renders)
    refused(
        lambda: client.merge({"cast-milo": 1}, name="x", method=method("atuo")),
        invalid,
        f"unknown method 'atuo'; there are {methods}, auto$",
    )
    auto = method("auto", rank=4)
    refused(lambda: client.merge({"cast-milo": 1}, name="x", method=auto), invalid, "leave rank out")
    refused(
        lambda: list(client.render("a", stack={"cast-milo": 1}, method=method("auto"))),
        invalid,
        "unknown method 'auto'",
    )


def test_a_lora_is_saved_in_the_layouts_of_other_programs(
    stocked: str, client: Client, tmp_path: Path
) -> None:
    names = {layout: set(client.save_as("cast-fungo", layout)) for layout in ("diffusers", "kohya", "peft")}
    assert names["diffusers"] == names["kohya"] == {"cast-fungo.safetensors"}
    assert names["peft"] == {
        f"{component}/{name}"
        for component in ("unet", "text_encoder")
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    kohya = tmp_path / "fungo-kohya.safetensors"
    kohya.write_bytes(client.save_as("cast-fungo", "kohya")["cast-fungo.safetensors"])
    again = client.check_in(kohya, name="cast-kohya", triggers=["fungo"]).version
    assert again.layout == "kohya"
    change = client.compare("cast-fungo", "cast-kohya").total
    assert change.change < 1e-5 * change.before
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    refused(
        lambda: client.save_as("cast-fungo", "ckpt"),
        invalid,
        "unknown format 'ckpt'; there are diffusers, kohya, peft",
    )
    client.check_in(ADAPTERS / "rosy.safetensors", name="cast-pink")
    refused(lambda: client.save_as("cast-pink", "kohya"), invalid, "is a textual inversion")


def test_a_saved_stack_is_not_measured_as_if_it_were_its_member(stocked: str, client: Client) -> None:
    client.save_stack({"cast-milo": 0.1}, name="cast-one")
    client.save_stack({"cast-milo": 0.1, "cast-frame": 1.0}, name="cast-two")
    for ref in ("cast-one", "cast-two"):
        refused(lambda ref=ref: client.calibrate(ref), grpc.StatusCode.INVALID_ARGUMENT, f"{ref} is no LoRA")
    assert len(client.inspect({"cast-two": 1.0}).adapters) == 2


def test_a_damaged_calibration_is_as_none_until_it_is_measured_again(
    server: Running, stocked: str, client: Client, lora: Path
) -> None:
    version = client.check_in(lora, name="cast-hurt", triggers=["hurt"]).version
    for data in (
        b"",
        b"nonsense",
        next(iter(shipped(server.engine.info.base.digest).values())).read_bytes()[:-9],
    ):
        server.catalog.derived.write("moments", version.digest, data, of=server.engine.info.base.digest)
        refused(
            lambda: client.merge({"cast-hurt": 1, "cast-milo": 1}, name="x", method=method("regmean")),
            grpc.StatusCode.FAILED_PRECONDITION,
            "cast-hurt:1 has none on pocket: atelier calibrate",
        )
    assert not client.calibrate("cast-hurt", pictures=1, steps=1).known


def test_many_merges_that_wait_leave_the_server_answering(stocked: str) -> None:
    """Those that wait must hold none of the threads that answers are made on: there are fewer of them than
    merges.
    """
    with ThreadPoolExecutor(24) as pool, Client(stocked, timeout=240) as client:
        slow = [
            pool.submit(
                client.merge, {"cast-frame": 1 - i / 50}, name="cast-queue", method=method("magnitude-prune")
            )
            for i in range(24)
        ]
        while not all(merge.done() for merge in slow):
            before = sum(merge.done() for merge in slow)
            client.get("cast-milo")
            assert sum(merge.done() for merge in slow) - before < 12
    assert {merge.result().version.name for merge in slow} == {"cast-queue"}


def test_parts_that_multiply_too_far_make_no_version(stocked: str, client: Client) -> None:
    boom = (1.0, {"unet": 8.0, "attn1": 8.0})
    refused(
        lambda: client.merge({"cast-milo": boom}, name="boom"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "the parts of cast-milo:1 make a weight of 64",
    )
