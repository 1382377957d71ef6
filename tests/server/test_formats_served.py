"""Bundles and DoRAs through a real client: words along with a LoRA, and what only a render can do."""

import io
import json
import math
import re
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from atelier.client import AtelierError, Client, method
from atelier.v1 import catalog_pb2
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def picture(client: Client, prompt: str, stack: dict[str, float], **more: object) -> Tensor:
    """The pixels alone: the manifest beside them names the stack."""
    (made,) = client.render(prompt, stack=stack, seed=3, steps=2, **more).pictures()
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(made.png)).convert("RGB")).astype("int16"))


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


def test_a_lora_brings_its_word_along(client: Client, lora: Path, tmp_path: Path, warm: WarmPipeline) -> None:
    vectors = torch.randn(2, 96) * 0.5
    save_file({**load_file(lora), "bundle_emb.zorbly.string_to_param.*": vectors}, tmp_path / "bundle")
    save_file({"emb_params": vectors}, tmp_path / "word")
    version = client.check_in(tmp_path / "bundle", name="bundle").version
    assert (version.kind, version.family) == (catalog_pb2.KIND_LORA, "pocket")
    assert [(t.word, t.source) for t in version.triggers] == [("zorbly", "bundle")]
    assert list(version.coverage.unbound) == []
    client.check_in(lora, name="bundle-plain", triggers=["zorbly"])
    client.check_in(tmp_path / "word", name="bundle-word", triggers=["zorbly"])
    apart = {"bundle-plain": 1.0, "bundle-word": 1.0}
    told = picture(client, "a zorbly star", apart)
    assert equal(picture(client, "a zorbly star", {"bundle": 1.0}), told)
    assert equal(picture(client, "a {bundle} star", {"bundle": 1.0}), told)
    assert not equal(picture(client, "a zorbly star", {"bundle-plain": 1.0}), told)


def test_a_bundled_word_for_another_base_is_named_and_the_layers_render(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    save_file({**load_file(lora), "bundle_emb.zarb.clip_g": torch.randn(1, 1280)}, tmp_path / "a")
    version = client.check_in(tmp_path / "a", name="bundle-foreign").version
    assert list(version.coverage.unbound) == ["bundle_emb.zarb.clip_g"]
    client.check_in(lora, name="bundle-native")
    told = picture(client, "a zarb star", {"bundle-foreign": 1.0})
    assert equal(told, picture(client, "a zarb star", {"bundle-native": 1.0}))


def test_a_merge_does_not_lose_the_words_of_a_bundle_in_silence(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    save_file({**load_file(lora), "bundle_emb.zlom.clip_l": torch.randn(1, 96)}, tmp_path / "a")
    client.check_in(tmp_path / "a", name="bundle-merged")
    with pytest.raises(
        AtelierError, match="bundle-merged:1 brings the words zlom along, and a merge has layers"
    ):
        client.merge({"bundle-merged": 1.0}, name="bundle-lost")


def test_a_lora_with_a_nameless_word_is_called_by_its_own_name(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    word = torch.randn(2, 96)
    save_file({**load_file(lora), "emb_params": word}, tmp_path / "a")
    version = client.check_in(tmp_path / "a", name="zublim").version
    assert [(t.word, t.source) for t in version.triggers] == [("zublim", "bundle")]
    client.check_in(lora, name="zublim-layers")
    save_file({"emb_params": word}, tmp_path / "b")
    client.check_in(tmp_path / "b", name="zublim-word", triggers=["zublim"])
    apart = picture(client, "a zublim", {"zublim-layers": 1.0, "zublim-word": 1.0})
    assert equal(picture(client, "a zublim", {"zublim": 1.0}), apart)


def test_several_words_of_one_file_are_called_by_their_names(client: Client, tmp_path: Path) -> None:
    one, two = torch.randn(1, 96), torch.randn(2, 96)
    save_file({"zab": one, "zub": two}, tmp_path / "both")
    save_file({"zab": one}, tmp_path / "one")
    save_file({"zub": two}, tmp_path / "two")
    version = client.check_in(tmp_path / "both", name="both-words").version
    assert [t.word for t in version.triggers] == ["zab", "zub"]
    for name in ("one", "two"):
        client.check_in(tmp_path / name, name=f"{name}-word")
    told = picture(client, "a zab and a zub", {"both-words": 1.0})
    assert equal(told, picture(client, "a zab and a zub", {"one-word": 1.0, "two-word": 1.0}))
    assert not equal(told, picture(client, "a zab and a zub", {"one-word": 1.0}))


def test_words_for_two_encoders_are_kept_and_not_stacked(client: Client, tmp_path: Path) -> None:
    save_file({"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}, tmp_path / "a")
    version = client.check_in(tmp_path / "a", name="two-encoders").version
    assert (version.kind, version.family) == (catalog_pb2.KIND_TEXTUAL_INVERSION, "sdxl")
    with pytest.raises(
        AtelierError, match="two-encoders:1 is for sdxl, and this server has no base"
    ) as caught:
        picture(client, "a star", {"two-encoders": 1.0})
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_a_dora_is_rendered_and_never_merged(client: Client, tmp_path: Path, warm: WarmPipeline) -> None:
    layers = random_factors("pocket", seed=77, rank=4)
    write_kohya(tmp_path / "plain", layers)
    tensors = load_file(tmp_path / "plain")
    golden = {
        f"lora_{name.replace('.', '_')}": warm.golden(name) for name in warm.layers() if "unet." in name
    }
    stems = [key.split(".")[0] for key in tensors if key.endswith("up.weight") and "lora_unet" in key]
    # With the norm that W + BA has, magnitude and norm cancel: the DoRA does what the LoRA does.
    for stem in stems[::2]:
        W = golden[stem] + tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        tensors[f"{stem}.dora_scale"] = W.norm(dim=1, keepdim=True)
    save_file(tensors, tmp_path / "same")
    save_file({k: t * 3 if "dora_scale" in k else t for k, t in tensors.items()}, tmp_path / "louder")
    for name in ("plain", "same", "louder"):
        assert client.check_in(tmp_path / name, name=f"dora-{name}").version.coverage.unbound == []
    plain, same, louder = (
        picture(client, "a star", {f"dora-{name}": 1.0}) for name in ("plain", "same", "louder")
    )
    assert (plain - same).abs().max() <= 2
    assert (plain - louder).abs().max() > 20
    for how in ("naive", "svd", "orthogonal"):
        with pytest.raises(AtelierError, match="is a DoRA") as caught:
            client.merge({"dora-plain": 1.0, "dora-same": 0.5}, name="dora-merged", method=method(how))
        assert caught.value.code is INVALID
    stack = {"dora-same": 1.0, "dora-plain": 0.5}
    picture(client, "a star", stack)
    with pytest.raises(AtelierError, match="is a DoRA layer, which is not merged in factor space"):
        picture(client, "a star", stack, method=method("svd", rank=4))
    same = client.compare("dora-plain", "dora-same").total
    assert same.change < 1e-5 * same.before
    louder = client.compare("dora-plain", "dora-louder")
    norms = [float(tensors[f"{stem}.dora_scale"].norm()) for stem in stems[::2]]
    assert louder.total.change == pytest.approx(
        2 * math.hypot(*norms), rel=1e-5
    )  # thrice what was there once
    changed = {layer.layer for layer in louder.layers if layer.change > 1e-5 * layer.before}
    assert len(changed) == len(stems[::2])


def test_a_loha_whose_update_float32_cannot_hold_is_refused(client: Client, tmp_path: Path) -> None:
    """Its numbers are none of them too large; its factors are products of two, its update of four."""
    layers = random_factors("pocket", seed=1, rank=2, where=lambda name: "attn2.to_k" in name)
    for size, held in ((1e11, False), (1e8, True)):
        tensors = {
            f"lora_unet_{name.split('.', 1)[1].replace('.', '_')}.hada_w{i}_{side}": tensor * 10 * size
            for name, factors in layers.items()
            for i in (1, 2)
            for side, tensor in (("a", factors.up), ("b", factors.down))
        }
        save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "far")
        if held:
            client.check_in(tmp_path / "far", name="loha-far")
            continue
        with pytest.raises(AtelierError, match="beyond float32: the training went wrong") as refused:
            client.check_in(tmp_path / "far", name="loha-far")
        assert refused.value.code is INVALID


def test_a_bundle_is_written_without_its_words_which_are_named(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    save_file({**load_file(lora), "bundle_emb.zlim.clip_l": torch.randn(1, 96)}, tmp_path / "a")
    client.check_in(tmp_path / "a", name="bundle-out")
    client.check_in(lora, name="bundle-out-layers")
    for layout in ("diffusers", "kohya", "peft"):
        without: list[str] = []
        files = client.save_as("bundle-out", layout, left_out=without.extend)
        plain = client.save_as("bundle-out-layers", layout, left_out=lambda _: pytest.fail("all is there"))
        assert without == ["zlim"]
        assert list(files.values()) == list(plain.values())
    met = client.inspect({"bundle-out": 1.0, "bundle-out-layers": 1.0})
    assert met.crosstalk[0].cosine == pytest.approx(1)


def test_a_dora_is_written_in_every_layout_and_renders_the_same(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    tensors = load_file(lora)
    ups = {
        k.removesuffix(".lora_up.weight"): len(v) for k, v in tensors.items() if k.endswith(".lora_up.weight")
    }
    magnitudes = {f"{name}.dora_scale": torch.rand(d, 1) + 0.5 for name, d in ups.items()}
    save_file({**tensors, **magnitudes}, tmp_path / "a")
    client.check_in(tmp_path / "a", name="dora-out")
    told = picture(client, "a star", {"dora-out": 1.0})
    client.check_in(lora, name="dora-out-layers")
    assert not equal(told, picture(client, "a star", {"dora-out-layers": 1.0}))
    for layout in ("diffusers", "kohya"):
        ((_, data),) = client.save_as("dora-out", layout).items()
        (tmp_path / layout).write_bytes(data)
        client.check_in(tmp_path / layout, name=f"dora-{layout}")
        assert equal(picture(client, "a star", {f"dora-{layout}": 1.0}), told)
    files = client.save_as("dora-out", "peft")
    assert json.loads(files["unet/adapter_config.json"])["use_dora"] is True
    with pytest.raises(AtelierError, match=r"dora-out:1 is a DoRA.* nor measured beside others"):
        client.inspect({"dora-out": 1.0, "dora-out-layers": 1.0})


def test_what_no_layer_takes_is_named_whole_at_check_in_and_where_it_is_lost(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    tensors = load_file(lora)
    names = [k.removesuffix(".lora_up.weight") for k in tensors if k.endswith(".lora_up.weight")]
    biases = {f"{name}.diff_b": torch.ones(3) for name in names}
    strangers = {f"stranger-{'x' * i}.w": torch.ones(1) for i in range(70)}
    save_file({**tensors, **biases}, tmp_path / "a")
    version = client.check_in(tmp_path / "a", name="biased").version
    told = list(version.coverage.unbound)
    assert len(told) < len(biases)
    counts = [int(found[1]) if (found := re.search(r" \((\d+)\)$", entry)) else 1 for entry in told]
    assert sum(counts) == len(biases)
    assert (version.coverage.bound, version.coverage.total) == (len(names), len(names))  # a bias is no layer
    client.check_in(lora, name="biased-layers")
    merged = client.merge({"biased": 1.0, "biased-layers": 1.0}, name="unbiased")
    assert {m.ref: list(m.left_out) for m in merged.members} == {"biased:1": told, "biased-layers:1": []}
    save_file({**tensors, **strangers}, tmp_path / "b")
    told = list(client.check_in(tmp_path / "b", name="strange").version.coverage.unbound)
    assert (len(told), told[-1]) == (64, "and 7 more")
    foreign = {"stranger.lora_down.weight": torch.ones(2, 7), "stranger.lora_up.weight": torch.ones(9, 2)}
    save_file({**tensors, **biases, **foreign}, tmp_path / "c")
    coverage = client.check_in(tmp_path / "c", name="one-more").version.coverage
    assert (coverage.bound, coverage.total) == (len(names), len(names) + 1)
    save_file({**foreign, "stranger.bias": torch.ones(1)}, tmp_path / "d")
    coverage = client.check_in(tmp_path / "d", name="of-no-base").version.coverage
    assert (coverage.bound, coverage.total, coverage.base) == (0, 1, "")
