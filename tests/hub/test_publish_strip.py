"""A stripped file says nothing of its training, and does exactly what the whole one does."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compose import formats
from compose.factors import Factors
from compose.pocket.layouts import beside, write_diffusers, write_peft
from registry.errors import InvalidFile
from registry.headers import read_header
from registry.hub import stripping
from registry.hub.files import PEFT, WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from server.checkin import recognise
from tests.adapters import random_factors, write_kohya
from tests.hub.conftest import SEEDS, Open, Studio
from tests.hub.standin import StandIn

SECRET = "secretproject"
MILLION = 1_000_000
HARMLESS = {
    "format": "pt",
    "ss_base_model_version": "sd_v1",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_args": '{"conv_dim": "4", "algo": "locon"}',
    "ss_clip_skip": "None",
    "sshs_model_hash": "ab" * 32,
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.title": "Milo, and/or his hat",
    "modelspec.author": "Ann",
    "modelspec.license": "mit",
    "modelspec.date": "2026-01-02T03:04:05",
    "modelspec.trigger_phrase": "milo",
    "modelspec.tags": "red, hat",
    "modelspec.resolution": "512x512",
}
TELLING = {
    "ss_dataset_dirs": json.dumps({f"10_{SECRET}": {"n_repeats": 10}}),
    "ss_tag_frequency": json.dumps({SECRET: {"hat": 3}}),
    "ss_sd_model_name": f"{SECRET}.safetensors",
    "ss_output_name": SECRET,
    "ss_training_comment": SECRET,
    "ss_session_id": "12345",
    "ss_training_started_at": "1700000000.1",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "ss_resolution": "(512, 512)",
    "training_info": json.dumps({"step": 1, "folder": SECRET}),
    "software": "ai-toolkit",
    "ot_config": json.dumps({"workspace_dir": f"/workspace/{SECRET}"}),
    "prompt": SECRET,
    "workflow": SECRET,
    "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
    "modelspec.merged_from": SECRET,
    "ss_network_argsx": SECRET,
    "format_": SECRET,
    "a note": SECRET,
}
PATHS = [
    f"/home/ann/{SECRET}", f"~/{SECRET}", f"../{SECRET}/x", rf"C:\Users\ann\{SECRET}", f"D:/{SECRET}",
    rf"\\nas\{SECRET}", f"file:///mnt/{SECRET}", f"trained on ({SECRET}/milo/v2)", f"datasets/{SECRET}",
    f"{SECRET}.safetensors", f"see {SECRET}.png", f"10_{SECRET}/", f"%USERPROFILE%{SECRET}", f"$HOME{SECRET}",
    f"https://ann@host/{SECRET}", f"http://nas:80/{SECRET}", f"x=/data/{SECRET}", f'"/{SECRET}"',
]  # fmt: skip


SECRETS = [
    f"https://example.org/milo?token={SECRET}", "made by ann@example.org", "hf_" + "aB3" * 11,
    "ghp_" + "x1" * 18, "https://example.org/hf_" + "aB3" * 11, "see milo.tiff", "see milo.heic",
    "milo.mp4", "milo.avif",
]  # fmt: skip


def factors(path: Path, config: str = "") -> dict[str, object]:
    """What a file does: canonical factors by layer, and its words."""
    sketch = recognise(read_header(path), config)
    binding = formats.infer(sketch)
    words = {w.token: dict(w.vectors) for w in formats.load_words(path, sketch)}
    return {"layout": sketch.layout, "family": binding.family, "words": words} | (
        dict(formats.load(path, binding)) if not sketch.is_words else {}
    )


def same_effect(path: Path, other: Path, config: str = "", other_config: str = "") -> None:
    """Bit for bit."""
    mine, theirs = factors(path, config), factors(other, other_config)
    assert mine.keys() == theirs.keys()
    for name in mine:
        if name == "words":
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)
        elif name in {"layout", "family"}:
            assert mine[name] == theirs[name]
        else:
            one, other_one = mine[name], theirs[name]
            assert isinstance(one, Factors)
            assert isinstance(other_one, Factors)
            assert torch.equal(one.up, other_one.up)
            assert torch.equal(one.down, other_one.down)


def with_metadata(path: Path, metadata: Mapping[str, str]) -> Path:
    """The same file with this in its header, too."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
    save_file(load_file(path), path, metadata={**told, **metadata})
    return path


def kohya(path: Path) -> str:
    write_kohya(
        path, random_factors("pocket", seed=next(SEEDS), rank=4), alpha=lambda name: 1.0 + len(name) % 3
    )
    return ""


def diffusers(path: Path) -> str:
    write_diffusers(random_factors("pocket", seed=next(SEEDS), rank=4), path, alpha=3.0)
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    told["unet.base_model_name_or_path"] = f"/home/ann/{SECRET}"
    told["unet.runtime"] = {"folder": SECRET}
    with_metadata(path, {"lora_adapter_metadata": json.dumps(told)})
    return ""


def peft(path: Path) -> str:
    unet = {
        name: f
        for name, f in random_factors("pocket", seed=next(SEEDS), rank=4).items()
        if name.startswith("unet.")
    }
    write_peft(unet, path, alpha=3.0)
    told = json.loads(beside(path).read_text())
    told |= {"base_model_name_or_path": f"/home/ann/{SECRET}", "revision": SECRET}
    return json.dumps(told)


def learned_embeds(path: Path) -> str:
    save_file({"<fungo>": torch.randn(2, 96)}, path)
    return ""


def lora_with_words(path: Path) -> str:
    kohya(path)
    save_file({**load_file(path), "<hat>": torch.randn(1, 96)}, path, metadata={"<hat>": "<embed>"})
    return ""


def bundle(path: Path) -> str:
    kohya(path)
    save_file({**load_file(path), "bundle_emb.<hat>.string_to_param.*": torch.randn(1, 96)}, path)
    return ""


@pytest.mark.parametrize("layout", [kohya, diffusers, peft, learned_embeds, lora_with_words, bundle])
def test_what_is_stripped_does_the_same_and_tells_nothing(
    standin: StandIn, studio: Studio, studios: Open, tmp_path: Path, layout: Callable[[Path], str]
) -> None:
    path = tmp_path / "adapter.safetensors"
    config = layout(path)
    with_metadata(path, HARMLESS | TELLING)
    assert SECRET.encode() in path.read_bytes()
    studio.check_in("milo", path=path, adapter_config=config)
    done = push(studio.exchange, "milo", repo="ann/milo", strip=True)
    there = standin.repo("ann/milo").head.files
    name = next(n for n in (*WEIGHTS.values(), PEFT) if n in there)
    published = standin.storage.path(there[name].sha256)
    beside_it = there["adapter_config.json"].data.decode() if config else ""
    same_effect(path, published, config, beside_it)
    everything = published.read_bytes() + b"".join(f.data for f in there.values())
    assert SECRET.encode() not in everything
    kept = read_header(published).metadata
    assert HARMLESS.items() <= kept.items()
    assert set(kept) <= {*HARMLESS, "<hat>", "lora_adapter_metadata"}
    told = next(note for note in done.notes if note.startswith("left out of the file's header: "))
    inner = {f"lora_adapter_metadata: unet.{k}" for k in ("base_model_name_or_path", "runtime")}
    left = set(told.removeprefix("left out of the file's header: ").split(", "))
    assert left == {*TELLING} | (inner if layout is diffusers else set())
    if config:
        assert "left out of adapter_config.json: base_model_name_or_path, revision" in done.notes
    pulled = pull(studios().exchange, "ann/milo", name="milo").version
    assert pulled.digests == studio.catalog.resolve("milo").digests
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["modelspec.title", "modelspec.description", "ss_network_args"])
def test_a_path_in_an_allowed_key_takes_it_along(tmp_path: Path, key: str, path: str) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={key: path, "format": "pt"})
    assert stripping.kept(read_header(file)) == ({"format": "pt"}, [key])


@pytest.mark.parametrize("path", PATHS)
def test_a_path_in_a_configuration_takes_its_entry_along(path: str) -> None:
    told = {"r": 4, "target_modules": ["to_q", r"down\.\d+\.to_k"], "task_type": path}
    stays, gone = stripping.configuration(json.dumps(told))
    assert (gone, SECRET in stays) == (["task_type"], False)
    assert json.loads(stays)["target_modules"] == told["target_modules"]


@pytest.mark.parametrize("modules", [r"(?:\.to_q|.*\.to_k)$", r"(?i:\.to_q)", r".*(?:attn1|attn2)\.to_[qkv]"])
def test_an_expression_for_modules_is_no_drive(modules: str) -> None:
    told = {"r": 4, "target_modules": modules, "exclude_modules": rf"C:\Users\ann\{SECRET}"}
    stays, gone = stripping.configuration(json.dumps(told))
    assert (json.loads(stays), gone) == ({"r": 4, "target_modules": modules}, ["exclude_modules"])


@pytest.mark.parametrize("text", SECRETS)
def test_links_that_ask_tokens_and_addresses_go(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"modelspec.title": text, "format": "pt"})
    assert stripping.kept(read_header(file)) == ({"format": "pt"}, ["modelspec.title"])
    told = json.dumps({"r": 4, "modules_to_save": [text], "target_modules": [text.replace("/", "")]})
    left = {"target_modules"} if "." in text and "@" not in text else set[str]()
    assert set(json.loads(stripping.configuration(told)[0])) <= {"r", *left}


def test_a_configurations_single_texts_are_single_words() -> None:
    told = {"peft_version": "0.15.0.dev0+ab", "init_lora_weights": "pissa_niter_16", "bias": "lora_only"}
    assert stripping.configuration(json.dumps(told)) == (json.dumps(told), [])
    told |= {"task_type": f"for {SECRET}", "layers_pattern": "down"}
    assert stripping.configuration(json.dumps(told))[1] == ["task_type"]


def test_a_configuration_that_is_no_object_is_neither_taken_nor_published(
    standin: StandIn, studio: Studio
) -> None:
    text = json.dumps([f"/home/ann/{SECRET}"])
    with pytest.raises(InvalidFile, match=r"adapter_config\.json is no JSON object"):
        studio.check_in("milo", adapter_config=text)
    version = studio.check_in("milo")
    declared = version.facts["declared"] | {"adapter_config": text}  # as it was taken once
    studio.catalog.set_card("milo", b"# Milo", {"declared": declared}, expected="")
    done = push(studio.exchange, "milo", repo="ann/milo", strip=True)
    assert "adapter_config.json" not in standin.repo("ann/milo").head.files
    assert "left out of adapter_config.json: all of it" in done.notes


def test_what_a_configuration_says_twice_hides_nothing() -> None:
    text = f'{{"r": "/home/ann/{SECRET}", "r": 4, "eva": {{"x": "{SECRET}", "x": null}}}}'
    stays, gone = stripping.configuration(text)
    assert json.loads(stays) == {"r": 4}
    assert gone == ["eva", "x (but the last)", "r (but the last)"]


def test_no_text_keeps_anybody_busy(tmp_path: Path) -> None:
    """Texts of a megabyte that a careless expression reads a million times: this ends, or the suite does."""
    texts = [
        "a" * MILLION,
        "a/" * MILLION,
        "https://" * MILLION,
        "%a" * MILLION,
        "~" * MILLION,
        " ~a" * MILLION,
    ]
    for text in texts:
        for long in (text, text[: stripping.TEXT_LIMIT]):
            save_file({"x": torch.zeros(1)}, tmp_path / "a", metadata={"modelspec.title": long})
            stripping.kept(read_header(tmp_path / "a"))
    many = json.dumps({f"key{n}": n + 1 for n in range(100_000)})
    assert len(stripping.configuration(many)[1]) == 100_000


def test_without_stripping_what_tells_is_said_and_stays(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo", path=studio.weights(metadata=TELLING | HARMLESS))
    done = push(studio.exchange, "milo", repo="ann/milo")
    assert "the file's header tells of its training (a note, format_, modelspec.merged_from," in done.notes[0]
    assert done.notes[0].endswith(", …); --strip leaves that out")
    file = standin.repo("ann/milo").head.files[WEIGHTS["lora"]]
    assert read_header(standin.storage.path(file.sha256)).metadata == TELLING | HARMLESS


def test_a_header_that_tells_nothing_is_published_as_it_is(standin: StandIn, studio: Studio) -> None:
    version = studio.check_in("milo", path=studio.weights(metadata=HARMLESS))
    done = push(studio.exchange, "milo", repo="ann/milo", strip=True)
    assert not any("header" in note for note in done.notes)
    assert standin.repo("ann/milo").head.files[WEIGHTS["lora"]].sha256 == version.digest[7:]


def test_a_hundred_thousand_keys_are_not_all_named(studio: Studio, standin: StandIn) -> None:
    told = {f"key {n}\n": "x" for n in range(1000)}
    studio.check_in("milo", path=studio.weights(metadata=told))
    note = push(studio.exchange, "milo", repo="ann/milo", strip=True).notes[0]
    assert note.endswith(" and 800 more")
    assert note.isprintable()


@settings(max_examples=200, deadline=None)
@given(key=st.text(max_size=40), value=st.text(max_size=60))
def test_nothing_but_what_is_allowed_stays(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={key: value})
    stays, gone = stripping.kept(read_header(file))
    assert [*stays, *gone] == [key]
    assert not stays or key in HARMLESS or key in {"unet", "text_encoder", "lora_adapter_metadata"}
