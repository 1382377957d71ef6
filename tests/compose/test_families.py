"""Every family of base models renders what diffusers renders, and takes any stack off again; tiny pipelines
with random weights.
"""

import json
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from compose import bases
from compose.bases import load
from compose.errors import IncompatibleBase, InvalidRequest
from compose.factors import Factors
from compose.layerwise import Stack
from compose.pocket.calibrate import Silent
from compose.render import Picture, decode, render
from compose.residence import Residence, needs
from compose.residence import held as exactly
from compose.schedule import Phase, Plan
from compose.settings import Settings
from compose.source import Source
from compose.trial import pictures
from compose.warm import WarmPipeline, alone, warm_up
from compose.words import Word
from tests.compose.test_warm import Failing
from tests.pipelines import FAMILIES, tiny

SD3 = ("sd3", "sd35-medium")


class Kept(Silent):
    """Keeps the pictures."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def picture(self, image: int, picture: Picture) -> None:
        self.pictures.append(picture)


def rendered(
    warm: WarmPipeline,
    prompt: str = "a red star",
    *,
    stack: Stack = (),
    words: tuple[Word, ...] = (),
    source: Source | None = None,
    **more: object,
) -> Picture:
    kept = Kept()
    told = {"steps": 2, "guidance": 4.0, "seed": 5, "width": 32, "height": 32} | more
    render(warm, Settings(prompt=prompt, **told), stack=stack, words=words, source=source, listener=kept)  # type: ignore[arg-type]
    return kept.pictures[0]


@pytest.fixture(scope="module", params=FAMILIES)
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    """A base of each family."""
    path = tiny(request.param, tmp_path_factory.mktemp("bases") / request.param)
    return warm_up(bases.find(str(path)))


def random_stack(warm: WarmPipeline, *, rank: int = 2) -> Stack:
    generator = torch.Generator().manual_seed(3)

    def factors(name: str) -> Factors:
        d, k = warm.live(name).shape
        return Factors(
            torch.randn(d, rank, generator=generator), 0.3 * torch.randn(rank, k, generator=generator)
        )

    return alone({name: factors(name) for name in warm.layers()})


def test_its_family_is_told_by_its_configuration(
    any_base: WarmPipeline, request: pytest.FixtureRequest
) -> None:
    assert any_base.base.family == request.node.callspec.params["any_base"]


def test_it_renders_what_diffusers_renders(any_base: WarmPipeline) -> None:
    more = {"max_sequence_length": 256} if any_base.base.family in SD3 else {}
    theirs = any_base.pipeline(
        "a red star",
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=2,
        guidance_scale=4.0,
        width=32,
        height=32,
        output_type="pil",
        **more,
    ).images[0]
    assert np.array_equal(rendered(any_base), np.asarray(theirs))


def test_sd3_renders_without_its_t5(tmp_path: Path) -> None:
    whole = DiffusionPipeline.from_pretrained(tiny("sd3", tmp_path / "whole"))
    parts = {**whole.components, "text_encoder_3": None, "tokenizer_3": None}
    type(whole)(**parts).save_pretrained(tmp_path / "light")
    light = warm_up(bases.find(str(tmp_path / "light")))
    told = light.prompts.encode("a red star").tensors
    theirs, _, pooled, _ = light.pipeline.encode_prompt("a red star", None, None, max_sequence_length=256)
    assert torch.equal(told["prompt_embeds"], theirs)
    assert torch.equal(told["pooled_prompt_embeds"], pooled)
    assert not np.array_equal(rendered(light), rendered(light, "a blue bar"))


def test_a_stack_on_every_layer_of_every_component_comes_off_to_the_byte(any_base: WarmPipeline) -> None:
    bare, stack = rendered(any_base), random_stack(any_base)
    addresses = {n: p.data_ptr() for n, p in any_base.denoiser.named_parameters()}
    with_it = rendered(any_base, stack=stack)
    assert not np.array_equal(with_it, bare)
    touched = {name.split(".")[0] for name in any_base.layers()}
    assert len(touched) == {"sdxl": 3, "sd3": 4, "sd35-medium": 4, "flux": 3}.get(any_base.base.family, 2)
    assert np.array_equal(rendered(any_base), bare)
    assert any_base.is_golden()
    assert np.array_equal(rendered(any_base, stack=stack), with_it)
    assert addresses == {n: p.data_ptr() for n, p in any_base.denoiser.named_parameters()}


def test_it_starts_from_a_picture_and_paints_within_a_mask(any_base: WarmPipeline) -> None:
    picture = np.asarray(Image.effect_noise((32, 32), 80).convert("RGB"))
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    whole = rendered(any_base, source=Source(picture, None, 0.6, "sha256:x"))
    assert not np.array_equal(whole, rendered(any_base))
    assert np.array_equal(whole, rendered(any_base, source=Source(picture, None, 0.6, "sha256:x")))
    part = rendered(any_base, source=Source(picture, mask, 1.0, "sha256:x", "sha256:y"))
    assert np.array_equal(part[mask == 0], picture[mask == 0])
    assert not np.array_equal(part[mask == 255], picture[mask == 255])


class Steps(Kept):
    """Keeps the numbers of the steps that are told, and what is applied to a layer when they are."""

    def __init__(self, warm: WarmPipeline, layer: str) -> None:
        super().__init__()
        self.warm, self.layer = warm, layer
        self.told: list[int] = []
        self.acted: list[bool] = []

    def step(self, _: int, step: int) -> None:
        self.told.append(step)
        self.acted.append(not torch.equal(self.warm.live(self.layer), self.warm.golden(self.layer)))


@pytest.mark.parametrize("strength", [0.55, 0.5, 0.25, 1.0])
def test_every_step_from_a_picture_is_told_and_has_its_share_of_a_schedule(
    any_base: WarmPipeline, strength: float
) -> None:
    source = Source(np.asarray(Image.effect_noise((32, 32), 80).convert("RGB")), None, strength, "sha256:x")
    layer = any_base.layers()[0]
    kept, plan = Steps(any_base, layer), Plan(((Phase(0.5, 1.0),),))
    settings = Settings(prompt="a", steps=10, guidance=4.0, width=32, height=32)
    stack = alone({layer: dict(random_stack(any_base)[0][0])[layer]})
    render(any_base, settings, stack=stack, source=source, plan=plan, listener=kept)
    performed = any_base.variant("image").num_timesteps
    assert kept.told == [10 * (i + 1) // performed for i in range(performed)]
    assert kept.acted == [i / performed >= 0.5 for i in range(performed)]


def test_several_at_once_from_a_picture(any_base: WarmPipeline) -> None:
    source = Source(np.asarray(Image.effect_noise((32, 32), 80).convert("RGB")), None, 0.6, "sha256:x")
    kept = Kept()
    settings = Settings(prompt="a", steps=2, guidance=4.0, width=32, height=32, count=2, batch=2)
    render(any_base, settings, stack=(), source=source, listener=kept)
    one, two = kept.pictures
    assert not np.array_equal(one, two)


def test_words_emphasis_and_long_prompts(any_base: WarmPipeline) -> None:
    plain = rendered(any_base, "a red star")
    assert not np.array_equal(rendered(any_base, "a (red:1.5) star"), plain)
    assert np.array_equal(rendered(any_base, r"a (red:1.0) star"), plain)
    long = "a red star, " * 12
    assert not np.array_equal(rendered(any_base, long + "blue"), rendered(any_base, long + "green"))
    kinds = {kind: rows.table.shape[1] for kind, rows in any_base.words._rows.items()}
    word = Word("<glow>", {kind: torch.ones(2, width) for kind, width in kinds.items()})
    glowing = rendered(any_base, "a <glow> star", words=(word,))
    assert not np.array_equal(glowing, rendered(any_base, "a <glow> star"))
    assert np.array_equal(rendered(any_base, "a red star", words=(word,)), plain)


def test_a_word_is_forgotten_by_every_text_encoder_though_the_first_fails(small: Path) -> None:
    warm = warm_up(bases.find(str(small)))
    bare = warm.prompts.encode("glow").tensors["prompt_embeds"]
    kinds = {kind: rows.table.shape[1] for kind, rows in warm.words._rows.items()}
    word = Word("glow", {kind: torch.ones(2, width) for kind, width in kinds.items()})
    with Failing(sys.maxsize) as counted, warm.words.teach((word,)):
        done = counted.done
    with pytest.raises(RuntimeError, match="the device is gone"), Failing(done), warm.words.teach((word,)):
        pass
    assert torch.equal(warm.prompts.encode("glow", key="afterwards").tensors["prompt_embeds"], bare)


def test_the_pooled_embedding_is_read_where_the_text_ends_and_not_at_a_word(any_base: WarmPipeline) -> None:
    if any_base.base.family not in {"sdxl", "flux", *SD3}:
        pytest.skip("has no pooled embedding")
    vectors = {
        kind: r.table[r.ids("red")].clone() for kind, r in any_base.words._rows.items()
    }  # a word that means what another means
    with any_base.words.teach([Word("<same>", vectors)]):
        ours = any_base.prompts.encode("a <same> star").tensors["pooled_prompt_embeds"]
    torch.testing.assert_close(ours, any_base.prompts.encode("a red star").tensors["pooled_prompt_embeds"])


def test_a_prompt_that_says_where_the_text_ends_is_read_as_diffusers_reads_it(any_base: WarmPipeline) -> None:
    if any_base.base.family != "sdxl":
        pytest.skip("one family that has a pooled embedding is enough")
    told = "a <|endoftext|> star"
    ours = any_base.prompts.encode(told).tensors
    positive, _, pooled, _ = any_base.pipeline.encode_prompt(told, device="cpu")
    assert torch.equal(ours["prompt_embeds"], positive)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)


def test_a_prompt_that_only_t5_reads_whole_is_read_as_diffusers_reads_it(any_base: WarmPipeline) -> None:
    if any_base.base.family != "flux":
        pytest.skip("others take as many windows as a prompt needs")
    told = "a red star, " * 12
    ours = any_base.prompts.encode(told)
    positive, pooled, _ = any_base.pipeline.encode_prompt(told, None, device="cpu")
    assert torch.equal(ours.tensors["prompt_embeds"], positive)
    assert torch.equal(ours.tensors["pooled_prompt_embeds"], pooled)
    assert ours.dropped == 0


def test_a_negative_prompt_is_refused_where_there_is_none(any_base: WarmPipeline) -> None:
    if any_base.base.family == "flux":
        with pytest.raises(InvalidRequest, match="takes no negative prompt"):
            rendered(any_base, negative_prompt="blurry")
    else:
        assert not np.array_equal(rendered(any_base, negative_prompt="blurry"), rendered(any_base))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny SDXL."""
    return tiny("sdxl", tmp_path_factory.mktemp("small") / "Small XL")


def test_a_base_is_found_by_its_directory_under_a_name(small: Path) -> None:
    found = bases.find(str(small))
    assert (found.name, found.family, found.size, found.granularity) == ("small-xl", "sdxl", 32, 4)
    assert bases.find(f"mine={small}").name == "mine"
    assert bases.find("house=pocket").name == "house"
    assert (
        found.parameters
        == sum(
            p.numel()
            for model in ("unet", "vae", "text_encoder", "text_encoder_2")
            for p in getattr(warm_up(found).pipeline, model).parameters()
        )
        - 2 * 256 * 32
    )  # the rows for words


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda p: shutil.rmtree(p / "unet"), IncompatibleBase, r"unet/config\.json cannot be read"),
        (lambda p: shutil.rmtree(p / "tokenizer_2"), IncompatibleBase, "lacks tokenizer_2"),
        (lambda p: (p / "model_index.json").unlink(), InvalidRequest, "is no base"),
        (lambda p: (p / "model_index.json").write_text("["), IncompatibleBase, "cannot be read"),
        (lambda p: (p / "model_index.json").write_text("[]"), IncompatibleBase, "is no configuration"),
        (
            lambda p: (p / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"})),
            IncompatibleBase,
            "holds a WanPipeline; known are",
        ),
        (
            lambda p: (p / "vae" / "config.json").write_text("{}"),
            IncompatibleBase,
            "lists no block_out_channels",
        ),
        (
            lambda p: (p / "model_index.json").write_text(
                (p / "model_index.json").read_text().replace("EulerDiscreteScheduler", "LuckScheduler")
            ),
            IncompatibleBase,
            "names 'LuckScheduler' as its scheduler, which is none",
        ),
        (
            lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100),
            IncompatibleBase,
            "safetensors",
        ),
        (
            lambda p: _without(p / "text_encoder_2" / "model.safetensors", "layers.0.layer_norm2.weight"),
            IncompatibleBase,
            r"text_encoder_2 lacks '.*layers\.0\.layer_norm2\.weight'; download it again",
        ),
        (
            lambda p: _without(p / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias"),
            IncompatibleBase,
            r"unet lacks 'conv_in\.bias'; download it again",
        ),
        (
            lambda p: (p / "tokenizer_2" / "tokenizer.json").unlink(),
            IncompatibleBase,
            r"lacks tokenizer_2/vocab\.json, tokenizer_2/merges\.txt; download it again",
        ),
        (
            lambda p: _configured(p / "unet" / "config.json", sample_size="abc"),
            IncompatibleBase,
            r"unet/config\.json says that its sample_size is abc; download it again",
        ),
        (
            lambda p: _configured(p / "model_index.json", scheduler=None),
            IncompatibleBase,
            "names '' as its scheduler, which is none",
        ),
    ],
)
def test_a_damaged_directory_is_told(
    small: Path, tmp_path: Path, spoil: object, error: type[Exception], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    spoil(copy)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        warm_up(bases.find(str(copy)))


def _without(file: Path, ending: str) -> None:
    save_file({n: t for n, t in load_file(file).items() if not n.endswith(ending)}, file, {"format": "pt"})


def _configured(file: Path, **told: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


def test_a_tokenizer_that_lost_its_configuration_reads_one_window_all_the_same(
    small: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(small, tmp_path / "copy")
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    assert np.array_equal(rendered(warm_up(bases.find(str(copy)))), rendered(warm_up(bases.find(str(small)))))


def test_several_bases_share_a_budget_and_the_least_used_goes(small: Path, warm: WarmPipeline) -> None:
    one, two = bases.find(f"one={small}"), bases.find(f"two={small}")
    room = sum(exactly(warm).values()) + needs(one, warm.device)
    held = Residence(warm, [one, two], budget=room)
    assert held.warm("pocket") is warm
    first = held.warm("one")
    assert [w.base.name for w in held.loaded()] == ["pocket", "one"]
    assert held.warm("one") is first
    held.warm("two")
    assert [w.base.name for w in held.loaded()] == ["one", "two"]
    assert held.held() <= room
    with pytest.raises(InvalidRequest, match=r"needs about .* raise --memory"):
        Residence(warm, [one], budget=1000)
    with pytest.raises(InvalidRequest, match="two bases have the same name"):
        Residence(warm, [bases.find(f"pocket={small}")])


def test_a_base_that_goes_is_gone_before_the_next_is_loaded(
    small: Path, warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = bases.find(f"one={small}"), bases.find(f"two={small}")
    held = Residence(warm, [one, two], budget=sum(exactly(warm).values()) + needs(one, warm.device))
    gone = weakref.ref(held.warm("one"))
    held.warm("pocket")

    def fails(*_: object, **__: object) -> WarmPipeline:
        assert gone() is None
        raise IncompatibleBase("two cannot be loaded", field="base")

    monkeypatch.setattr("compose.residence.warm_up", fails)
    with pytest.raises(IncompatibleBase):
        held.warm("two")
    assert [w.base.name for w in held.loaded()] == ["pocket"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_loaded_component_by_component_as_diffusers_loads_it(family: str, tmp_path: Path) -> None:
    path, asked = tiny(family, tmp_path / family), []
    ours = load(bases.find(str(path)), device="cpu", dtype=torch.float32, check=lambda: asked.append(None))
    theirs = DiffusionPipeline.from_pretrained(path)
    models = [name for name, part in theirs.components.items() if isinstance(part, torch.nn.Module)]
    assert len(asked) == len(models) + 1
    assert ours.components.keys() == theirs.components.keys()
    for name in models:
        here, there = getattr(ours, name), getattr(theirs, name)
        assert (type(here), here.dtype) == (type(there), there.dtype)
        assert here.state_dict().keys() == there.state_dict().keys()
        assert all(torch.equal(t, there.state_dict()[key]) for key, t in here.state_dict().items())
    assert ours.scheduler.config == theirs.scheduler.config


def test_a_base_that_nobody_waits_for_any_more_is_not_loaded_to_its_end(
    small: Path, warm: WarmPipeline
) -> None:
    held = Residence(warm, [bases.find(f"one={small}")])
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        held.warm("one", check)
    assert [w.base.name for w in held.loaded()] == ["pocket"]
    assert held.warm("one") is held.warm("one")


def test_sdxl_in_half_precision_decodes_with_the_vae_it_had(small: Path) -> None:
    """diffusers' image to image leaves the VAE in half precision; the next picture must not."""
    half = warm_up(bases.find(str(small)), dtype=torch.float16)
    assert half.pipeline.vae.dtype == torch.float32
    before = rendered(half)
    noise = np.asarray(Image.effect_noise((32, 32), 80).convert("RGB"))
    rendered(half, source=Source(noise, None, 0.6, "sha256:x"))
    assert half.pipeline.vae.dtype == torch.float32
    assert np.array_equal(rendered(half), before)
    (tried,) = pictures(half, ["a star"], stack=(), seed=1, steps=1, guidance=4.0, check=lambda: None)
    assert tried.shape == (32, 32, 3)


def test_latents_in_half_precision_are_divided_in_that_of_the_vae(small: Path) -> None:
    half = warm_up(bases.find(str(small)), dtype=torch.float16)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    vae = half.pipeline.vae
    with torch.no_grad():
        ours = decode(half, latents, Settings(prompt="", width=32, height=32))
        theirs = vae.decode(latents.float() / vae.config.scaling_factor).sample[0]
    assert np.array_equal(ours, (theirs / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0))
