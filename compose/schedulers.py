"""Schedulers by their names in diffusers: those a base's own is compatible with, fresh for each render, with
options of the class's own signature.

    options = read_options(base, "DEISMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3.0})
    rehearse(base, "DEISMultistepScheduler", options, steps=20, width=512, height=512)
    scheduler(base, config, "DEISMultistepScheduler", options)
    # DEISMultistepScheduler.from_config(config, use_karras_sigmas=True, solver_order=3)

What a scheduler shares with the training of the model is no option: another value there is not another way
through the same noise, but noise that the model does not know.
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from compose.bases import Base, read_config
from compose.errors import IncompatibleBase, InvalidRequest, first_line
from compose.families import families
from compose.settings import Option, Options

OPTIONS_LIMIT, TEXT_LIMIT, LIST_LIMIT, WHOLE_LIMIT = 32, 64, 150, 1 << 16
FIELD = "scheduler_options"
_TRAINED = "the model was trained with its own and would be asked for what it never learned"
REFUSED: Mapping[str, str] = {
    "num_train_timesteps": _TRAINED,
    "beta_start": _TRAINED,
    "beta_end": _TRAINED,
    "beta_schedule": _TRAINED,
    "trained_betas": _TRAINED,
    "rescale_betas_zero_snr": _TRAINED,
    "sigma_data": _TRAINED,
    "use_flow_sigmas": _TRAINED,
    "invert_sigmas": _TRAINED,
    "prediction_type": "it says what the model predicts, which is the model's own",
    "variance_type": "it says what the model predicts, which is the model's own",
    "timestep_type": "it says how the model is told the time, which is the model's own",
    "solver_p": "it is a scheduler itself",
}
"""Options that are no way through the noise, with the reason."""
ALSO: Mapping[str, tuple[str, ...]] = {
    "unet": ("LCMScheduler", "TCDScheduler"),
    "transformer": ("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
}
"""Those that step-distilled adapters are made for (LCM, Hyper-SD), and flow matching's others: diffusers
takes them with `from_config`, and lists none as compatible with anything."""


@functools.cache
def schedulers(base: Base) -> dict[str, Any]:
    """The schedulers that a base can be rendered with, by name; the base's own is the first. Not those that
    are compatible by name and cannot be made of the base's configuration, nor EDM's where the base's own is
    not: those tell a model the logarithm of the noise for the time, and take what it predicts for another.
    """
    own, config = getattr(diffusers, base.scheduler), _config(base)
    unet = bool(families()[base.family].config("unet"))
    names = {str(getattr(kind, "__name__", kind)) for kind in own._compatibles}
    names |= {*ALSO["unet" if unet else "transformer"]}
    names = {n for n in names if n.startswith("EDM") == base.scheduler.startswith("EDM")}
    kinds = {name: getattr(diffusers, name, None) for name in sorted(names - {base.scheduler})}
    here: dict[str, Any] = {
        n: kind for n, kind in kinds.items() if isinstance(kind, type) and not hasattr(kind, "_backends")
    }
    if base.family == "flux":  # its pipeline says the sigmas itself
        here = {n: kind for n, kind in here.items() if "sigmas" in _told(kind.set_timesteps)}
    return {base.scheduler: own} | {n: kind for n, kind in here.items() if _made(kind, config)}


def _config(base: Base) -> dict[str, Any]:
    """A base's own scheduler's, with its defaults. Raises IncompatibleBase."""
    own, path = getattr(diffusers, base.scheduler), base.path / "scheduler" / "scheduler_config.json"
    try:
        return dict(own.from_config(read_config(path)).config)
    except IncompatibleBase:
        raise
    except Exception as error:  # whatever a class says of a configuration
        raise IncompatibleBase(
            f"{path} makes no {base.scheduler}: {first_line(error)[:300]}", field="base"
        ) from None


def _made(kind: Any, config: dict[str, Any]) -> bool:
    """Whether a configuration makes a scheduler of this class."""
    try:
        kind.from_config(config)
    except Exception:  # as above
        return False
    return True


def scheduler(base: Base, config: dict[str, Any], name: str = "", options: Options = ()) -> Any:
    """A fresh scheduler; "" is the base's own. Raises InvalidRequest for one that does not fit the base, and
    for options that do not go together.
    """
    kind, more = kind_of(base, name), {n: list(v) if isinstance(v, tuple) else v for n, v in options}
    if not more:
        return kind.from_config(config)
    try:
        return kind.from_config(config, **more)
    except Exception as error:  # whatever a class says of values that it takes one by one
        raise _refusal(kind, error) from None


def seeded(scheduler: Any, generator: torch.Generator | list[torch.Generator]) -> None:
    """Lets a stochastic scheduler draw from these: the pipelines of SD3 and FLUX.1 hand it none, and DPM++
    SDE takes a seed.
    """
    if "generator" in _told(scheduler.step):
        scheduler.step = functools.partial(scheduler.step, generator=generator)
    elif getattr(scheduler, "noise_sampler_seed", 0) is None:
        each = generator if isinstance(generator, list) else [generator]
        scheduler.noise_sampler_seed = [one.initial_seed() for one in each]


def _told(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def read_options(base: Base, name: str, told: Mapping[str, Any]) -> Options:
    """Options as they are sent, where every number may have come as a float, checked by the signature of the
    scheduler `name` ("": the base's own). Raises InvalidRequest.
    """
    if not told:
        return ()
    kind = kind_of(base, name)
    parameters = dict(inspect.signature(kind.__init__).parameters)
    parameters.pop("self")
    known = [option for option in parameters if option not in REFUSED]
    if len(told) > OPTIONS_LIMIT:
        raise InvalidRequest(f"{len(told)} options, the limit is {OPTIONS_LIMIT}", field=FIELD)
    found = []
    for option, value in sorted(told.items()):
        if option in parameters and option in REFUSED:
            raise InvalidRequest(f"{option} is not for a render to choose: {REFUSED[option]}", field=FIELD)
        if option not in parameters:
            raise InvalidRequest(
                f"{kind.__name__} has no option {option[:TEXT_LIMIT]!r}; there are {', '.join(known)}",
                field=FIELD,
            )
        parameter = parameters[option]
        choices = _choices(parameter.annotation)
        if parameter.default is None:
            choices = (*choices, type(None))
        for choice in choices:
            matches, read = _as(value, choice)
            if matches:
                found.append((option, read))
                break
        else:
            raise InvalidRequest(
                f"{option} of {kind.__name__} cannot be {str(value)[:TEXT_LIMIT]!r}; "
                f"it is {' or '.join(map(_word, choices))}",
                field=FIELD,
            )
    return tuple(found)


def rehearse(base: Base, name: str, options: Options, steps: int, *, width: int = 0, height: int = 0) -> None:
    """Counts the steps out, and with options goes all of them on a few numbers instead of a picture of this
    size in pixels (0: the base's own). Raises InvalidRequest where they are too many or too few for the
    scheduler, and where its options, good one by one, come to nothing: a refusal of its own, an index beyond
    its table, not a number.
    """
    columns, rows = ((side or base.size) // base.granularity for side in (width, height))
    flows = not families()[base.family].config("unet")  # their pipelines shift by the picture's size
    _rehearse(base, name, options, steps, columns * rows if flows else 0)


@functools.lru_cache(maxsize=1024)
def _rehearse(base: Base, name: str, options: Options, steps: int, patches: int) -> None:
    """`patches` are those that a transformer sees, 0 where a UNet is the denoiser."""
    config = _config(base)
    kind, trial = kind_of(base, name), scheduler(base, config, name, options)
    try:
        with np.errstate(all="ignore"):
            trial.set_timesteps(steps, **(_shifted(base, trial.config, steps, patches) if patches else {}))
            finite = not options or _goes_well(trial)
    except Exception as error:  # as above
        if options:
            raise _refusal(kind, error) from None
        raise InvalidRequest(
            f"{base.name} cannot render {steps} steps of {kind.__name__}: change the steps or the scheduler",
            field="steps",
        ) from None
    if not finite:
        raise InvalidRequest(
            f"{kind.__name__} with these options comes to no finite picture in {steps} steps", field=FIELD
        )


def _goes_well(trial: Any) -> bool:
    """Whether all steps of a scheduler end with numbers."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 2, 2, generator=generator) * getattr(trial, "init_noise_sigma", 1.0)
    more = {"generator": generator} if "generator" in _told(trial.step) else {}
    finite = bool(trial.timesteps.isfinite().all())  # else a step would look for itself in vain
    for time in trial.timesteps if finite else ():
        if hasattr(trial, "scale_model_input"):
            trial.scale_model_input(sample, time)
        predicted = torch.randn(sample.shape, generator=generator)
        sample = trial.step(predicted, time, sample, return_dict=False, **more)[0]
    return finite and bool(sample.isfinite().all())


def _shifted(base: Base, config: Mapping[str, Any], steps: int, patches: int) -> dict[str, Any]:
    """What the pipelines of SD3 and FLUX.1 tell a scheduler besides the steps: FLUX.1's computes the shift
    even where none is wanted, and says its own sigmas.
    """
    always = base.family == "flux"
    if not (always or config.get("use_dynamic_shifting")):
        return {}
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    told = (config.get(n, default) for n, default in zip(names, calculate_shift.__defaults__, strict=True))
    sigmas = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if always else {}
    return {"mu": calculate_shift(patches, *told), **sigmas}


def kind_of(base: Base, name: str) -> Any:
    """The class of a scheduler; "" is the base's own. Raises InvalidRequest."""
    known = schedulers(base)
    if name and name not in known:
        raise InvalidRequest(
            f"the scheduler {name[:80]!r} cannot be used with {base.name}; there are {', '.join(known)}",
            field="scheduler",
        )
    return known[name or base.scheduler]


def _refusal(kind: Any, error: Exception) -> InvalidRequest:
    return InvalidRequest(
        f"{kind.__name__} does not work with these options: {first_line(error)[:300]}", field=FIELD
    )


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What an annotation allows, one by one: kinds, and texts of a Literal."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(choice for part in typing.get_args(annotation) for choice in _choices(part))
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return (annotation,)


def _as(value: Any, choice: Any) -> tuple[bool, Option]:
    """Whether a value is what a choice allows, and what it is then."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if choice is type(None):
        return value is None, None
    if choice is bool:
        return isinstance(value, bool), value
    if choice is int:
        whole = number and abs(value) <= WHOLE_LIMIT and value == int(value)
        return whole, int(value) if whole else None
    if choice is float:
        return number, float(value) if number else None
    if choice is str:
        return isinstance(value, str) and len(value) <= TEXT_LIMIT, value
    if isinstance(choice, str):
        return isinstance(value, str) and value == choice, value
    if choice in (list[int], list[float]) and isinstance(value, list | tuple) and len(value) <= LIST_LIMIT:
        read = [_as(one, typing.get_args(choice)[0]) for one in value]
        return all(matches for matches, _ in read), tuple(one for _, one in read)  # type: ignore[return-value]
    return False, None


def _word(choice: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if isinstance(choice, str):
        return repr(choice)
    return "null" if choice is type(None) else words.get(choice, "a list of numbers")
