"""Base models on disk: diffusers directories of the known families, found by name and loaded onto a device.

    base = find("pocket")                              # or a directory, or hub:ORGANISATION/NAME
    base = find("dreams=/models/dreamshaper-8")        # under a name of one's own
    pipeline = load(base, device="cuda", dtype=torch.float16)

What a render must know of a base (its size, its scheduler, its layers) is read from its configurations, so
that a base which is not loaded can be asked for.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from safetensors import SafetensorError, safe_open
from torch import nn

from compose import pocket
from compose.companions import Companion, digest_of
from compose.errors import IncompatibleBase, InvalidRequest, first_line
from compose.families import families

LOADING = threading.Lock()  # from_pretrained patches register_parameter process-wide (diffusers #14347)
FP8 = torch.float8_e4m3fn
NUMBER_LIMIT = 4096
_FP32 = "_keep_in_fp32_modules"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on disk, and what a render does when not told otherwise. Sizes in pixels; `granularity` is
    what sides are multiples of, `parameters` the numbers in its weights, `denoiser` those of the UNet or the
    transformer among them; with `fp8` these are stored in 8 bits each, but for `uncast` of them. `controls`
    and `references` are what may steer its renders.
    """

    name: str
    family: str
    path: Path
    digest: str
    steps: int
    guidance: float
    size: int
    granularity: int
    scheduler: str
    parameters: int
    denoiser: int = 0
    uncast: int = 0
    fp8: bool = False
    controls: tuple[Companion, ...] = ()
    references: tuple[Companion, ...] = ()


def find(told: str, *, offline: bool = False) -> Base:
    """`pocket`, a directory that holds a pipeline of a known family, or `hub:ORGANISATION/NAME[@REVISION]`;
    before it, if wanted, `NAME=`. `offline` downloads nothing. Raises InvalidRequest, IncompatibleBase.
    """
    name, named, place = told.partition("=")
    if not named or "/" in name:
        name, place = "", told
    if place == "pocket":
        return _base(name or "pocket", "pocket", pocket.WEIGHTS, steps=20, guidance=4.0)
    path = (
        _downloaded(place.removeprefix("hub:"), offline=offline) if place.startswith("hub:") else Path(place)
    )
    if not (path / "model_index.json").is_file():
        raise InvalidRequest(
            f"{place!r} is no base: say pocket, a directory with a diffusers pipeline in it, or "
            "hub:ORGANISATION/NAME",
            field="base",
        )
    name = name or re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-._")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no name for a base; write NAME={place}", field="base")
    family = _family(path)
    steps, guidance = {
        "flux": (28, 3.5),
        "sd3": (28, 5.0),
        "sd35-medium": (40, 4.5),
        "sd35-large": (28, 4.5),
        "sdxl": (30, 5.0),
    }.get(family, (30, 7.5))
    return _base(name, family, path, steps=steps, guidance=guidance)


def _family(path: Path) -> str:
    kind = str(read_config(path / "model_index.json").get("_class_name"))
    if kind == "StableDiffusionPipeline":
        width = read_config(path / "unet" / "config.json").get("cross_attention_dim")
        for family in ("sd1", "sd2", "pocket"):
            if families()[family].config("unet").get("cross_attention_dim") == width:
                return family
        raise IncompatibleBase(
            f"{path} is no Stable Diffusion 1 or 2 (its cross attention is {width} wide, not 768 or 1024)",
            field="base",
        )
    if kind == "StableDiffusion3Pipeline":
        config = read_config(path / "transformer" / "config.json")
        if config.get("num_layers") == families()["sd35-large"].config("transformer")["num_layers"]:
            return "sd35-large"
        return "sd35-medium" if config.get("dual_attention_layers") else "sd3"
    known = {"StableDiffusionXLPipeline": "sdxl", "FluxPipeline": "flux"}
    if kind not in known:
        raise IncompatibleBase(
            f"{path} holds a {kind}; known are StableDiffusionPipeline, StableDiffusion3Pipeline, "
            f"{', '.join(known)}",
            field="base",
        )
    return known[kind]


def _base(name: str, family: str, path: Path, *, steps: int, guidance: float) -> Base:
    """Raises IncompatibleBase for a directory with missing or damaged configurations."""
    vae = read_config(path / "vae" / "config.json")
    factor = _halvings(vae, "encoder_block_out_channels", "block_out_channels", of=path / "vae")
    denoiser = "unet" if families()[family].config("unet") else "transformer"
    config = read_config(path / denoiser / "config.json")
    if denoiser == "unet":
        levels = _halvings(config, "block_out_channels", of=path / denoiser)
    else:
        levels = 2 if family == "flux" else _number(config, "patch_size", 2, of=path / denoiser)
    index = read_config(path / "model_index.json")
    files = [file for file in path.rglob("*") if file.suffix == ".safetensors"]
    parts = {part: told for part, told in index.items() if isinstance(told, list) and len(told) == 2}
    missing = [
        lacking
        for part, (library, kind) in parts.items()
        if library and part not in ("safety_checker", "feature_extractor")
        for lacking in ([part] if not (path / part).is_dir() else _wordless(path, part, kind))
    ]
    if missing or not files:
        raise IncompatibleBase(
            f"{path} lacks {', '.join(missing) or 'its weights (*.safetensors)'}; download it again",
            field="base",
        )
    scheduler = str(parts.get("scheduler", ["", ""])[1])
    if not hasattr(diffusers, scheduler) or not scheduler.endswith("Scheduler"):
        raise IncompatibleBase(
            f"{path} names {scheduler[:80]!r} as its scheduler, which is none", field="base"
        )
    layers = _stored(path, denoiser)
    return Base(
        name=name,
        family=family,
        path=path,
        digest=digest_of(path),
        steps=steps,
        guidance=guidance,
        size=_number(config, "sample_size", 128, of=path / denoiser) * factor,
        granularity=factor * levels,
        scheduler=scheduler,
        parameters=_numbers(_stored(path, "*")),
        denoiser=_numbers(layers),
        uncast=_uncast(layers, str(parts.get(denoiser, ["", ""])[1])),
    )


def _number(config: dict[str, Any], name: str, default: int, *, of: Path) -> int:
    """A size that a configuration tells, of a side where it tells both. Raises IncompatibleBase."""
    value = config.get(name) or default
    value = value[0] if isinstance(value, list) else value
    if not isinstance(value, int) or not 1 <= value <= NUMBER_LIMIT:
        raise IncompatibleBase(
            f"{of / 'config.json'} says that its {name} is {str(value)[:80]}; download it again", field="base"
        )
    return value


def _wordless(path: Path, part: str, kind: object) -> list[str]:
    """Files of words that a tokenizer lacks: it needs the one that has all, or all the others. Without any,
    transformers loads one to which every word is unknown.
    """
    wanted = dict(getattr(getattr(transformers, str(kind), None), "vocab_files_names", {}))
    if (path / part / wanted.pop("tokenizer_file", "tokenizer.json")).is_file():
        return []
    return [f"{part}/{file}" for file in wanted.values() if not (path / part / file).is_file()]


def _halvings(config: dict[str, Any], *names: str, of: Path) -> int:
    """By how much the levels of a model, whichever of `names` lists them, make a side smaller."""
    levels = next((config[name] for name in names if config.get(name)), ())
    if not isinstance(levels, list) or not 1 <= len(levels) <= 8:
        raise IncompatibleBase(f"{of / 'config.json'} lists no {names[-1]}; download it again", field="base")
    return 1 << (len(levels) - 1)


def load(
    base: Base, *, device: str, dtype: torch.dtype, check: Callable[[], None] = lambda: None
) -> DiffusionPipeline:
    """The base's pipeline, on its device, frozen. What `check` raises, called before every component,
    ends the loading. Raises IncompatibleBase when it cannot be loaded.
    """
    with LOADING:
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.set_verbosity_error()
            library.disable_progress_bar()
        parts = dict[str, Any].fromkeys(_absent(base))
        for name, kind in _models(base):
            check()
            with _told(base):
                dtype_as = DTYPE if kind.__module__.startswith("diffusers") else "dtype"
                part, read = kind.from_pretrained(
                    base.path / name,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                    **{dtype_as: dtype},
                )
                if missing := read["missing_keys"]:  # transformers would make some up
                    raise IncompatibleBase(
                        f"{base.path / name} lacks {min(missing)!r}; download it again", field="base"
                    )
                if base.fp8 and name in {"unet", "transformer"}:
                    part.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=dtype)
                parts[name] = part.to(device)
        check()
        with _told(base):
            pipeline = DiffusionPipeline.from_pretrained(
                base.path, local_files_only=True, use_safetensors=True, **{DTYPE: dtype}, **parts
            )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if dtype == torch.float16 and base.family == "sdxl" and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)  # it overflows in half precision
    for component in (*(c.name for c in families()[base.family].components), "vae"):
        if getattr(pipeline, component, None) is not None:
            getattr(pipeline, component).requires_grad_(False).eval()
    return pipeline


@contextmanager
def _told(base: Base) -> Iterator[None]:
    """Whatever the loaders stumble over is wrong with the directory."""
    try:
        yield
    except IncompatibleBase:
        raise
    except Exception as error:
        raise IncompatibleBase(f"{base.path} cannot be loaded: {first_line(error)}", field="base") from error


def _absent(base: Base) -> Iterator[str]:
    """The components that it does without: SD3 without its T5, and a checker of what is safe."""
    if base.family in {"pocket", "sd1", "sd2"}:
        yield "safety_checker"
    for name, told in read_config(base.path / "model_index.json").items():
        if told == [None, None]:
            yield name


def _models(base: Base) -> Iterator[tuple[str, Any]]:
    """The components that have weights, and their classes, as diffusers' `from_pretrained` chooses them."""
    for name, told in read_config(base.path / "model_index.json").items():
        if name == "safety_checker" or not isinstance(told, list) or len(told) != 2:
            continue
        library = {"diffusers": diffusers, "transformers": transformers}.get(str(told[0]))
        kind = getattr(library, str(told[1]), None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            yield name, kind


def read_config(path: Path) -> dict[str, Any]:
    """A JSON configuration. Raises IncompatibleBase."""
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IncompatibleBase(f"{path} cannot be read: {error}", field="base") from None
    if not isinstance(loaded, dict):
        raise IncompatibleBase(f"{path} is no configuration", field="base")
    return loaded


def _downloaded(told: str, *, offline: bool) -> Path:
    """The directory of a pipeline of the Hub, downloaded if it is not here; `offline`: only if it is. Raises
    InvalidRequest.
    """
    name, _, revision = told.partition("@")
    try:
        return Path(
            DiffusionPipeline.download(
                name, revision=revision or None, use_safetensors=True, token=False, local_files_only=offline
            )
        )
    except Exception as error:  # the network's, the Hub's, or a name that is none
        raise InvalidRequest(f"hub:{told} cannot be had: {first_line(error)}", field="base") from None


def _stored(path: Path, component: str) -> dict[tuple[Path, str], tuple[int, ...]]:
    """Shapes of the tensors of a component, `*` for all of them, by directory and name, from the headers; of
    one that is there in several precisions, once.
    """
    found: dict[tuple[Path, str], tuple[int, ...]] = {}
    for file in path.glob(f"{component}/*.safetensors"):
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (it is no mapping)
                    found[file.parent, key] = tuple(opened.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise IncompatibleBase(f"{file} cannot be read: {error}", field="base") from None
    return found


def _numbers(shapes: dict[tuple[Path, str], tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _uncast(shapes: dict[tuple[Path, str], tuple[int, ...]], kind: str) -> int:
    """Numbers that diffusers' layerwise casting leaves as they are in a model of class `kind`: of modules
    that match a pattern, or lie in one that does, and of what is no linear layer, convolution or embedding.
    """
    told = getattr(diffusers, kind, None)
    mine = (getattr(told, name, None) or () for name in ("_skip_layerwise_casting_patterns", _FP32))
    patterns = [*DEFAULT_SKIP_MODULES_PATTERN, *(pattern for each in mine for pattern in each)]

    def stays(parent: Path, key: str) -> bool:
        *modules, _ = key.split(".")
        within = [".".join(modules[: i + 1]) for i in range(len(modules))]
        if any(re.search(pattern, module) for pattern in patterns for module in within):
            return True
        return len(shapes.get((parent, ".".join([*modules, "weight"])), ())) < 2

    return sum(math.prod(shape) for (parent, key), shape in shapes.items() if stays(parent, key))
