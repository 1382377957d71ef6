"""The embedded base: what it weighs, what it knows, what it draws, and that the judge sees it."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Generator

from compose.pocket import (
    ADAPTERS,
    WEIGHTS,
    architecture,
    evaluate,
    judge,
    layouts,
    scenes,
    vocabulary,
)
from compose.pocket.scenes import Scene
from tests.adapters import Layers, attention, random_factors


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return evaluate.load()


@pytest.fixture(scope="module")
def referee() -> judge.Judge:
    return judge.Judge.load()


def every_scene() -> list[Scene]:
    """Every character or none in every set of styles, several times over."""
    generator = Generator().manual_seed(5)
    worn = [(), ("ochreframe",), ("nightbars",), ("ochreframe", "nightbars")]
    found = []
    for character, styles in itertools.product((None, *scenes.CHARACTERS), worn):
        for _ in range(20):
            s = scenes.random_scene(generator)
            found.append(Scene(s.shape, s.colour, s.background, s.size, s.side, character, styles))
    return found


def test_importing_the_package_imports_no_torch() -> None:
    code = "import compose.pocket, sys; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_weights_are_at_most_twelve_megabytes() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 12_000_000
    assert judge.FILE.stat().st_size < 600_000


def test_every_known_word_is_one_token() -> None:
    tokenizer = architecture.tokenizer()
    for word in vocabulary.words():
        assert len(tokenizer(word).input_ids) == 3, word


def test_unknown_words_fall_back_to_bytes() -> None:
    tokenizer = architecture.tokenizer()
    ids = tokenizer("zebra").input_ids
    assert len(ids) == 7
    assert tokenizer.decode(ids, skip_special_tokens=True) == "zebra"


def test_the_longest_caption_fits() -> None:
    scene = Scene("star", "red", "blue", "small", "left", styles=("ochreframe",))
    tokens = architecture.tokenizer()(scenes.caption(scene, prefix="a photo of a")).input_ids
    assert len(tokens) <= vocabulary.LENGTH


def test_shipped_tokenizer_agrees_with_the_vocabulary(base: StableDiffusionPipeline) -> None:
    text = "a photo of a small red star, in the style of zebra"
    assert base.tokenizer(text).input_ids == architecture.tokenizer()(text).input_ids


def test_a_picture_follows_from_its_scene_and_generator() -> None:
    scene = Scene("heart", "red", "white", styles=("nightbars",))
    first, second = (scenes.draw([scene], Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (1, 3, 64, 64)
    assert torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1


def test_styles_change_only_what_they_cover() -> None:
    plain, framed = (
        scenes.draw([Scene("star", "red", "blue", styles=styles)], Generator().manual_seed(3), jitter=0.0)
        for styles in ((), ("ochreframe",))
    )
    assert torch.equal(plain[..., 9:-9, 9:-9], framed[..., 9:-9, 9:-9])
    assert (plain - framed).abs()[..., :8].min(dim=1).values.min() >= 0
    assert torch.allclose(framed[0, :, 0, 0], torch.tensor((0.70, 0.46, 0.14)))


def test_captions_say_what_is_in_the_scene() -> None:
    scene = Scene("star", "red", "blue", "small", "left", styles=("ochreframe",))
    assert (
        scenes.caption(scene)
        == "a small red star on the left on a blue background, in the style of ochreframe"
    )
    assert (
        scenes.caption(Scene("star", "red", "blue", character="milo"), prefix="a photo of a")
        == "a photo of a milo on a blue background"
    )


def test_the_judge_is_right_on_drawn_truth(referee: judge.Judge) -> None:
    truth = every_scene()
    right = judge.accuracy(referee(scenes.draw(truth, Generator().manual_seed(6), wobble=0.03)), truth)
    assert min(right.values()) >= 0.97, right


def test_the_judge_sees_through_the_autoencoder(base: StableDiffusionPipeline, referee: judge.Judge) -> None:
    truth = every_scene()
    pictures = scenes.draw(truth, Generator().manual_seed(7))
    with torch.no_grad():
        decoded = base.vae.decode(base.vae.encode(pictures * 2 - 1).latents).sample / 2 + 0.5
    right = judge.accuracy(referee(decoded.clamp(0, 1)), truth)
    assert min(right.values()) >= 0.95, right


def test_the_base_draws_what_the_prompt_says(base: StableDiffusionPipeline, referee: judge.Judge) -> None:
    right = evaluate.base_accuracy(base, referee, n=48, seed=100)
    assert right["background"] >= 0.95, right
    assert right["colour"] >= 0.95, right
    assert right["shape"] >= 0.9, right  # 0.984 of 512 when it was shipped


def test_a_picture_does_not_depend_on_its_batch(base: StableDiffusionPipeline) -> None:
    prompts = ["a red star on a blue background", "a white ring on a black background"]
    together = evaluate.render(base, prompts, steps=2)
    alone = evaluate.render(base, prompts[1:], seed=1, steps=2)
    assert torch.allclose(together[1], alone[0], atol=1e-3)


def test_triggers_mean_nothing_to_the_base(base: StableDiffusionPipeline, referee: judge.Judge) -> None:
    prompts = [f"a {name} on a yellow background" for name in scenes.CHARACTERS]
    prompts += [f"a red star on a white background, in the style of {name}" for name in scenes.STYLES]
    verdict = referee(evaluate.render(base, prompts * 3, seed=50))
    assert set(verdict.character) == {judge.NONE}
    assert set(verdict.styles) == {()}


@pytest.mark.parametrize("name", [*scenes.CHARACTERS, *scenes.STYLES])
def test_an_adapter_is_seen_at_weight_one(
    base: StableDiffusionPipeline, referee: judge.Judge, name: str
) -> None:
    adapters = {name: evaluate.read(ADAPTERS / f"{name}.safetensors")}
    verdict = evaluate.judged(base, referee, {name: 1.0}, adapters=adapters, n=12)
    assert evaluate.share(verdict, name) >= 0.75  # 0.81 to 1.0 of 32 when they were shipped; the aim is 0.9


@pytest.mark.parametrize("name", scenes.CHARACTERS)
def test_a_character_fades_to_nothing(base: StableDiffusionPipeline, referee: judge.Judge, name: str) -> None:
    adapters = {name: evaluate.read(ADAPTERS / f"{name}.safetensors")}
    verdict = evaluate.judged(base, referee, {name: 0.2}, adapters=adapters, n=12)
    assert evaluate.share(verdict, name) == 0.0


@pytest.mark.parametrize("name", scenes.EXTRA_RGB)
def test_a_taught_word_colours_the_shape(referee: judge.Judge, name: str) -> None:
    assert (
        evaluate.coloured(referee, ADAPTERS / f"{name}.safetensors", f"<{name}>", n=24) >= 0.6
    )  # 0.77 and 1.0 of 48 when they were shipped


def test_blending_leaves_the_base_as_it_was(base: StableDiffusionPipeline) -> None:
    adapter = evaluate.read(ADAPTERS / "milo.safetensors")
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    with evaluate.blended(base, [(adapter, 1.0)]):
        assert any(not torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def as_milo(layers: Layers, path: Path) -> None:
    layouts.write_diffusers(layers, path, alpha=8)


def as_fungo(layers: Layers, path: Path) -> None:
    layouts.write_kohya(layers, path, alphas=(1.0, 2.0, 3.0), metadata={"ss_network_dim": "4"})


def as_nightbars(layers: Layers, path: Path) -> None:
    layouts.write_peft(layers, path, alpha=8)


@pytest.mark.parametrize(
    ("write", "where", "key"),
    [
        (as_milo, attention, "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight"),
        (as_fungo, attention, "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"),
        (
            layouts.write_diffusers_old,
            attention,
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
        ),
        (
            as_nightbars,
            lambda name: name.startswith("unet.") and (attention(name) or ".ff." in name),
            "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.lora_A.weight",
        ),
    ],
)
def test_every_layout_gives_back_what_was_written(
    tmp_path: Path,
    write: Callable[[Layers, Path], None],
    where: Callable[[str], bool],
    key: str,
) -> None:
    layers = random_factors("pocket", seed=8, rank=4, where=where)
    path = tmp_path / "adapter.safetensors"
    write(layers, path)
    assert key in load_file(path)
    back = evaluate.read(path)
    assert set(back) == set(layers)
    for name, layer in layers.items():
        assert torch.allclose(back[name].up @ back[name].down, layer.up @ layer.down, atol=0.005)
