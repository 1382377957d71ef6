"""Trial pictures and calibrations on bases of every family, at sizes that are not their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compose import bases, trial
from compose.calibrate import measure, reads
from compose.errors import IncompatibleBase, InvalidRequest
from compose.factors import Factors
from compose.families import adaptable, families
from compose.pocket.calibrate import Silent
from compose.settings import Settings
from compose.trial import pictures
from compose.warm import WarmPipeline, alone, warm_up
from tests.adapters import Layers
from tests.pipelines import FAMILIES, tiny

SIDE = 48
PROMPTS = ["a star", "a moon", "a red star, a very red one, on a hill of sand, with many words"]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WarmPipeline:
    return warm_up(bases.find(str(tiny(request.param, tmp_path_factory.mktemp("base") / request.param))))


def some(warm: WarmPipeline, *, scale: float = 0.3) -> Layers:
    """An adapter for every layer of a tiny base."""
    g = torch.Generator().manual_seed(3)
    shapes = {name: warm.live(name).shape for name in warm.layers()}
    return {
        name: Factors(torch.randn(d, 2, generator=g) * scale, torch.randn(2, k, generator=g) * scale)
        for name, (d, k) in shapes.items()
    }


def looked_at(warm: WarmPipeline, **more: object) -> list[np.ndarray]:
    told = {"stack": (), "seed": 4, "steps": 2, "guidance": 3.0, "check": lambda: None, **more}
    return pictures(warm, PROMPTS, **told)  # type: ignore[arg-type]


def test_a_base_shows_an_adapter_at_any_size(base: WarmPipeline) -> None:
    side = base.base.size
    assert side != SIDE
    own, bare = looked_at(base), looked_at(base, size=SIDE)
    assert {p.shape for p in own} == {(side, side, 3)}
    assert {p.shape for p in bare} == {(SIDE, SIDE, 3)}
    changed = looked_at(base, size=SIDE, stack=alone(some(base)))
    assert all((a != b).any() for a, b in zip(bare, changed, strict=True))
    again = looked_at(base, size=SIDE)
    assert all((a == b).all() for a, b in zip(bare, again, strict=True))
    base.apply(())


def test_large_pictures_come_in_smaller_batches(base: WarmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.BATCH_PIXELS // 1024**2 == 4
    whole = looked_at(base, size=SIDE)
    monkeypatch.setattr(trial, "BATCH_PIXELS", SIDE**2 + 1)
    single = looked_at(base, size=SIDE)
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(whole, single, strict=True)) <= 2


def test_pictures_that_do_not_fit_say_so(base: WarmPipeline) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = base.denoiser.register_forward_pre_hook(full)
    try:
        with pytest.raises(
            IncompatibleBase, match=f"pictures of {SIDE}x{SIDE}, [23] at once, do not fit"
        ) as caught:
            looked_at(base, size=SIDE)
        assert caught.value.field == "size"
    finally:
        hook.remove()


def test_layers_that_share_a_moment_read_the_same_tensor_and_what_is_measured_flowed(
    base: WarmPipeline,
) -> None:
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2).double())
        )
        for component in families()[base.base.family].components
        for name, module in adaptable(component.name, getattr(base.pipeline, component.name))
        if isinstance(module, nn.Linear)
    ]
    settings = Settings(prompt="", seed=1, steps=1, guidance=3.0, width=SIDE, height=SIDE)
    layers = some(base, scale=0.05)
    try:
        moments = measure(
            base, PROMPTS[:1], stack=alone(layers), settings=settings, listener=Silent(), rank=4096
        )
    finally:
        for hook in hooks:
            hook.remove()
        base.apply(())
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    by_input: dict[str, list[str]] = {}
    for name in inputs:
        by_input.setdefault(reads(name), []).append(name)
    assert set(moments) == {read for read, names in by_input.items() if inputs[names[0]].abs().sum() > 0}
    for read, (first, *others) in by_input.items():
        assert all(torch.equal(inputs[first], inputs[other]) for other in others), read
        if read in moments:
            G = inputs[first].mT @ inputs[first]
            G /= G.diagonal().mean()
            found = moments[read]
            dense = torch.diag(found.diagonal.double()) + found.factor.double() @ found.factor.double().mT
            assert (dense - G).norm() < 1e-3 * G.norm(), read
    assert any(len(names) > 1 for names in by_input.values())


def test_a_base_without_its_t5_is_measured_all_the_same(tmp_path: Path) -> None:
    warm = warm_up(bases.find(str(tiny("sd3", tmp_path / "sd3"))))
    warm.pipeline.text_encoder_3 = None
    settings = Settings(prompt="", seed=1, steps=1, guidance=3.0, width=SIDE, height=SIDE)
    without = WarmPipeline(warm.base, warm.pipeline)
    moments = measure(without, PROMPTS[:1], stack=(), settings=settings, listener=Silent())
    assert not any(name.startswith("text_encoder_3") for name in moments)


@pytest.mark.parametrize("kind", [ValueError, ZeroDivisionError, OverflowError])
def test_steps_that_a_scheduler_refuses_say_so(base: WarmPipeline, kind: type[Exception]) -> None:
    def refuses(*_: object) -> None:
        raise kind("this scheduler takes 5 steps or more")

    hook = base.denoiser.register_forward_pre_hook(refuses)
    try:
        with pytest.raises(
            InvalidRequest, match="cannot render 2 steps of 48x48: this scheduler takes"
        ) as caught:
            looked_at(base, size=SIDE)
        assert caught.value.field == "steps"
    finally:
        hook.remove()
