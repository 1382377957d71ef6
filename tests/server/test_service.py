"""The main job through a real client on a real socket."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client, method
from atelier.v1 import catalog_pb2, catalog_pb2_grpc
from compose.manifest import from_png
from compose.warm import WarmPipeline
from server.serving import SERVICES
from tests.adapters import peft_config, random_factors, write_kohya
from tests.conftest import Running, serving

SMALL = {"seed": 3, "steps": 3}


def pixels(png: bytes, tmp_path: Path) -> np.ndarray:
    (tmp_path / "x.png").write_bytes(png)
    return np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))


def check_in(client: Client, path: Path, name: str, *, seed: int, rank: int = 4, **more: object) -> None:
    write_kohya(path, random_factors("pocket", seed=seed, rank=rank))
    client.check_in(path, name=name, base="pocket", **more)  # type: ignore[arg-type]


def test_a_file_comes_back_byte_for_byte_with_its_facts_and_card(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    card = b"---\ninstance_prompt: sks toy\n---\n# Back\n"
    write_kohya(lora, random_factors("pocket", seed=41, rank=4))  # bytes that no other test checks in
    answer = client.check_in(lora, name="back", base="pocket", card=card, alias="stable")
    v = answer.version
    assert (answer.created, v.name, v.number, v.layout, v.family) == (True, "back", 1, "kohya", "pocket")
    assert (v.coverage.bound, list(v.coverage.unbound), list(v.aliases)) == (v.coverage.total, [], ["stable"])
    assert [(t.word, t.source) for t in v.triggers] == [("sks toy", "card")]
    assert set(v.components) == {"unet", "text_encoder"}
    assert {"to_q", "to_out", "q_proj", "out_proj"} <= set(v.targets)
    client.download("back@stable", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == lora.read_bytes()
    assert client.get(v.digest).card == card
    again = client.check_in(lora, name="back", base="pocket", card=card)
    assert (again.created, again.version.number) == (False, 1)
    other = client.check_in(lora, name="back", base="pocket", card=card, triggers=["sks"])
    assert (other.created, other.version.number, list(other.same_bytes)) == (True, 2, ["back:1"])
    assert [v.number for v in client.history("back")] == [2, 1]


def test_listing_pages_through_every_asset(client: Client, server: Running, lora: Path) -> None:
    names = [f"page-{i}" for i in range(5)]
    for name in names:
        client.check_in(lora, name=name)
    found, token = [], "start"
    with grpc.insecure_channel(server.address) as channel:
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)
        while token:
            asked = catalog_pb2.ListAssetsRequest(page_size=2, page_token="" if token == "start" else token)
            page = stub.ListAssets(asked)
            assert len(page.versions) <= 2
            found += [v.name for v in page.versions]
            token = page.next_page_token
    assert found == [v.name for v in client.list()] == sorted(found)
    assert set(names) <= set(found)


def test_assets_are_found_by_words_labels_and_dates(client: Client, lora: Path) -> None:
    card = b"---\ntags: [otter]\nauthor: ann\nlicense: mit\n---\nRecommended weight: 0.8 (0.6 to 1)\n"
    kept = client.check_in(lora, name="otto", card=card, triggers=["otto otter"]).version
    assert kept.about.licence == catalog_pb2.Told(value="mit", source="card")
    assert kept.about.weight.value == 0.8
    assert [v.name for v in client.list("otter rec")] == ["otto"]
    asked = {"labels": [("tag", "Otter"), ("base", "pocket")], "made_before": datetime.now(UTC)}
    assert [v.name for v in client.list(**asked)] == ["otto"]
    assert list(client.list("otter badger")) == []
    merged = client.merge({"otto": 0.5}, name="otto-half").version
    assert merged.about.licence == catalog_pb2.Told(value="mit", source="recipe")
    with pytest.raises(AtelierError, match="'colour' is no label; there are kind, base, tag") as caught:
        list(client.list(labels=[("colour", "red")]))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_render_replays_to_the_same_bytes_after_the_alias_moved(client: Client, tmp_path: Path) -> None:
    check_in(client, tmp_path / "a", "moving", seed=1, alias="stable", triggers=["sks"])

    def render() -> bytes:
        (picture,) = client.render("a {moving} star", stack={"moving@stable": 0.8}, **SMALL).pictures()
        return picture.png

    png = render()
    check_in(client, tmp_path / "b", "moving", seed=2, alias="stable", triggers=["sks"])
    changed = render()
    replay = client.replay(png)
    (again,) = [p.png for p in replay.pictures()]
    assert again == png != changed
    assert list(replay.summary.differences) == []
    told = json.loads(replay.summary.manifest_json[0])
    assert told["prompt"] == "a sks star"
    assert [(e["ref"], e["weight"]) for e in told["stack"]] == [("moving:1", 0.8)]


def test_a_replay_says_when_its_pixels_are_not_those_in_the_png(client: Client) -> None:
    (made,) = client.render("a red star", width=64, height=64, **SMALL).pictures()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("atelier", from_png(made.png))

    def told(image: Image.Image) -> list[str]:
        out = io.BytesIO()
        image.save(out, "png", pnginfo=info)
        replay = client.replay(out.getvalue())
        assert [picture.png for picture in replay.pictures()] == [made.png]
        return list(replay.summary.differences)

    picture = Image.open(io.BytesIO(made.png))
    assert told(picture) == told(picture.convert("RGBA")) == []  # kept in another way, and the same
    assert told(picture.crop((0, 0, 32, 48))) == [
        "the picture in the PNG is 32x48, this one 64x64: it was cut or scaled"
    ]
    red, green, blue = picture.getpixel((3, 4))
    picture.putpixel((3, 4), (red, green ^ 128, blue))
    assert told(picture) == [
        "1 of 4096 pixels are not those in the PNG, by up to 128 of 255: it was edited, or this machine "
        "computes otherwise"
    ]
    out = io.BytesIO()
    picture.save(out, "png", pnginfo=info)
    replay = client.replay(out.getvalue()[:-600])
    assert [picture.png for picture in replay.pictures()] == [made.png]
    (difference,) = replay.summary.differences
    assert difference.startswith("the picture in the PNG cannot be compared: the png is damaged")


def test_a_replay_refuses_pictures_that_it_does_not_start_from(client: Client) -> None:
    (made,) = client.render("a red star", **SMALL).pictures()
    (other,) = client.render("a red star", image=made.png, **SMALL).pictures()
    for png, sent, what in (
        (made.png, {"image": made.png}, "any image; leave it out"),
        (other.png, {"image": made.png, "mask": made.png}, "any mask; leave it out"),
        (made.png, {"controls": [made.png]}, "the control sha256:"),
        (made.png, {"references": [made.png]}, "the reference sha256:"),
    ):
        with pytest.raises(AtelierError, match=f"this picture was made without {what}") as caught:
            list(client.replay(png, **sent).pictures())
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_the_live_stack_is_the_baked_merge_to_the_pixel(client: Client, tmp_path: Path) -> None:
    check_in(client, tmp_path / "a", "live-a", seed=1)
    check_in(client, tmp_path / "b", "live-b", seed=2, rank=6)
    for name, told in (("naive", {}), ("svd", {"rank": 5}), ("orthogonal", {"protect": 0.9})):
        how = method(name, **told)  # type: ignore[arg-type]
        stack = {"live-a": 0.9, "live-b": 0.4}
        merged = client.merge(stack, name=f"baked-{name}", method=how)
        assert json.loads(merged.version.recipe_json)["method"] == name
        (live,) = client.render("a red star", stack=stack, method=how, **SMALL).pictures()
        (baked,) = client.render("a red star", stack={f"baked-{name}": 1}, **SMALL).pictures()
        assert np.array_equal(pixels(live.png, tmp_path), pixels(baked.png, tmp_path))


def test_the_order_of_a_plain_stack_does_not_matter_and_that_of_a_priority_does(
    client: Client, tmp_path: Path
) -> None:
    check_in(client, tmp_path / "a", "order-a", seed=1)
    check_in(client, tmp_path / "b", "order-b", seed=2)
    one, two = [("order-a", 1.0), ("order-b", 0.7)], [("order-b", 0.7), ("order-a", 1.0)]

    def render(stack: list[tuple[str, float]], name: str) -> np.ndarray:
        (picture,) = client.render("a red star", stack=stack, method=method(name), **SMALL).pictures()
        return pixels(picture.png, tmp_path)

    assert np.array_equal(render(one, "naive"), render(two, "naive"))
    assert not np.array_equal(render(one, "orthogonal"), render(two, "orthogonal"))


def test_the_same_merge_again_is_the_same_version(client: Client, tmp_path: Path) -> None:
    check_in(client, tmp_path / "a", "same-a", seed=1)
    first = client.merge({"same-a": 0.5}, name="same-merge", method=method("svd", rank=2), alias="candidate")
    again = client.merge({"same-a": 0.5}, name="same-merge", method=method("svd", rank=2))
    assert (first.created, again.created, again.version.number) == (True, False, 1)
    assert 0 < first.truncation_error < 1
    assert list(again.version.aliases) == ["candidate"]


def test_a_word_is_taught_for_one_render_only(client: Client, tmp_path: Path) -> None:
    save_file({"<glow>": torch.randn(2, 96)}, tmp_path / "w")
    client.check_in(tmp_path / "w", name="glow", base="pocket")

    def render(prompt: str, stack: dict[str, float]) -> np.ndarray:
        (picture,) = client.render(prompt, stack=stack, **SMALL).pictures()
        return pixels(picture.png, tmp_path)

    before = render("a <glow> star", {})
    taught = render("a {glow} star", {"glow": 1.0})
    assert not np.array_equal(before, taught)
    assert np.array_equal(render("a <glow> star", {}), before)
    assert np.array_equal(render("a <glow> star", {"glow": 1.0}), taught)


def test_a_word_that_the_prompt_does_not_say_is_noted(client: Client, tmp_path: Path) -> None:
    save_file({"<unheard>": torch.ones(2, 96)}, tmp_path / "w")
    client.check_in(tmp_path / "w", name="unheard", base="pocket", triggers=["<unheard>"])

    def notes(prompt: str, **more: object) -> list[str]:
        rendering = client.render(prompt, stack={"unheard": 1.0}, **SMALL, **more)  # type: ignore[arg-type]
        list(rendering)
        return list(rendering.summary.warnings)

    nothing = "unheard:1 does nothing here: the prompt does not say <unheard>"
    assert notes("an unheard star") == [nothing]
    assert notes("a {unheard} star") == notes("a ((<unheard>:1.2) star)") == []
    assert notes("a star", negative_prompt="{unheard}") == []
    assert notes("a {unheard} star", negative_prompt="red", guidance=1.0) == [
        "the negative prompt does nothing at guidance 1; it takes more than 1"
    ]


def test_events_come_in_order_with_previews_and_timings(client: Client) -> None:
    events = list(client.render("a red star", seed=1, steps=6, count=2, preview_every=2))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "summary"
    assert "preview" in kinds
    summary = events[-1].summary
    assert {"compose", "queue", "patch", "embed", "denoise", "decode", "encode"} == set(summary.seconds)
    assert [json.loads(m)["seed"] for m in summary.manifest_json] == [1, 2]


def test_a_stack_for_another_base_may_be_kept_and_merged_but_not_rendered(
    client: Client, tmp_path: Path
) -> None:
    few = random_factors("sd1", seed=0, rank=1, where=lambda n: "unet.mid_block" in n and ".attn2." in n)
    write_kohya(tmp_path / "a", few, family="sd1")
    kept = client.check_in(tmp_path / "a", name="foreign")
    assert (kept.version.family, kept.version.coverage.base) == ("sd1", "sd1")
    assert client.merge({"foreign": 0.5}, name="foreign-half").version.family == "sd1"
    with pytest.raises(
        AtelierError, match="foreign:1 is for sd1, and this server has no base of that"
    ) as caught:
        list(client.render("a star", stack={"foreign": 1}))
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_the_async_client_does_the_same(server: Running, lora: Path, client: Client) -> None:
    async with AsyncClient(server.address) as atelier:
        answer = await atelier.check_in(lora, name="async", base="pocket", triggers=["sks"])
        assert (await atelier.get("async")).version.digest == answer.version.digest
        (png,) = await atelier.render("a {async} star", stack={"async": 0.5}, **SMALL)
        merged = await atelier.merge({"async": 0.5}, name="async-half")
        assert merged.version.number == 1
        assert await atelier.replay(png) == png
        assert (await atelier.set_alias("async", "stable", 1)).version.number == 1
        assert [v.number for v in await atelier.history("async")] == [1]
        assert {"async", "async-half"} <= {v.name async for v in atelier.list()}
    (same,) = client.render("a {async} star", stack={"async": 0.5}, **SMALL).pictures()
    assert png == same.png


def test_health_reflection_bases_and_methods_answer(server: Running, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (told,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        assert set(SERVICES) <= {s.name for s in told.list_services_response.service}
    (base,) = client.bases()
    assert (base.name, base.family, base.width, base.steps) == ("pocket", "pocket", 64, 20)
    assert {"naive", "svd", "orthogonal", "activation"} <= {m.name for m in client.methods()}


def test_bytes_that_mean_two_things_are_never_confused(
    client: Client, tmp_path: Path, warm: WarmPipeline
) -> None:
    module = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    only = random_factors("pocket", seed=0, rank=4, scale=0.3)[module.replace("base_model.model", "unet")]
    save_file({f"{module}.lora_A.weight": only.down, f"{module}.lora_B.weight": only.up}, tmp_path / "p")
    configs = [peft_config(lora_alpha=alpha).encode() for alpha in (4, 64)]
    one, two = (client.check_in(tmp_path / "p", name="meanings", adapter_config=c).version for c in configs)
    assert (one.number, two.number, one.digest) == (1, 2, two.digest)

    def render(ref: str) -> bytes:
        (picture,) = client.render("a red star", stack={ref: 1.0}, **SMALL).pictures()
        return picture.png

    weak, strong = render("meanings:1"), render("meanings:2")
    assert not np.array_equal(pixels(weak, tmp_path), pixels(strong, tmp_path))
    (again,) = client.replay(strong).pictures()
    assert again.png == strong
    with pytest.raises(
        AtelierError, match="meanings:1, meanings:2 hold these bytes with different adapter_config"
    ):
        render(one.digest)
    with serving(tmp_path / "other", warm) as other, Client(other.address) as elsewhere:
        elsewhere.check_in(tmp_path / "p", name="meanings", adapter_config=configs[0])
        with pytest.raises(AtelierError, match=r"meanings:2 .* is not in the catalog") as caught:
            list(elsewhere.replay(strong))
        assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_a_weight_of_zero_is_the_bare_base_and_the_same_live_as_baked(client: Client, tmp_path: Path) -> None:
    check_in(client, tmp_path / "a", "zero-a", seed=1, rank=4)
    check_in(client, tmp_path / "b", "zero-b", seed=2, rank=9)

    def render(stack: dict[str, float], how: str = "naive") -> np.ndarray:
        (picture,) = client.render("a red star", stack=stack, method=method(how), **SMALL).pictures()
        return pixels(picture.png, tmp_path)

    assert np.array_equal(render({}), render({"zero-a": 0.0}))
    stack = {"zero-a": 1.0, "zero-b": 0.0}
    client.merge(stack, name="zero-merged", method=method("svd"))
    assert np.array_equal(render(stack, "svd"), render({"zero-merged": 1.0}))


def test_only_the_word_that_is_taught_is_filled_in(client: Client, tmp_path: Path) -> None:
    save_file({"<zig>": torch.randn(1, 96)}, tmp_path / "w")
    client.check_in(tmp_path / "w", name="zigzag", triggers=["zig", "zag"])
    rendering = client.render("a {zigzag} star", stack={"zigzag": 1.0}, **SMALL)
    list(rendering)
    assert json.loads(rendering.summary.manifest_json[0])["prompt"] == "a zig star"
