"""Words in every layout: of one encoder and of two, one word and several, alone and along with a LoRA."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compose import formats
from compose.errors import IncompatibleBase, NonFinite, UnsupportedLayout
from compose.families import table
from compose.formats.naming import spellings
from tests.adapters import assert_same, random_factors, sketch, write_kohya

L, G, T5 = torch.randn(3, 768), torch.randn(3, 1280), torch.randn(3, 4096)


def loaded(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = sketch(path)
    return {word.token: dict(word.vectors) for word in formats.load_words(path, found)}


@pytest.mark.parametrize(
    ("tensors", "layout", "family", "token", "kinds"),
    [
        ({"<glow>": L}, "learned_embeds", "sd1", "<glow>", [""]),
        ({"<glow>": L[0]}, "learned_embeds", "sd1", "<glow>", [""]),
        ({"emb_params": L}, "emb_params", "sd1", "", [""]),
        ({"string_to_param.*": torch.randn(2, 1024)}, "emb_params", "sd2", "", [""]),
        ({"clip_l": L, "clip_g": G}, "sdxl-embedding", "sdxl", "", ["clip_l", "clip_g"]),
        ({"clip_l": L, "t5": T5}, "embedding", "flux", "", ["clip_l", "t5"]),
        ({"clip_l": L, "t5xxl": T5}, "embedding", "flux", "", ["clip_l", "t5"]),
        (
            {"bundle_emb.<glow>.clip_l": L, "bundle_emb.<glow>.clip_g": G},
            "bundle",
            "sdxl",
            "<glow>",
            ["clip_l", "clip_g"],
        ),
    ],
)
def test_a_textual_inversion_in_each_layout(
    tmp_path: Path, tensors: dict[str, torch.Tensor], layout: str, family: str, token: str, kinds: list[str]
) -> None:
    save_file(tensors, tmp_path / "a")
    found = sketch(tmp_path / "a")
    assert (found.layout, found.is_words, found.token, found.tokens) == (layout, True, token, ())
    binding = formats.infer(found)
    assert (binding.family, binding.total, binding.unbound) == (family, 1, ())
    (word,) = formats.load_words(tmp_path / "a", found)
    assert sorted(word.vectors) == sorted(kinds)
    for mine, told in zip(
        sorted(word.vectors.values(), key=lambda t: t.shape[1]),
        sorted(tensors.values(), key=lambda t: t.shape[-1]),
        strict=True,
    ):
        assert torch.equal(mine, told.reshape(-1, told.shape[-1]))


def test_pivotal_tuning_has_a_word_for_every_row(tmp_path: Path) -> None:
    save_file({"text_encoders_0": L, "text_encoders_1": G}, tmp_path / "a")
    found = sketch(tmp_path / "a")
    assert (found.layout, found.tokens, found.rank) == ("pivotal", ("<s0>", "<s1>", "<s2>"), 3)
    assert formats.infer(found).family == "sdxl"
    words = loaded(tmp_path / "a")
    assert torch.equal(words["<s1>"]["clip_l"], L[1:2])
    assert torch.equal(words["<s2>"]["clip_g"], G[2:])
    save_file({"text_encoders_0": L, "text_encoders_1": T5}, tmp_path / "b")
    assert formats.infer(sketch(tmp_path / "b")).family == "flux"


def test_several_words_under_their_own_names(tmp_path: Path) -> None:
    save_file({"<a>": L, "<b>": L[0].clone()}, tmp_path / "a")
    found = sketch(tmp_path / "a")
    assert (found.tokens, found.token, formats.infer(found).family) == (("<a>", "<b>"), "", "sd1")
    assert torch.equal(loaded(tmp_path / "a")["<b>"][""], L[:1])


@pytest.mark.parametrize(
    "key",
    [
        "bundle_emb.<my.word>.string_to_param.*",
        "bundle_emb.<my.word>.clip_l",
        "bundle_emb.<my.word>.emb_params",
    ],
)
def test_a_lora_with_a_word_is_one_of_both(tmp_path: Path, key: str) -> None:
    layers, vectors = random_factors("pocket", seed=1, rank=2), torch.randn(2, 96)
    write_kohya(tmp_path / "a", layers)
    save_file({**load_file(tmp_path / "a"), key: vectors}, tmp_path / "b")
    found = sketch(tmp_path / "b")
    assert (found.layout, found.is_words, found.tokens, found.token) == ("kohya", False, ("<my.word>",), "")
    binding = formats.infer(found)
    assert (binding.family, binding.unbound) == ("pocket", ())
    assert_same(formats.load(tmp_path / "b", binding), layers)
    (vector,) = loaded(tmp_path / "b")["<my.word>"].values()
    assert torch.equal(vector, vectors)


def test_the_words_of_lora_diffusion_are_marked_in_its_metadata(tmp_path: Path) -> None:
    module, word = table("pocket")[spellings("pocket")["unet:0"][0].name], torch.randn(96)
    up, down = torch.randn(module.d, 4), torch.randn(4, module.k)
    save_file(
        {"unet:0:up": up, "unet:0:down": down, "<s1>": word},
        tmp_path / "a",
        metadata={"<s1>": "<embed>", "unet": "[]"},
    )
    found = sketch(tmp_path / "a")
    assert (found.layout, found.tokens, found.leftovers) == ("lora_diffusion", ("<s1>",), ())
    assert torch.equal(loaded(tmp_path / "a")["<s1>"][""], word[None])
    save_file({"unet:0:up": up, "unet:0:down": down, "<s1>": word}, tmp_path / "b")
    assert sketch(tmp_path / "b").leftovers == ("<s1>",)


def test_onetrainers_output_embeddings_and_words_for_another_base_are_named(tmp_path: Path) -> None:
    layers = random_factors("pocket", seed=1, rank=2)
    write_kohya(tmp_path / "a", layers)
    more = {
        "bundle_emb.<w>.clip_l": torch.randn(2, 96),
        "bundle_emb.<w>.clip_l_out": torch.randn(2, 96),
        "bundle_emb.<x>.clip_g": G,
    }
    save_file({**load_file(tmp_path / "a"), **more}, tmp_path / "b")
    binding = formats.bind(sketch(tmp_path / "b"), "pocket")
    assert set(binding.unbound) == {"bundle_emb.<w>.clip_l_out", "bundle_emb.<x>.clip_g"}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"clip_l": (2, 768), "clip_g": (3, 1280)}, "clip_l has 2 vectors and clip_g has 3 vectors"),
        ({"bundle_emb.<w>.clip_l": (76, 768)}, "76 vectors for one word"),
        ({"bundle_emb.<w>.clip_l": (2, 3, 768)}, "is no word"),
        ({f"bundle_emb.<{i}>.clip_l": (1, 768) for i in range(65)}, "65 words in one file"),
        ({"text_encoders_0": (2, 768), "text_encoders_1": (1, 1280)}, "must be for one word"),
        ({"<a>": (2, 768), "<b>": (2, 1024)}, "no LoRA or textual inversion layout"),
    ],
)
def test_words_that_cannot_be_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UnsupportedLayout, match=message):
        formats.recognise(shapes, {})


def test_words_for_two_encoders_do_not_fit_a_base_with_one(tmp_path: Path) -> None:
    save_file({"clip_l": L, "clip_g": G}, tmp_path / "a")
    with pytest.raises(IncompatibleBase, match="a has word vectors of 768 and 1280 numbers, sd1 takes 768"):
        formats.require(sketch(tmp_path / "a"), "sd1", what="a")
    save_file({"<w>": L}, tmp_path / "b")
    with pytest.raises(IncompatibleBase, match="b has word vectors of 768 numbers, sdxl takes 768 and 1280"):
        formats.require(sketch(tmp_path / "b"), "sdxl", what="b")


def test_half_a_word_fits_no_base_of_two_encoders(tmp_path: Path) -> None:
    save_file({"clip_g": G}, tmp_path / "a")
    assert formats.infer(sketch(tmp_path / "a")).family == ""
    with pytest.raises(IncompatibleBase, match="a has word vectors of 1280 numbers, sdxl takes 768 and 1280"):
        formats.require(sketch(tmp_path / "a"), "sdxl", what="a")


def test_a_word_for_clip_l_alone_fits_two_families_and_none_is_chosen(tmp_path: Path) -> None:
    save_file({"clip_l": L}, tmp_path / "a")
    assert formats.infer(sketch(tmp_path / "a")).family == ""
    assert formats.require(sketch(tmp_path / "a"), "flux", what="a").unbound == ()


def test_a_word_for_both_clips_is_sdxls_unless_it_says_otherwise_and_works_on_sd3_all_the_same(
    tmp_path: Path,
) -> None:
    both = {"clip_l": L, "clip_g": G}
    save_file(both, tmp_path / "a")
    save_file(both, tmp_path / "b", metadata={"modelspec.architecture": "stable-diffusion-3-medium"})
    save_file({**both, "t5": torch.randn(3, 4096)}, tmp_path / "c")
    found = [formats.infer(sketch(tmp_path / name)).family for name in "abc"]
    assert found == ["sdxl", "sd3", ""]
    for name in "abc":
        for family in ("sd3", "sd35-medium", "sd35-large"):
            assert formats.require(sketch(tmp_path / name), family, what=name).unbound == ()
    for wrong in ({"clip_l": L}, {"clip_g": G, "t5": torch.randn(3, 4096)}, {"<w>": L}):
        save_file(wrong, tmp_path / "d")
        with pytest.raises(IncompatibleBase, match="sd3 takes 768 and 1280 and 4096"):
            formats.require(sketch(tmp_path / "d"), "sd3", what="d")


def test_nan_in_a_bundled_word_is_found(tmp_path: Path) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=2))
    key = "bundle_emb.<w>.clip_l"
    save_file({**load_file(tmp_path / "a"), key: torch.full((1, 96), torch.nan)}, tmp_path / "b")
    with pytest.raises(NonFinite, match="bundle_emb"):
        formats.load_words(tmp_path / "b", sketch(tmp_path / "b"))
    binding = formats.bind(sketch(tmp_path / "b"), "pocket")
    with formats.layers(tmp_path / "b", binding) as found, pytest.raises(NonFinite, match="bundle_emb"):
        found.check_others()


def test_onetrainers_embeddings_come_with_outputs_that_are_named(tmp_path: Path) -> None:
    save_file({"emb_params": L, "emb_params_out": L.clone()}, tmp_path / "a")
    binding = formats.bind(sketch(tmp_path / "a"), "sd1")
    assert (len(binding.bound), binding.unbound) == (1, ("emb_params_out",))
    save_file({"bundle_emb.<w>.clip_l": torch.randn(2, 1024)}, tmp_path / "b")
    assert formats.infer(sketch(tmp_path / "b")).family == "sd2"
    both = {"clip_l": L, "clip_g": G}
    save_file({**both, **{f"{k}_out": v.clone() for k, v in both.items()}}, tmp_path / "c")
    binding = formats.infer(sketch(tmp_path / "c"))
    assert (binding.family, set(binding.unbound)) == ("sdxl", {"clip_l_out", "clip_g_out"})
