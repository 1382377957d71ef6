"""Scheduler options: what diffusers renders with the same configuration, checked by the class itself."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from compose import bases
from compose.bases import Base
from compose.errors import IncompatibleBase, InvalidRequest
from compose.render import render
from compose.schedulers import REFUSED, read_options, rehearse, scheduler, schedulers
from compose.settings import Settings
from compose.warm import WarmPipeline, warm_up
from tests.compose.test_families import Kept
from tests.pipelines import tiny

SDE = "DPMSolverMultistepScheduler"
SIZE: dict[str, Any] = {"steps": 5, "guidance": 4.0, "width": 32, "height": 32}


@pytest.fixture(scope="module", params=["sd1", "sdxl", "sd3", "flux"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny pipeline."""
    return tiny(request.param, tmp_path_factory.mktemp("schedulers") / request.param)


@pytest.fixture(scope="module")
def base(path: Path) -> WarmPipeline:
    """It, warm."""
    return warm_up(bases.find(str(path)))


def rendered(warm: WarmPipeline, name: str, told: dict[str, Any], **more: Any) -> list[np.ndarray]:
    options = read_options(warm.base, name, told)
    asked = {"seed": 5} | SIZE | more
    settings = Settings(prompt="a red star", scheduler=name, scheduler_options=options, **asked)
    rehearse(warm.base, name, options, settings.steps, width=settings.width, height=settings.height)
    kept = Kept()
    render(warm, settings, stack=(), listener=kept)
    return kept.pictures


def theirs(warm: WarmPipeline, kind: str, told: dict[str, Any]) -> np.ndarray:
    """What diffusers' own pipeline draws: with the same tensors, for products round by where they lie."""
    pipeline, own = warm.pipeline, warm.pipeline.scheduler
    generator = torch.Generator().manual_seed(5)
    pipeline.scheduler = getattr(diffusers, kind).from_config(warm.scheduler_config, **told)
    if "stochastic_sampling" in told or kind == "FlowMatchLCMScheduler":
        step = pipeline.scheduler.step
        pipeline.scheduler.step = lambda *args, **more: step(*args, generator=generator, **more)
    sd3 = {"max_sequence_length": 256} if warm.base.family == "sd3" else {}
    try:
        (image,) = pipeline(
            "a red star",
            generator=generator,
            num_inference_steps=5,
            guidance_scale=4.0,
            width=32,
            height=32,
            **sd3,
        ).images
    finally:
        pipeline.scheduler = own
    return np.asarray(image)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (SDE, {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        (SDE, {"timestep_spacing": "trailing", "euler_at_final": True, "solver_type": "heun"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "steps_offset": 0}),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "sigma_min": None}),
        ("UniPCMultistepScheduler", {"disable_corrector": [0, 1], "final_sigmas_type": "sigma_min"}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 2.5, "use_karras_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("LCMScheduler", {"original_inference_steps": 7}),
        ("TCDScheduler", {"original_inference_steps": 7}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 2.5}),
        ("FlowMatchLCMScheduler", {"shift": 2.5}),
    ],
)
def test_options_are_what_diffusers_makes_of_them(
    base: WarmPipeline, kind: str, told: dict[str, Any]
) -> None:
    if kind not in schedulers(base.base):
        pytest.skip("not for this family")
    sent = {name: float(v) if type(v) is int else v for name, v in told.items()}  # as they come over the wire
    (ours,) = rendered(base, kind, sent)
    assert np.array_equal(ours, theirs(base, kind, told))
    (plain,) = rendered(base, kind, {})
    assert not np.array_equal(ours, plain) or "sigma_min" in told
    (again,) = rendered(base, kind, sent)
    assert np.array_equal(ours, again)


@pytest.mark.parametrize(
    ("kind", "steps"), [("LCMScheduler", 51), ("TCDScheduler", 150), ("PNDMScheduler", 2)]
)
def test_steps_that_a_scheduler_cannot_do_are_refused_before_a_render(
    pocket: Base, kind: str, steps: int
) -> None:
    with pytest.raises(InvalidRequest, match=f"pocket cannot render {steps} steps of {kind}: ") as refused:
        rehearse(pocket, kind, (), steps)
    assert refused.value.field == "steps"
    rehearse(pocket, kind, (), 8)


@pytest.mark.filterwarnings("ignore:Should have t")
def test_a_scheduler_with_noise_of_its_own_draws_it_from_the_seed(base: WarmPipeline) -> None:
    pytest.importorskip("torchsde")
    if "DPMSolverSDEScheduler" not in schedulers(base.base):
        pytest.skip("not for this family")
    one, again, other = (rendered(base, "DPMSolverSDEScheduler", {}, seed=seed)[0] for seed in (5, 5, 6))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_edms_schedulers_are_offered_to_edms_models_alone(warm: WarmPipeline, tmp_path: Path) -> None:
    """They make a scheduler of another's configuration, and then noise of every picture."""
    diffusers.EDMEulerScheduler.from_config(warm.scheduler_config)
    assert "EulerDiscreteScheduler" in schedulers(warm.base)
    assert not [name for name in schedulers(warm.base) if name.startswith("EDM")]
    diffusers.EDMEulerScheduler().save_pretrained(tmp_path / "scheduler")
    edm = replace(warm.base, path=tmp_path, scheduler="EDMEulerScheduler")
    assert list(schedulers(edm)) == ["EDMEulerScheduler"]


def test_a_scheduler_that_the_bases_configuration_cannot_make_is_not_offered(tmp_path: Path) -> None:
    xl = bases.find(str(tiny("sdxl", tmp_path / "xl")))
    own = diffusers.EulerDiscreteScheduler.from_pretrained(xl.path / "scheduler")
    assert "EDMEulerScheduler" in {kind.__name__ for kind in own.compatibles}
    assert "EDMEulerScheduler" not in schedulers(xl)
    for name in schedulers(xl):
        assert type(scheduler(xl, dict(own.config), name)).__name__ == name
    (xl.path / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "lucky"}')
    with pytest.raises(
        IncompatibleBase, match=r"scheduler_config\.json makes no EulerDiscreteScheduler: lucky"
    ):
        schedulers(replace(xl, name="damaged"))


def test_noise_along_the_way_is_of_the_pictures_own_seed(base: WarmPipeline) -> None:
    stochastic = (
        (SDE, {"algorithm_type": "sde-dpmsolver++"})
        if SDE in schedulers(base.base)
        else ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})
    )
    first, second = rendered(base, *stochastic, count=2)
    assert not np.array_equal(first, second)
    (alone,) = rendered(base, *stochastic)
    assert np.array_equal(alone, first)
    both = rendered(base, *stochastic, count=2, batch=2)
    for one, other in zip(both, (first, second), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 2


@pytest.fixture(scope="module")
def pocket() -> Base:
    """The embedded base."""
    return bases.find("pocket")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"karras": True}, "has no option 'karras'; there are solver_order, .*use_karras_sigmas"),
        ({"use_karras_sigmas": 1.0}, "use_karras_sigmas .* cannot be '1.0'; it is true or false"),
        ({"solver_order": 2.5}, "cannot be '2.5'; it is a whole number"),
        ({"solver_order": True}, "cannot be 'True'; it is a whole number"),
        ({"solver_order": "3"}, "it is a whole number"),
        ({"solver_order": None}, "it is a whole number"),
        ({"solver_order": float("nan")}, "it is a whole number"),
        ({"solver_order": {"a": 1}}, "it is a whole number"),
        ({"algorithm_type": "magic"}, "it is 'dpmsolver' or 'dpmsolver\\+\\+'"),
        ({"prediction_type": "v_prediction"}, "prediction_type is not for a render to choose: it says what"),
        ({"num_train_timesteps": 10.0}, "the model was trained with its own"),
        ({"beta_start": 0.1}, "the model was trained with its own"),
        ({"trained_betas": [0.1]}, "the model was trained with its own"),
        ({f"o{i}": 1 for i in range(33)}, "33 options, the limit is 32"),
    ],
)
def test_options_that_are_none_are_refused(pocket: Base, told: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        read_options(pocket, SDE, told)
    assert refused.value.field == "scheduler_options"


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        (SDE, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "does not work with these options"),
        (SDE, {"algorithm_type": "dpmsolver"}, "does not work with these options.*final_sigmas_type"),
        (SDE, {"solver_order": 0.0}, "does not work with these options"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "no finite picture"),
        ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 5000.0}, "does not work with"),
        ("EulerDiscreteScheduler", {"interpolation_type": "rope"}, "does not work with these options"),
        ("EulerDiscreteScheduler", {"sigma_max": 1e300, "use_karras_sigmas": True}, "EulerDiscreteScheduler"),
    ],
)
def test_options_that_come_to_nothing_are_refused(
    pocket: Base, name: str, told: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        rehearse(pocket, name, read_options(pocket, name, told), 5)


SHIFTED = {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"base_image_seq_len": 256, "max_image_seq_len": 256}, "with these options: .*division by zero"),
        ({"base_shift": 1e6, "max_shift": 1e6}, "with these options: .*range"),
        ({"base_shift": -1e308, "max_shift": 1e308}, "comes to no finite picture in 5 steps"),
    ],
)
def test_a_shift_by_the_pictures_size_that_comes_to_nothing_is_refused(
    base: WarmPipeline, told: dict[str, Any], message: str
) -> None:
    if base.base.family not in {"sd3", "flux"}:
        pytest.skip("not for this family")
    with pytest.raises(InvalidRequest, match=message) as refused:
        rendered(base, "", SHIFTED | told)
    assert refused.value.field == "scheduler_options"


def test_the_size_that_is_rehearsed_is_the_renders_own(base: WarmPipeline) -> None:
    if base.base.family not in {"sd3", "flux"}:
        pytest.skip("not for this family")
    side = 32 // base.base.granularity
    steep = {"base_image_seq_len": side**2, "max_image_seq_len": side**2 + 1, "max_shift": 1e6}
    (small,) = rendered(base, "", SHIFTED | steep)
    assert not np.array_equal(small, rendered(base, "", {})[0])
    with pytest.raises(InvalidRequest, match=r"does not work with these options: .*range"):
        rendered(base, "", SHIFTED | steep, width=64)


def test_what_a_pipeline_cannot_compute_is_refused_where_nobody_rehearsed(base: WarmPipeline) -> None:
    if base.base.family not in {"sd3", "flux"}:
        pytest.skip("not for this family")
    options = read_options(base.base, "", SHIFTED | {"base_shift": 1e6, "max_shift": 1e6})
    settings = Settings(prompt="a red star", scheduler_options=options, **SIZE)
    with pytest.raises(InvalidRequest, match=r"cannot render 5 steps of .* like this: .*range"):
        render(base, settings, stack=(), listener=Kept())


def test_every_option_of_every_scheduler_is_read_or_refused_with_a_reason(pocket: Base) -> None:
    for name, kind in schedulers(pocket).items():
        for option, parameter in inspect.signature(kind.__init__).parameters.items():
            if option == "self" or parameter.default == -float("inf"):
                continue
            if option in REFUSED:
                with pytest.raises(InvalidRequest, match=f"{option} is not for a render to choose: "):
                    read_options(pocket, name, {option: parameter.default})
                continue
            ((read, value),) = read_options(pocket, name, {option: parameter.default})
            assert read == option
            assert (list(value) if isinstance(value, tuple) else value) == parameter.default
