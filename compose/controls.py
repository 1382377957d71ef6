"""ControlNets: pictures that say where things are, while the prompt says what.

    net = find("pocket:canny=/models/canny", bases)       # a diffusers directory, checked against its base
    Control("canny", picture, weight=0.8, start=0.0, end=0.6, digest="sha256:…")
    Control("union", picture, …, mode="depth")            # a union ControlNet reads pictures of several kinds

A ControlNet is loaded when a render first asks for it, and goes with its base. diffusers' own pipelines
render with it, from the base's own models: nothing of the base is changed. Several pictures of one union
ControlNet act one by one, each with its weight and its share of the steps, as those of several ControlNets
do. (SDXL's can read them all at once, too; but then a weight is on what is read of a picture alone, and at 0
or out of its range a control still acts.)
"""

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from compose.bases import DTYPE, LOADING, Base, read_config
from compose.companions import LIMIT, Companion, check_shapes, configuration, digest_of, stored, told, variant
from compose.errors import IncompatibleBase, InvalidRequest, first_line
from compose.families import families
from compose.modes import FLUX, INPAINT, PLAIN, SD3, UNION, named_modes, number_of
from compose.warm import WarmPipeline

WEIGHT_LIMIT = 2.0
_STEM = "diffusion_pytorch_model"
_KINDS: Mapping[str, Sequence[str]] = {
    "sd": (PLAIN,),
    "sdxl": (PLAIN, UNION),
    "sd3": (SD3,),
    "flux": (FLUX,),
}
_DENOISERS = {
    "unet": "UNet2DConditionModel",
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
}
_PIPELINES: Mapping[str, Mapping[str, str]] = {
    "sd": {
        "": "StableDiffusionControlNetPipeline",
        "image": "StableDiffusionControlNetImg2ImgPipeline",
        "mask": "StableDiffusionControlNetInpaintPipeline",
    },
    "sdxl": {
        "": "StableDiffusionXLControlNetPipeline",
        "image": "StableDiffusionXLControlNetImg2ImgPipeline",
        "mask": "StableDiffusionXLControlNetInpaintPipeline",
    },
    "sdxl union": {
        "": "StableDiffusionXLControlNetUnionPipeline",
        "image": "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "mask": "StableDiffusionXLControlNetUnionInpaintPipeline",
    },
    "sd3": {"": "StableDiffusion3ControlNetPipeline"},
    "sd3 masked": {"": "StableDiffusion3ControlNetInpaintingPipeline"},
    "flux": {
        "": "FluxControlNetPipeline",
        "image": "FluxControlNetImg2ImgPipeline",
        "mask": "FluxControlNetInpaintPipeline",
    },
}
_FITTING: Mapping[str, Sequence[str]] = {
    "unet": (
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    ),
    "sd3": (
        "patch_size",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "caption_projection_dim",
    ),
    "flux": (
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "axes_dims_rope",
    ),
}
"""What a ControlNet and its base must have alike."""
_TOGETHER = (
    "guidance_embeds",
    "conditioning_embedding_channels",
    "force_zeros_for_pooled_projection",
    "joint_attention_dim",
)
"""What diffusers' pipelines read of the first of several and believe of all."""


@dataclass(frozen=True, slots=True)
class Control:
    """A picture `[height, width, 3]` of the render's size for the ControlNet `name`, which acts with a weight
    from `start` to `end`, shares of the steps; the digest is of what was sent. `mode` says what the picture
    is, by name or number, to a ControlNet that has modes; for one that is masked the picture is
    `[height, width, 4]`, and where it is transparent is to be painted.
    """

    name: str
    picture: NDArray[np.uint8] = field(compare=False)
    weight: float
    start: float
    end: float
    digest: str
    mode: str = ""

    def check(self, field: str) -> None:
        """Raises InvalidRequest for a value out of range; `field` is what the request calls it."""
        if not (math.isfinite(self.weight) and 0 <= self.weight <= WEIGHT_LIMIT):
            raise InvalidRequest(
                f"{field}.weight {self.weight} is not within 0 and {WEIGHT_LIMIT:g}", field=f"{field}.weight"
            )
        if not 0 <= self.start < self.end <= 1:
            raise InvalidRequest(
                f"{field} acts from {self.start} to {self.end}; begin from 0 on, and end later, by 1",
                field=f"{field}.start",
            )

    def told(self, base: Base) -> dict[str, object]:
        """For a manifest."""
        net = named(base, self.name, "controls")
        mode = number_of(net, self.mode, "controls")
        found: dict[str, object] = {
            "name": self.name,
            "digest": net.digest,
            "image": self.digest,
            "weight": self.weight,
            "start": self.start,
            "end": self.end,
        }
        found |= {} if mode is None else {"mode": mode}
        return found | ({"masked": True} if net.masked else {})


def find(text: str, bases: Iterable[Base]) -> tuple[Base, Companion]:
    """The ControlNet that `BASE:NAME=DIRECTORY[,MODE…]` says, and its base: the names of the modes of a union
    ControlNet from 0 on, where they are not those of a published one, or `inpaint`. Raises InvalidRequest;
    IncompatibleBase when it is for another family, or files of it are missing or damaged.
    """
    base, name, place = told(text, "control", {base.name: base for base in bases})
    place, *words = [place] if Path(place).is_dir() else place.split(",")
    path = Path(place)
    config, wanted = configuration(path, "control"), _KINDS[_group(base)]
    kind = str(config.get("_class_name"))
    if kind not in wanted:
        raise IncompatibleBase(
            f"{path} holds a {kind[:80]}; {base.name} ({base.family}) takes a {' or a '.join(wanted)}",
            field="control",
        )
    _check_fit(base, kind, config, path)
    found = stored(path, _STEM, "control")
    if kind == PLAIN and UNION in wanted and "task_embedding" in found:
        kind = UNION  # xinsir's own configuration says ControlNetModel
    masked = kind == SD3 and _reads_mask(config, found)
    number = (found.get("task_embedding") or found.get("controlnet_mode_embedder.weight") or (0,))[0]
    try:
        with torch.device("meta"):
            model = getattr(diffusers, kind).from_config(config, **_besides(kind, masked, number))
    except Exception as error:  # whatever a class says of a configuration
        raise IncompatibleBase(
            f"{path / 'config.json'} makes no {kind}: {first_line(error)}", field="control"
        ) from None
    check_shapes(found, {n: tuple(t.shape) for n, t in model.state_dict().items()}, path, "control")
    parameters = sum(math.prod(shape) for shape in found.values())
    if kind == PLAIN and words == [INPAINT]:
        masked, words = True, []
    modes = named_modes(kind, number, words, path)
    return base, Companion(name, kind, path, digest_of(path), parameters, modes=modes, masked=masked)


def check(base: Base, controls: Sequence[Control], kind: str) -> None:
    """Raises InvalidRequest for values out of range and controls that do not go together, IncompatibleBase
    where diffusers has no pipeline: `kind` is "" for a render from nothing, "image" or "mask".
    """
    if len(controls) > LIMIT:
        raise InvalidRequest(f"{len(controls)} controls, the limit is {LIMIT}", field="controls")
    nets = [named(base, control.name, f"controls[{i}]") for i, control in enumerate(controls)]
    for index, (control, net) in enumerate(zip(controls, nets, strict=True)):
        control.check(f"controls[{index}]")
        number_of(net, control.mode, f"controls[{index}]")
        _check_mask(net, control.picture, f"controls[{index}]")
    if nets and kind not in _PIPELINES[_which(base, nets)]:
        raise IncompatibleBase(
            f"diffusers has no pipeline of {base.family} that starts from a picture and takes controls; "
            "leave out either",
            field="controls",
        )
    if len({net.kind for net in nets}) > 1:
        raise InvalidRequest(
            f"{_all(nets)} cannot act in one render: diffusers has no pipeline for union ControlNets beside "
            "others",
            field="controls",
        )
    if len(nets) > 1 and _which(base, nets) == "sd3 masked":
        raise InvalidRequest(
            f"{_all(nets)} cannot act in one render: diffusers takes one mask for all", field="controls"
        )
    configs = [read_config(net.path / "config.json") for net in nets]
    for name in _TOGETHER:
        if (
            len(
                {
                    str(config.get(name, _default(net.kind, name)))
                    for config, net in zip(configs, nets, strict=True)
                }
            )
            > 1
        ):
            raise InvalidRequest(
                f"{_all(nets)} cannot act in one render: their {name} differ", field="controls"
            )


def named(base: Base, name: str, field: str) -> Companion:
    """Raises InvalidRequest for a ControlNet that the base does not have."""
    known = {net.name: net for net in base.controls}
    if name not in known:
        have = f"it has {', '.join(known)}" if known else "it has none (atelier serve --control)"
        raise InvalidRequest(f"{base.name} has no ControlNet {name[:80]!r}; {have}", field=f"{field}.name")
    return known[name]


def controlled(
    warm: WarmPipeline, kind: str, controls: Sequence[Control], seeds: Sequence[int]
) -> tuple[Any, dict[str, Any]]:
    """The pipeline for these controls, of the base's own models, and what it is called with besides. Raises
    IncompatibleBase.
    """
    found = [named(warm.base, control.name, "controls") for control in controls]
    which = _which(warm.base, found)
    cls = getattr(diffusers, _PIPELINES[which][kind])
    nets = [_loaded(warm, net) for net in found]
    parts = {**warm.pipeline.components, "controlnet": nets if len(nets) > 1 else nets[0]}
    if _group(warm.base) == "sd3":
        parts["vae"] = _Seeded(warm.pipeline.vae, seeds)
    takes = inspect.signature(cls.__init__).parameters
    config = {
        name: value for name, value in warm.pipeline.config.items() if name in takes and name not in parts
    }
    pipeline = cls(**{name: part for name, part in parts.items() if name in takes}, **config)
    pipeline.set_progress_bar_config(disable=True)

    def each(values: list[Any]) -> Any:
        return values if len(values) > 1 else values[0]

    more: dict[str, Any] = {}
    if which in {"sdxl union", "flux"}:
        modes = zip(controls, found, strict=True)
        more["control_mode"] = each([number_of(net, control.mode, "controls") for control, net in modes])
    if which == "sd3 masked":
        more["control_mask"] = Image.fromarray(_mask(controls[0].picture))
    return pipeline, {
        **more,
        "image" if not kind and which in {"sd", "sdxl"} else "control_image": each(
            [_read(control.picture, marked=_unet(warm.base)) for control in controls]
        ),
        "controlnet_conditioning_scale": each([control.weight for control in controls]),
        "control_guidance_start": each([control.start for control in controls]),
        "control_guidance_end": each([control.end for control in controls]),
    }


class _Seeded:
    """A VAE whose samples are drawn from each picture's seed: SD3's pipeline draws the control picture's
    latents from none, and no picture could be made again.
    """

    def __init__(self, vae: Any, seeds: Sequence[int]) -> None:
        self._vae, self._generators = vae, [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pixels: Tensor) -> Any:
        """What the VAE's own gives, but for its samples."""
        found, each = self._vae.encode(pixels), self._generators
        generator = each[0] if len(each) == 1 else each * (len(pixels) // len(each))
        sample = functools.partial(found.latent_dist.sample, generator)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=sample))


def _which(base: Base, nets: Sequence[Companion]) -> str:
    """The group of pipelines for these ControlNets."""
    group = _group(base)
    if any(net.kind == UNION for net in nets):
        return "sdxl union"
    return "sd3 masked" if group == "sd3" and any(net.masked for net in nets) else group


def _all(nets: Sequence[Companion]) -> str:
    return " and ".join(dict.fromkeys(net.name for net in nets))


def _check_mask(net: Companion, picture: NDArray[np.uint8], field: str) -> None:
    """Raises InvalidRequest for a picture that is not as the ControlNet reads it."""
    if net.masked != (picture.shape[-1] == 4):
        reads = "reads" if net.masked else "does not read"
        raise InvalidRequest(f"{net.name} {reads} where its picture is transparent", field=f"{field}.mode")
    if net.masked and not _mask(picture).any():
        raise InvalidRequest(
            f"{field}.image is transparent nowhere; make transparent what {net.name} is to paint",
            field=f"{field}.image",
        )


def _mask(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """255 where a picture `[h, w, 4]` is transparent."""
    found: NDArray[np.uint8] = np.where(picture[..., 3] < 128, 255, 0).astype(np.uint8)
    return found


def _read(picture: NDArray[np.uint8], *, marked: bool) -> Image.Image | Tensor:
    """A picture as a pipeline takes it; what is transparent is -1 where that marks it."""
    if picture.shape[-1] == 3 or not marked:
        return Image.fromarray(picture[..., :3])
    colours = np.where(_mask(picture)[..., None], -1, picture[..., :3].astype(np.float32) / 255)
    return torch.from_numpy(colours.astype(np.float32)).permute(2, 0, 1)[None]


def _reads_mask(config: Mapping[str, Any], found: Mapping[str, Sequence[int]]) -> bool:
    """Whether one of SD3 reads a mask beside its picture: its weights say so, its configuration need not."""
    shape, channels = found.get("pos_embed_input.proj.weight", ()), config.get("in_channels", 16)
    return len(shape) == 4 and shape[1] == channels + 1


def _besides(kind: str, masked: bool, modes: int) -> dict[str, Any]:
    """What the published configurations do not say, and the weights do."""
    if kind == UNION and modes:
        return {"num_control_type": modes}
    return {"extra_conditioning_channels": 1} if kind == SD3 and masked else {}


def _mode_for_each(_: Any, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """FLUX.1's pipelines from a picture tell the mode once, whatever the batch."""
    return args, {**told, "controlnet_mode": told["controlnet_mode"].expand(len(told["hidden_states"]), 1)}


def _loaded(warm: WarmPipeline, net: Companion) -> Any:
    """The model, on the base's device; loaded when it is first asked for. Raises IncompatibleBase."""
    if net.path not in warm.beside:
        with LOADING:
            try:
                model = getattr(diffusers, net.kind).from_pretrained(
                    net.path,
                    local_files_only=True,
                    use_safetensors=True,
                    variant=variant(net.path, _STEM),
                    **{DTYPE: warm.denoiser.dtype},
                    **_besides(net.kind, net.masked, len(net.modes)),
                )
            except Exception as error:  # whatever the loaders stumble over is wrong with the directory
                raise IncompatibleBase(
                    f"{net.path} cannot be loaded: {first_line(error)}", field="controls"
                ) from error
        if net.kind == FLUX and net.modes:
            model.register_forward_pre_hook(_mode_for_each, with_kwargs=True)
        warm.beside[net.path] = model.to(warm.device).requires_grad_(False).eval()
    return warm.beside[net.path]


def _check_fit(base: Base, kind: str, config: Mapping[str, Any], path: Path) -> None:
    """Raises IncompatibleBase for a ControlNet of another base than this."""
    group = "unet" if _unet(base) else _group(base)
    ours = read_config(base.path / ("unet" if _unet(base) else "transformer") / "config.json")
    vae = read_config(base.path / "vae" / "config.json")

    def value(name: str) -> Any:
        return config.get(name, _default(kind, name))

    silent = group == "sd3" and value("joint_attention_dim") is None  # it reads no text
    pairs: dict[str, tuple[Any, Any]] = {
        name: (value(name), ours.get(name, _default(_DENOISERS[group], name)))
        for name in _FITTING[group]
        if not (silent and name in {"joint_attention_dim", "caption_projection_dim"})
    }
    latents = int(vae.get("latent_channels", 4)) * (4 if group == "flux" else 1)
    pairs["in_channels"] = (value("in_channels"), latents)
    if group == "unet":
        levels = vae.get("encoder_block_out_channels") or vae.get("block_out_channels") or ()
        pairs["conditioning_channels"] = (value("conditioning_channels"), 3)
        told = value("conditioning_embedding_out_channels")
        embedding = told if isinstance(told, list) else ()
        pairs["picture's scale"] = (1 << len(embedding) >> 1, 1 << len(levels) >> 1)
    for name, (theirs, mine) in pairs.items():
        if (list(theirs) if isinstance(theirs, tuple) else theirs) != mine:
            raise IncompatibleBase(
                f"{path} is for another base than {base.name}: its {name} is {theirs}, not {mine}",
                field="control",
            )
    if config.get("extra_condition_channels"):  # of alimama's for FLUX.1
        raise IncompatibleBase(
            f"{path} takes a mask beside its picture, for which diffusers has no pipeline of {base.family}",
            field="control",
        )


def _default(kind: str, name: str) -> Any:
    parameter = inspect.signature(getattr(diffusers, kind).__init__).parameters.get(name)
    found = None if parameter is None else parameter.default
    return list(found) if isinstance(found, tuple) else found


def _unet(base: Base) -> bool:
    return bool(families()[base.family].config("unet"))


def _group(base: Base) -> str:
    groups = {"sdxl": "sdxl", "sd3": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3", "flux": "flux"}
    return groups.get(base.family, "sd")
