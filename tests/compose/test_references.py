"""IP-Adapters: what diffusers itself renders with them, and the base's own processors afterwards; tiny random
ones for the tiny pipelines of every family that takes them.
"""

import json
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModelWithProjection

from compose import bases
from compose.controls import Control
from compose.errors import IncompatibleBase, InvalidRequest
from compose.guiding import Guides, attached
from compose.layerwise import Stack
from compose.references import EMBEDDED, Reference, find
from compose.render import Picture, render
from compose.residence import Residence, needs
from compose.settings import Settings
from compose.source import Source
from compose.warm import WarmPipeline, warm_up
from tests.companions import tiny_adapter, tiny_control, tiny_encoder
from tests.compose.test_families import Kept, random_stack
from tests.pipelines import tiny

TOLD: dict[str, Any] = {"seed": 5, "steps": 3, "guidance": 4.0, "width": 32, "height": 32}


def warm_with_adapters(family: str, folder: Path) -> WarmPipeline:
    """A tiny base with an IP-Adapter of each kind, which share an image encoder."""
    base = bases.find(f"tiny={tiny(family, folder / 'base')}")
    warm = warm_up(base)
    tiny_encoder(folder / "image_encoder")
    for seed, kind in enumerate(("pooled", "plus", "full")):
        tiny_adapter(warm, folder / f"{kind}.safetensors", kind=kind, seed=seed)
    tiny_control(warm, folder / "net")
    told = [f"tiny:{kind}={folder / kind}.safetensors" for kind in ("pooled", "plus", "full")]
    (warm.base,) = attached([base], references=told, controls=[f"tiny:edges={folder / 'net'}"])
    return warm


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    """A base of each family that takes IP-Adapters."""
    return warm_with_adapters(request.param, tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    """A tiny SD 1.5 with its IP-Adapters."""
    return warm_with_adapters("sd1", tmp_path_factory.mktemp("small"))


def noise(seed: int, width: int = 50) -> Picture:
    return np.random.default_rng(seed).integers(0, 255, (40, width, 3), np.uint8)


def reference(name: str, weight: float = 0.7, seed: int = 1) -> Reference:
    return Reference(name, noise(seed), weight, f"sha256:{seed}")


def drawn(
    warm: WarmPipeline,
    *references: Reference,
    controls: tuple[Control, ...] = (),
    stack: Stack = (),
    source: Source | None = None,
    **more: Any,
) -> list[Picture]:
    kept, guides = Kept(), Guides(controls, references)
    guides.check(warm.base, "image" if source else "")
    settings = Settings(prompt="a red star", **(TOLD | more))
    render(warm, settings, stack=stack, source=source, guides=guides, listener=kept)
    return kept.pictures


def asked(references: Iterable[Reference], guidance: float = 4.0) -> dict[str, Any]:
    """What diffusers' pipelines are called with, as TOLD says."""
    return {
        "ip_adapter_image": [Image.fromarray(one.picture) for one in references],
        "generator": torch.Generator().manual_seed(5),
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "width": 32,
        "height": 32,
    }


def theirs(warm: WarmPipeline, *references: Reference, guidance: float = 4.0) -> np.ndarray:
    """What diffusers draws after its own `load_ip_adapter`; taken off again."""
    pipeline, own = warm.pipeline, warm.denoiser.attn_processors
    paths = {adapter.name: adapter.path for adapter in warm.base.references}
    pipeline.scheduler = type(pipeline.scheduler).from_config(warm.scheduler_config)
    pipeline.load_ip_adapter(
        str(paths["pooled"].parent),
        subfolder="",
        weight_name=[paths[one.name].name for one in references],
        image_encoder_folder="image_encoder",
        local_files_only=True,
    )
    try:
        pipeline.set_ip_adapter_scale([one.weight for one in references])
        (image,) = pipeline(
            "a red star",
            **asked(references, guidance),
        ).images
    finally:
        pipeline.unload_ip_adapter()
        del warm.denoiser.encoder_hid_proj  # it leaves an empty module there
        warm.denoiser.encoder_hid_proj = None
        warm.denoiser.set_attn_processor(dict(own))
    return np.asarray(image)


@pytest.mark.parametrize("stacked", [False, True])
def test_it_renders_what_diffusers_renders(any_base: WarmPipeline, stacked: bool) -> None:
    stack = random_stack(any_base) if stacked else ()
    for references in (
        (reference("pooled"),),
        (reference("plus", 1.2),),
        (reference("full"),),
        (reference("pooled", 0.3), reference("plus", 0.8, seed=2), reference("pooled", 0.5, seed=3)),
    ):
        (ours,) = drawn(any_base, *references, stack=stack)
        assert np.array_equal(ours, theirs(any_base, *references))
        assert not np.array_equal(ours, drawn(any_base, stack=stack)[0])
    told = {"scheduler": "HeunDiscreteScheduler", "count": 2}
    assert len(drawn(any_base, reference("plus"), stack=stack, **told)) == 2
    (unguided,) = drawn(any_base, reference("plus"), stack=stack, guidance=1.0)
    assert np.array_equal(unguided, theirs(any_base, reference("plus"), guidance=1.0))


@contextmanager
def untouched(warm: WarmPipeline) -> Iterator[None]:
    """The UNet has the very processors, attributes and parameters afterwards that it had before."""
    unet: Any = warm.denoiser
    own = {name: id(processor) for name, processor in unet.attn_processors.items()}
    state = [(name, id(module), sorted(vars(module))) for name, module in unet.named_modules()]
    modules = {name: sorted(module._modules) for name, module in unet.named_modules()}
    (before,) = drawn(warm)
    yield
    assert {name: id(processor) for name, processor in unet.attn_processors.items()} == own
    assert [(name, id(module), sorted(vars(module))) for name, module in unet.named_modules()] == state
    assert {name: sorted(module._modules) for name, module in unet.named_modules()} == modules
    assert unet.encoder_hid_proj is None
    assert unet.config.encoder_hid_dim_type is None
    assert getattr(warm.pipeline, "image_encoder", None) is None
    assert np.array_equal(drawn(warm)[0], before)


def test_the_bases_own_is_put_back(any_base: WarmPipeline) -> None:
    with untouched(any_base):
        drawn(any_base, reference("pooled"), reference("plus"), stack=random_stack(any_base))


def test_the_bases_own_is_put_back_after_a_cancel_and_a_failure(any_base: WarmPipeline) -> None:
    class Stops(Kept):
        def step(self, image: int, step: int) -> None:
            raise TimeoutError

    guides, settings = Guides((), (reference("plus"),)), Settings(prompt="a", **TOLD)
    with untouched(any_base), pytest.raises(TimeoutError):
        render(any_base, settings, stack=random_stack(any_base), guides=guides, listener=Stops())
    spoilt = replace(any_base.base.references[0], path=Path("/nowhere.safetensors"), name="gone")
    whole = any_base.base
    with untouched(any_base):
        any_base.base = replace(whole, references=(*whole.references, spoilt))
        try:
            with pytest.raises(IncompatibleBase, match=r"/nowhere\.safetensors cannot be loaded"):
                drawn(any_base, reference("pooled"), reference("gone"))
        finally:
            any_base.base = whole


def test_with_a_control_from_a_picture_and_in_batches(any_base: WarmPipeline) -> None:
    edges = Control("edges", noise(7, 32)[:32], 0.8, 0.0, 1.0, "sha256:e")
    both = drawn(any_base, reference("plus"), controls=(edges,))[0]
    assert not np.array_equal(both, drawn(any_base, reference("plus"))[0])
    assert not np.array_equal(both, drawn(any_base, controls=(edges,))[0])
    start = Source(noise(8, 32)[:32], None, 1.0, "sha256:s")
    assert not np.array_equal(
        drawn(any_base, reference("plus"), source=start)[0], drawn(any_base, source=start)[0]
    )
    one, two = drawn(any_base, reference("plus"), count=2)
    assert np.array_equal(two, drawn(any_base, reference("plus"), seed=6)[0])
    for alone, together in zip((one, two), drawn(any_base, reference("plus"), count=2, batch=2), strict=True):
        assert np.abs(alone.astype(int) - together).max() <= 2


def test_embeddings_are_made_once_for_a_picture(small: WarmPipeline) -> None:
    drawn(small, reference("pooled"))
    encoder: Any = small.beside[small.base.references[0].encoder.path]  # type: ignore[union-attr]
    calls: list[int] = []
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        first = drawn(small, reference("pooled", seed=4))[0]
        assert len(calls) == 1
        assert np.array_equal(drawn(small, reference("pooled", seed=4))[0], first)
        assert len(calls) == 1
        drawn(small, *(reference("pooled", seed=seed) for seed in (5, 6)))
        assert len(calls) == 3
    finally:
        hook.remove()
    adapter: Any = small.beside[small.base.references[0].path]
    for seed in range(100, 100 + EMBEDDED + 1):
        adapter.embed(small, small.base.references[0], reference("pooled", seed=seed))
    assert len(adapter._embeds) == EMBEDDED


def test_adapters_of_one_file_are_told_what_their_own_encoders_say(tmp_path: Path) -> None:
    warm = warm_up(bases.find("pocket"))
    tiny_adapter(warm, tmp_path / "it.safetensors")
    encoders = {"one": tiny_encoder(tmp_path / "one", seed=1), "two": tiny_encoder(tmp_path / "two", seed=2)}
    told = [f"pocket:{name}={tmp_path / 'it.safetensors'},{path}" for name, path in encoders.items()]
    (warm.base,) = attached([warm.base], references=told)
    one, two = (drawn(warm, reference(name))[0] for name in encoders)
    assert not np.array_equal(two, one)
    fresh = warm_up(warm.base)
    assert np.array_equal(two, drawn(fresh, reference("two"))[0])
    assert np.array_equal(one, drawn(fresh, reference("one"))[0])


def test_values_and_names_that_are_none_are_refused(small: WarmPipeline) -> None:
    for weight in (float("nan"), -0.1, 2.1):
        with pytest.raises(InvalidRequest, match=r"references\[0\].weight .* is not within 0 and 2"):
            Guides((), (reference("pooled", weight),)).check(small.base, "")
    with pytest.raises(
        InvalidRequest, match="tiny has no IP-Adapter 'face'; it has pooled, plus, full"
    ) as refused:
        Guides((), (reference("pooled"), reference("face"))).check(small.base, "")
    assert refused.value.field == "references[1].name"
    with pytest.raises(InvalidRequest, match=r"it has none \(atelier serve --ip-adapter\)"):
        Guides((), (reference("pooled"),)).check(replace(small.base, references=()), "")
    with pytest.raises(InvalidRequest, match="5 references, the limit is 4"):
        Guides((), (reference("pooled"),) * 5).check(small.base, "")


@pytest.fixture
def copy(small: WarmPipeline, tmp_path: Path) -> Path:
    """A directory with an IP-Adapter and its image encoder."""
    folder = small.base.references[0].path.parent
    shutil.copytree(folder / "image_encoder", tmp_path / "image_encoder")
    shutil.copy(folder / "pooled.safetensors", tmp_path / "it.safetensors")
    return tmp_path


def test_a_whole_clip_is_an_image_encoder(small: WarmPipeline, copy: Path) -> None:
    """As openai/clip-vit-large-patch14 is published, which FLUX.1's read with."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(copy / "image_encoder")
    text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    parts = {"text_config": text.to_dict(), "vision_config": encoder.config.to_dict()}
    whole = CLIPModel(CLIPConfig(**parts, projection_dim=24))
    whole.load_state_dict(encoder.state_dict(), strict=False)
    whole.save_pretrained(copy / "whole")
    warm = warm_up(replace(small.base, references=()))
    (warm.base,) = attached(
        [warm.base], references=[f"tiny:pooled={copy / 'it.safetensors'},{copy / 'whole'}"]
    )
    assert warm.base.references[0].encoder.parameters == small.base.references[0].encoder.parameters  # type: ignore[union-attr]
    assert np.array_equal(drawn(warm, reference("pooled"))[0], drawn(small, reference("pooled"))[0])


def test_an_encoder_in_half_precision_alone_is_one(small: WarmPipeline, copy: Path) -> None:
    encoder = copy / "image_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    warm = warm_up(replace(small.base, references=()))
    (warm.base,) = attached([warm.base], references=[f"tiny:pooled={copy / 'it.safetensors'}"])
    assert np.array_equal(drawn(warm, reference("pooled"))[0], drawn(small, reference("pooled"))[0])


def test_a_directory_with_both_is_found(small: WarmPipeline, copy: Path) -> None:
    _, found = find(f"tiny:it={copy}", [small.base])
    assert (found.kind, found.path) == ("pooled", copy / "it.safetensors")
    assert found.digest == small.base.references[0].digest
    shutil.copy(copy / "it.safetensors", copy / "other.safetensors")
    with pytest.raises(InvalidRequest, match="holds 2 files of weights"):
        find(f"tiny:it={copy}", [small.base])
    shutil.move(copy / "image_encoder", copy / "elsewhere")
    with pytest.raises(InvalidRequest, match=r"there is no directory .*image_encoder"):
        find(f"tiny:it={copy / 'it.safetensors'}", [small.base])
    assert find(f"tiny:it={copy / 'it.safetensors'},{copy / 'elsewhere'}", [small.base])[1].encoder


def changed(**change: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "image_encoder" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return apply


def without(key: str, **instead: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "it.safetensors")
        del tensors[key]
        tensors |= {name: torch.zeros(shape) for name, shape in instead.items()}
        save_file(tensors, folder / "it.safetensors")

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "it.safetensors").write_bytes(b"\0" * 99), "it.safetensors cannot be read"),
        (without("image_proj.proj.weight"), "reads no pictures: it is for face embeddings"),
        (without("image_proj.norm.bias"), 'it.safetensors is damaged: .*Missing key.* "norm.bias"'),
        (without("ip_adapter.1.to_k_ip.weight"), "for another base than tiny: .* there is none"),
        (without("ip_adapter.1.to_k_ip.weight", **{"lora.a": (1,)}), "is no IP-Adapter: it holds 'lora.a'"),
        (lambda p: (p / "image_encoder" / "config.json").unlink(), "cannot be read"),
        (lambda p: (p / "image_encoder" / "model.safetensors").unlink(), "is missing; download it again"),
        (changed(model_type="siglip"), "is no CLIP image encoder, but a 'siglip'"),
        (changed(num_hidden_layers=2), "is damaged: its weights are"),
        (changed(hidden_size="x"), "makes no image encoder"),
    ],
)
def test_what_is_damaged_is_refused_before_serving(
    small: WarmPipeline, copy: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(copy)
    with pytest.raises(IncompatibleBase, match=message) as refused:
        find(f"tiny:it={copy / 'it.safetensors'}", [small.base])
    assert refused.value.field == "ip-adapter"


def test_what_is_for_another_base_or_encoder_is_refused(
    small: WarmPipeline, copy: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    xl = warm_with_adapters("sdxl", other / "xl")
    with pytest.raises(IncompatibleBase, match=r"is for another base than tiny: .*to_k_ip"):
        find(f"tiny:xl={xl.base.references[0].path}", [small.base])
    tiny_encoder(other / "wide", projection_dim=40)
    with pytest.raises(IncompatibleBase, match="another image encoder: its embeddings are 24 wide, not 40"):
        find(f"tiny:it={copy / 'it.safetensors'},{other / 'wide'}", [small.base])
    sd3 = bases.find(f"sd3={tiny('sd3', other / 'sd3')}")
    with pytest.raises(
        IncompatibleBase, match=r"are for Stable Diffusion 1, 2 and XL and FLUX.1; sd3 is sd3"
    ):
        find(f"sd3:it={copy}", [sd3])
    with pytest.raises(InvalidRequest, match="pickled weights are not opened"):
        find("tiny:it=/x/ip-adapter.bin", [small.base])
    with pytest.raises(InvalidRequest, match="there is no base 'nobody'; there is tiny"):
        find("nobody:it=/x", [small.base])
    with pytest.raises(InvalidRequest, match="tiny has two IP-Adapters plus"):
        attached([small.base], references=[f"tiny:plus={small.base.references[1].path}"])


def test_a_budget_counts_them_with_one_encoder_and_they_go_with_their_base(small: WarmPipeline) -> None:
    pooled, plus, _ = small.base.references
    whole = replace(small.base, controls=(), references=(pooled, plus))
    assert pooled.encoder
    beside = 4 * (pooled.parameters + plus.parameters + pooled.encoder.parameters)
    assert needs(whole, small.device) - needs(replace(whole, references=()), small.device) == beside
    again = replace(
        whole, references=(pooled, plus, replace(pooled, name="again"))
    )  # the same file: one load
    assert needs(again, small.device) == needs(whole, small.device)
    one, two = (replace(small.base, name=name) for name in ("one", "two"))
    held = Residence(small, [one, two], budget=2 * needs(one, small.device))
    first = held.warm("one")
    size = first.nbytes()
    drawn(first, reference("pooled"))
    assert first.nbytes() - size >= 4 * (pooled.parameters + pooled.encoder.parameters)
    adapter = weakref.ref(first.beside[pooled.path])
    held.warm("two")
    held.warm("tiny")
    del first
    assert adapter() is None


def test_a_memory_that_is_full_is_told(small: WarmPipeline) -> None:
    drawn(small, reference("pooled"))
    encoder: Any = small.beside[small.base.references[0].encoder.path]  # type: ignore[union-attr]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = encoder.register_forward_pre_hook(full)
    try:
        with pytest.raises(
            IncompatibleBase, match=r"what steers this render \(pooled\) does not fit"
        ) as told:
            drawn(small, reference("pooled", seed=77))
    finally:
        hook.remove()
    assert told.value.field == "references"
    drawn(small, reference("pooled", seed=77))
