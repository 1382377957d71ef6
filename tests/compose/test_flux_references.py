"""IP-Adapters of FLUX.1: what diffusers itself renders with them, and the base's own processors afterwards;
tiny random ones in XLabs' layout.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from compose import bases
from compose.controls import Control
from compose.errors import IncompatibleBase
from compose.guiding import Guides, attached
from compose.references import Reference, find
from compose.render import render
from compose.schedule import Plan
from compose.settings import Settings
from compose.source import Source
from compose.warm import WarmPipeline, warm_up
from tests.companions import tiny_adapter, tiny_control, tiny_encoder
from tests.compose.test_families import Kept, random_stack
from tests.compose.test_references import TOLD, asked, drawn, noise, reference
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    """A tiny FLUX.1 with two IP-Adapters, which share an image encoder, and a ControlNet."""
    folder = tmp_path_factory.mktemp("flux")
    warm = warm_up(bases.find(f"tiny={tiny('flux', folder / 'base')}"))
    tiny_encoder(folder / "image_encoder")
    for seed, name in enumerate(("style", "mood")):
        tiny_adapter(warm, folder / f"{name}.safetensors", seed=seed)
    tiny_control(warm, folder / "net")
    told = [f"tiny:{name}={folder / name}.safetensors" for name in ("style", "mood")]
    (warm.base,) = attached([warm.base], references=told, controls=[f"tiny:edges={folder / 'net'}"])
    return warm


def theirs(warm: WarmPipeline, *references: Reference, **more: Any) -> np.ndarray:
    """What diffusers draws after its own `load_ip_adapter`; taken off again."""
    pipeline, own = FluxPipeline(**warm.pipeline.components), dict(warm.denoiser.attn_processors)
    pipeline.scheduler = type(pipeline.scheduler).from_config(warm.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    paths = {adapter.name: adapter.path for adapter in warm.base.references}
    folder = paths["style"].parent
    pipeline.load_ip_adapter(
        str(folder),
        weight_name=[paths[one.name].name for one in references],
        image_encoder_pretrained_model_name_or_path=str(folder / "image_encoder"),
        image_encoder_dtype=torch.float32,
        local_files_only=True,
    )
    try:
        pipeline.set_ip_adapter_scale([one.weight for one in references])
        (image,) = pipeline(
            "a red star",
            **asked(references),
            **more,
        ).images
    finally:
        del warm.denoiser.encoder_hid_proj
        warm.denoiser.set_attn_processor(own)
    return np.asarray(image)


@pytest.mark.parametrize("stacked", [False, True])
def test_it_renders_what_diffusers_renders(flux: WarmPipeline, stacked: bool) -> None:
    stack = random_stack(flux) if stacked else ()
    for references in (
        (reference("style"),),
        (reference("style", 0.3), reference("mood", 1.2, seed=2), reference("style", 0.5, seed=3)),
    ):
        (ours,) = drawn(flux, *references, stack=stack)
        assert np.array_equal(ours, theirs(flux, *references))
        assert np.array_equal(ours, drawn(flux, *references, stack=stack)[0])
        assert not np.array_equal(ours, drawn(flux, stack=stack)[0])


def test_a_render_without_is_what_it_was_before(flux: WarmPipeline) -> None:
    own = dict(flux.denoiser.attn_processors)
    (before,) = drawn(flux)
    drawn(flux, reference("style"), stack=random_stack(flux))
    assert np.array_equal(drawn(flux)[0], before)
    now = flux.denoiser.attn_processors
    assert all(now[name] is own[name] for name in own)
    assert now.keys() == own.keys()
    assert flux.is_golden()
    assert not hasattr(flux.denoiser, "encoder_hid_proj")
    assert "encoder_hid_dim_type" not in flux.denoiser.config


def test_a_cancel_in_the_middle_leaves_nothing(flux: WarmPipeline) -> None:
    own, (before,) = dict(flux.denoiser.attn_processors), drawn(flux)

    class Stops(Kept):
        def step(self, image: int, step: int) -> None:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        render(
            flux,
            Settings(prompt="a", **TOLD),
            stack=(),
            guides=Guides((), (reference("style"),)),
            listener=Stops(),
        )
    assert all(flux.denoiser.attn_processors[name] is own[name] for name in own)
    assert np.array_equal(drawn(flux)[0], before)


def test_from_a_picture_in_batches_and_with_a_control(flux: WarmPipeline) -> None:
    start = noise(7, 32)[:32]
    for mask in (None, np.pad(np.full((16, 16), 255, np.uint8), 8)):
        told: dict[str, Any] = {
            "source": Source(start, mask, 0.8, "sha256:s", "sha256:m" if mask is not None else "")
        }
        with_it = drawn(flux, reference("style"), **told)[0]
        assert not np.array_equal(with_it, drawn(flux, **told)[0])
        assert np.array_equal(with_it, drawn(flux, reference("style"), **told)[0])
    one, two = drawn(flux, reference("style"), count=2, batch=2)
    for seed, picture in ((5, one), (6, two)):
        (alone,) = drawn(flux, reference("style"), seed=seed)
        assert np.abs(picture.astype(int) - alone).max() <= 3
    edges = Control("edges", start, 0.8, 0.0, 1.0, "sha256:e")
    both = drawn(flux, reference("style"), controls=(edges,))[0]
    assert not np.array_equal(both, drawn(flux, controls=(edges,))[0])
    assert not np.array_equal(both, drawn(flux, reference("style"))[0])
    with pytest.raises(
        IncompatibleBase, match="takes both controls and references; leave out one"
    ) as refused:
        drawn(flux, reference("style"), controls=(edges,), source=Source(start, None, 0.8, "sha256:s"))
    assert refused.value.field == "references"


def test_in_composite_every_adapter_reads_it(flux: WarmPipeline) -> None:
    stack = (*random_stack(flux), *random_stack(flux))

    def composite(*references: Reference) -> np.ndarray:
        kept, guides = Kept(), Guides((), references)
        told: dict[str, Any] = {"stack": stack, "plan": Plan((), "composite"), "guides": guides}
        render(flux, Settings(prompt="a", **TOLD), listener=kept, **told)
        return kept.pictures[0]

    assert np.array_equal(composite(reference("style")), composite(reference("style")))
    assert not np.array_equal(composite(reference("style")), composite())


def test_what_does_not_fit_is_refused(flux: WarmPipeline, tmp_path: Path) -> None:
    place = flux.base.references[0].path
    encoder = place.parent / "image_encoder"
    tiny_encoder(tmp_path / "wide", projection_dim=40)
    with pytest.raises(IncompatibleBase, match="another image encoder: its embeddings are 24 wide, not 40"):
        find(f"tiny:it={place},{tmp_path / 'wide'}", [flux.base])
    tensors = load_file(place)
    del tensors["double_blocks.0.processor.ip_adapter_double_stream_v_proj.bias"]
    save_file(tensors, tmp_path / "lacks.safetensors")
    with pytest.raises(IncompatibleBase, match=r"another base than tiny: .*'0.to_v_ip.bias' there is none"):
        find(f"tiny:it={tmp_path / 'lacks.safetensors'},{encoder}", [flux.base])
    small = warm_up(bases.find(f"small={tiny('sd1', tmp_path / 'sd1')}"))
    plus = tiny_adapter(small, tmp_path / "plus.safetensors", kind="plus")
    with pytest.raises(IncompatibleBase, match=r"reads all patches of a picture, which .* with FLUX.1"):
        find(f"tiny:it={plus},{encoder}", [flux.base])
    with pytest.raises(IncompatibleBase, match=r"is for another base than small"):
        find(f"small:it={place},{encoder}", [small.base])
