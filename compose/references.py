"""IP-Adapters: pictures to resemble, read by an image encoder and told to the UNet, or FLUX.1's transformer,
beside the prompt (arXiv 2308.06721).

    adapter = find("pocket:style=/models/ip-adapter.safetensors,/models/image_encoder", bases)
    Reference("style", picture, weight=0.6, digest="sha256:…")

An IP-Adapter puts processors of its own into the denoiser's attention. They are there while a render with
references goes on; then the base's own, the very objects, are put back. diffusers' loader makes them.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from compose.bases import LOADING, Base, read_config
from compose.companions import (
    LIMIT,
    Companion,
    Encoder,
    Shapes,
    check_shapes,
    configuration,
    digest_of,
    digest_of_file,
    shapes,
    stored,
    told,
    variant,
)
from compose.errors import IncompatibleBase, InvalidRequest, first_line
from compose.families import families
from compose.warm import WarmPipeline

WEIGHT_LIMIT, SIDE_LIMIT = 2.0, 2048
EMBEDDED = 32
"""Embeddings of pictures that are kept, for each adapter."""
_OPTION = "ip-adapter"
_KINDS = {"proj.weight": "pooled", "latents": "plus", "proj.3.weight": "full"}
"""How a picture is read, by a tensor that says so: its pooled embedding, or all of its patches."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A picture `[height, width, 3]` to resemble, by the IP-Adapter `name`; the digest is of what was sent,
    and `behind` the colour that was put where it is transparent.
    """

    name: str
    picture: NDArray[np.uint8] = field(compare=False)
    weight: float
    digest: str
    behind: str = ""

    def told(self, base: Base) -> dict[str, object]:
        """For a manifest."""
        adapter = named(base, self.name, "references")
        return {
            "name": self.name,
            "digest": adapter.digest,
            "encoder": adapter.encoder.digest if adapter.encoder else "",
            "image": self.digest,
            "weight": self.weight,
        }


def find(text: str, bases: Iterable[Base]) -> tuple[Base, Companion]:
    """The IP-Adapter that `BASE:NAME=FILE[,ENCODER]` or `BASE:NAME=DIRECTORY` says, and its base; without an
    encoder it is `image_encoder` beside the file. Raises InvalidRequest; IncompatibleBase when it is for
    another base, or files of it are missing or damaged.
    """
    base, name, place = told(text, _OPTION, {base.name: base for base in bases})
    if not (_flux(base) or families()[base.family].config("unet")):
        raise IncompatibleBase(
            f"IP-Adapters are for Stable Diffusion 1, 2 and XL and FLUX.1; {base.name} is {base.family}",
            field=_OPTION,
        )
    first, _, second = place.partition(",")
    file = _weights(Path(first))
    found = shapes(file, _OPTION)
    parts: dict[str, dict[str, tuple[int, ...]]] = {"image_proj": {}, "ip_adapter": {}}
    for key, shape in found.items():
        part, rest = _placed(key)
        if part not in parts:
            raise IncompatibleBase(f"{file} is no IP-Adapter: it holds {key[:80]!r}", field=_OPTION)
        parts[part][rest] = shape
    kind = next((kind for key, kind in _KINDS.items() if key in parts["image_proj"]), "")
    if not kind:
        raise IncompatibleBase(
            f"{file} reads no pictures: it is for face embeddings, or no IP-Adapter", field=_OPTION
        )
    if _flux(base) and kind != "pooled":
        raise IncompatibleBase(
            f"{file} reads all patches of a picture, which diffusers has no way for with FLUX.1",
            field=_OPTION,
        )
    encoder, width = _encoder(Path(second) if second else file.parent / "image_encoder", kind)
    _check_fit(base, parts, kind, width, file)
    return base, Companion(
        name,
        kind,
        file,
        f"sha256:{digest_of_file(file)}",
        sum(math.prod(shape) for shape in found.values()),
        encoder,
    )


def check(base: Base, references: Sequence[Reference]) -> None:
    """Raises InvalidRequest for values out of range, and IP-Adapters that the base does not have."""
    if len(references) > LIMIT:
        raise InvalidRequest(f"{len(references)} references, the limit is {LIMIT}", field="references")
    for index, reference in enumerate(references):
        field = f"references[{index}]"
        named(base, reference.name, field)
        if not (math.isfinite(reference.weight) and 0 <= reference.weight <= WEIGHT_LIMIT):
            raise InvalidRequest(
                f"{field}.weight {reference.weight} is not within 0 and {WEIGHT_LIMIT:g}",
                field=f"{field}.weight",
            )


def named(base: Base, name: str, field: str) -> Companion:
    """Raises InvalidRequest for an IP-Adapter that the base does not have."""
    known = {adapter.name: adapter for adapter in base.references}
    if name not in known:
        have = f"it has {', '.join(known)}" if known else "it has none (atelier serve --ip-adapter)"
        raise InvalidRequest(f"{base.name} has no IP-Adapter {name[:80]!r}; {have}", field=f"{field}.name")
    return known[name]


@contextmanager
def resembling(
    warm: WarmPipeline, references: Sequence[Reference], *, guidance: float
) -> Iterator[dict[str, Any]]:
    """The denoiser reads these pictures as long as this goes on; what a pipeline is called with besides.
    Raises IncompatibleBase.
    """
    denoiser: Any = warm.denoiser
    flux, config = _flux(warm.base), denoiser.config
    companions = [named(warm.base, reference.name, "references") for reference in references]
    adapters = [_loaded(warm, companion) for companion in companions]
    embeds = [
        adapter.embed(warm, companion, reference)
        for adapter, companion, reference in zip(adapters, companions, references, strict=True)
    ]
    if flux or guidance <= 1 or config.time_cond_proj_dim is not None:  # as the pipelines know guidance
        embeds = [pair[1:] for pair in embeds]
    own = dict(denoiser.attn_processors)
    try:
        denoiser.set_attn_processor({**own, **_joined(adapters, [one.weight for one in references])})
        denoiser.encoder_hid_proj = MultiIPAdapterImageProjection(
            [adapter.projection for adapter in adapters]
        )
        if not flux:
            config.encoder_hid_dim_type = "ip_image_proj"
        # FLUX.1's pipelines want something for a negative prompt, which is not asked for
        told = {"negative_ip_adapter_image_embeds": embeds} if flux else {}
        yield {"ip_adapter_image_embeds": embeds, **told}
    finally:
        del denoiser.encoder_hid_proj
        if not flux:
            config.encoder_hid_dim_type = denoiser.encoder_hid_proj = None
        denoiser.set_attn_processor(dict(own))


class _Adapter(nn.Module):
    """An IP-Adapter that is loaded: its image projection, and its processors by the name of their layer.
    Several that share a file share this, whatever reads their pictures.
    """

    def __init__(self, projection: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.projection, self.names = projection, list(layers)
        self.layers = nn.ModuleList(layers.values())
        self._embeds: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def embed(self, warm: WarmPipeline, companion: Companion, reference: Reference) -> Tensor:
        """What the image encoder says of nothing and of the picture, `[2, 1, …]`."""
        key = companion.encoder.digest if companion.encoder else "", reference.digest, reference.behind
        if key not in self._embeds:
            pipeline, encoder = warm.pipeline, _encoding(warm, companion)
            size = encoder.config.image_size
            reads = getattr(pipeline, "feature_extractor", None) or CLIPImageProcessor(
                size=size, crop_size=size
            )
            patches = not isinstance(self.projection, ImageProjection)
            picture, nothing = _pair(
                type(pipeline).encode_image(
                    SimpleNamespace(image_encoder=encoder, feature_extractor=reads),
                    Image.fromarray(reference.picture),
                    warm.device,
                    1,
                    *(() if _flux(warm.base) else (patches,)),
                )
            )
            self._embeds[key] = torch.cat([nothing[None], picture[None]])
            if len(self._embeds) > EMBEDDED:
                self._embeds.popitem(last=False)
        self._embeds.move_to_end(key)
        return self._embeds[key]


def _pair(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What is said of a picture, and of none: FLUX.1's pipelines say the first alone."""
    return found if isinstance(found, tuple) else (found, torch.zeros_like(found))


def _joined(adapters: Sequence[_Adapter], weights: Sequence[float]) -> dict[str, nn.Module]:
    """Processors in which all of them act, of their own tensors."""
    found: dict[str, nn.Module] = {}
    for name, *layers in zip(adapters[0].names, *(adapter.layers for adapter in adapters), strict=True):
        one: Any = layers[0]
        with torch.device("meta"):
            joined = type(one)(
                hidden_size=one.hidden_size,
                cross_attention_dim=one.cross_attention_dim,
                num_tokens=[getattr(layer, "num_tokens", (0,))[0] for layer in layers],
                scale=list(weights),
            )
        joined.to_k_ip = nn.ModuleList([layer.to_k_ip[0] for layer in layers])
        joined.to_v_ip = nn.ModuleList([layer.to_v_ip[0] for layer in layers])
        found[name] = joined
    return found


def _loaded(warm: WarmPipeline, companion: Companion) -> _Adapter:
    """The adapter, on the base's device; loaded when it is first asked for. Raises IncompatibleBase."""
    if companion.path not in warm.beside:
        denoiser: Any = warm.denoiser
        state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        try:
            with safe_open(companion.path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (it is no mapping)
                    part, rest = _placed(key)
                    state[part][rest] = opened.get_tensor(key)
            with LOADING:
                projection = denoiser._convert_ip_adapter_image_proj_to_diffusers(
                    state["image_proj"], low_cpu_mem_usage=False
                )
                layers = denoiser._convert_ip_adapter_attn_to_diffusers([state], low_cpu_mem_usage=False)
        except Exception as error:  # whatever the loaders stumble over is wrong with the file
            raise IncompatibleBase(
                f"{companion.path} cannot be loaded: {first_line(error)}", field="references"
            ) from error
        found = _Adapter(projection, {n: p for n, p in layers.items() if hasattr(p, "to_k_ip")})
        found.to(warm.device, denoiser.dtype)
        warm.beside[companion.path] = found.requires_grad_(False).eval()
    adapter = warm.beside[companion.path]
    if not isinstance(adapter, _Adapter):
        raise TypeError(adapter)
    return adapter


def _encoding(warm: WarmPipeline, companion: Companion) -> Any:
    """The image encoder, on the base's device; loaded when it is first asked for. Raises IncompatibleBase."""
    path = companion.encoder.path if companion.encoder else companion.path
    if path not in warm.beside:
        with LOADING:
            try:
                model, info = CLIPVisionModelWithProjection.from_pretrained(
                    path,
                    local_files_only=True,
                    use_safetensors=True,
                    variant=variant(path, "model"),
                    output_loading_info=True,
                    dtype=warm.denoiser.dtype,
                )
            except Exception as error:  # as above
                raise IncompatibleBase(
                    f"{path} cannot be loaded: {first_line(error)}", field="references"
                ) from error
        if info["missing_keys"]:
            raise IncompatibleBase(
                f"{path} lacks {min(info['missing_keys'])!r}; download it again", field="references"
            )
        warm.beside[path] = model.to(warm.device).requires_grad_(False).eval()
    return warm.beside[path]


def _flux(base: Base) -> bool:
    return base.family == "flux"


def _placed(key: str) -> tuple[str, str]:
    """The part of an IP-Adapter that a tensor belongs to, and its name there; those of XLabs' for FLUX.1 by
    the names of all others.
    """
    part, _, rest = key.partition(".")
    if part == "double_blocks":
        rest = rest.replace("processor.ip_adapter_double_stream_", "to_").replace("_proj.", "_ip.")
    return {"ip_adapter_proj_model": "image_proj", "double_blocks": "ip_adapter"}.get(part, part), rest


def _weights(place: Path) -> Path:
    """The file of weights that is meant. Raises InvalidRequest, IncompatibleBase."""
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            raise InvalidRequest(
                f"--{_OPTION}: {place} holds {len(files)} files of weights (*.safetensors); say which",
                field=_OPTION,
            )
        return files[0]
    if place.suffix != ".safetensors":
        raise InvalidRequest(
            f"--{_OPTION}: {place} is no file of safetensors; pickled weights are not opened", field=_OPTION
        )
    return place


def _encoder(path: Path, kind: str) -> tuple[Encoder, int]:
    """An image encoder, and the size of what an adapter of this kind is told of a picture. Raises
    InvalidRequest, IncompatibleBase.
    """
    config = configuration(path, _OPTION)
    if config.get("model_type") == "clip" and isinstance(config.get("vision_config"), dict):
        config = {**config["vision_config"], "model_type": "clip_vision_model"}  # as transformers reads it
    if config.get("model_type") != "clip_vision_model":
        raise IncompatibleBase(
            f"{path} is no CLIP image encoder, but a {str(config.get('model_type'))[:80]!r}", field=_OPTION
        )
    try:
        with torch.device("meta"):
            model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config))
    except Exception as error:  # whatever a class says of a configuration
        raise IncompatibleBase(
            f"{path / 'config.json'} makes no image encoder: {first_line(error)}", field=_OPTION
        ) from None
    found = [
        shape
        for name, shape in stored(path, "model", _OPTION).items()
        if not (name.endswith("position_ids") or name.startswith(("text_", "logit_")))  # of a whole CLIP
    ]
    here, wanted = sum(map(math.prod, found)), sum(p.numel() for p in model.parameters())
    if here != wanted:  # their names are not those of every version of transformers
        raise IncompatibleBase(
            f"{path} is damaged: its weights are {here} numbers, its configuration wants {wanted}",
            field=_OPTION,
        )
    width = model.config.projection_dim if kind == "pooled" else model.config.hidden_size
    return Encoder(path, digest_of(path), here), int(width)


def _crossing(model: Any) -> tuple[int, dict[str, tuple[int, ...]]]:
    """How wide what a denoiser attends to is, and the shapes of what an IP-Adapter adds to its attention."""
    wanted: dict[str, tuple[int, ...]] = {}
    if isinstance(model, FluxTransformer2DModel):
        cross = int(model.config.joint_attention_dim)
        for number in range(model.config.num_layers):
            for which in ("k", "v"):
                wanted[f"{number}.to_{which}_ip.weight"] = (model.inner_dim, cross)
                wanted[f"{number}.to_{which}_ip.bias"] = (model.inner_dim,)
        return cross, wanted
    cross = int(model.config.cross_attention_dim)
    crossing = [name for name in model.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(crossing):
        attention = model.get_submodule(name.removesuffix(".processor"))
        for which in ("k", "v"):
            wanted[f"{2 * number + 1}.to_{which}_ip.weight"] = (attention.inner_dim, cross)
    return cross, wanted


def _check_fit(base: Base, parts: Mapping[str, Shapes], kind: str, width: int, file: Path) -> None:
    """Raises IncompatibleBase for an adapter of another base, or of another image encoder."""
    kind_of, place = (
        (FluxTransformer2DModel, "transformer") if _flux(base) else (UNet2DConditionModel, "unet")
    )
    config = read_config(base.path / place / "config.json")
    if config.get("encoder_hid_dim_type") is not None:
        raise IncompatibleBase(f"{base.name} has an image projection of its own", field=_OPTION)
    with torch.device("meta"):
        model = kind_of.from_config(config)
        projection = {name: torch.empty(shape) for name, shape in parts["image_proj"].items()}
        try:
            made = model._convert_ip_adapter_image_proj_to_diffusers(projection, low_cpu_mem_usage=False)
        except Exception as error:  # names and shapes that are none of the kind's
            raise IncompatibleBase(f"{file} is damaged: {first_line(error)}", field=_OPTION) from None
    cross, wanted = _crossing(model)
    try:
        check_shapes(parts["ip_adapter"], wanted, file, _OPTION)
    except IncompatibleBase as error:
        raise IncompatibleBase(
            f"{file} is for another base than {base.name}: {error}", field=_OPTION
        ) from None
    reads, tells = {
        "pooled": lambda: (made.image_embeds.in_features, made.norm.normalized_shape[0]),
        "plus": lambda: (made.proj_in.in_features, made.proj_out.out_features),
        "full": lambda: (made.ff.net[0].proj.in_features, made.norm.normalized_shape[0]),
    }[kind]()
    for what, here, there in (("image encoder", reads, width), ("base", tells, cross)):
        if here != there:
            raise IncompatibleBase(
                f"{file} is for another {what}: its embeddings are {here} wide, not {there}", field=_OPTION
            )
