"""Every way files name the layers of a family.

    spellings("flux")["lora_unet_single_blocks_0_linear1"]
        -> (Part("transformer.single_transformer_blocks.0.attn.to_q", ((0, 3072),)), …to_k, …to_v, …proj_mlp)

A canonical name is diffusers' module path under the pipeline's component. Files spell the path as diffusers
does or as the model's first code did (`sgm`, `bfl`, `mmdit`: one module each), dotted behind the component's
name in that world or flattened with `_` behind kohya's prefix. Where the first code has one projection for
several of diffusers' layers, the spelling has several parts, each with its rows.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping

from compose.families import Component, Table, families, table
from compose.formats.naming import bfl, mmdit, sgm
from compose.formats.naming.parts import Part

EXTENDED = "unet with resnets"
"""How `unet` is spelled in a lora_diffusion file that counts resnets, too."""

_FIRST_CODE: Mapping[str, Callable[[Table], Iterator[tuple[str, tuple[Part, ...]]]]] = {
    "unet": sgm.paths,
    "flux": bfl.paths,
    "mmdit": mmdit.paths,
}
_DENOISER = (
    ("", "diffusion_model.", "model.diffusion_model."),
    ("lora_unet_", "lora_transformer_", "lycoris_"),
)
_PREFIXES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unet": _DENOISER,
    "flux": _DENOISER,
    "mmdit": _DENOISER,
    "clip_l": (("clip_l.", "text_encoders.clip_l.transformer."), ("lora_te_", "lora_te1_")),
    "clip_h": (("clip_h.", "clip_l.", "text_encoders.clip_h.transformer."), ("lora_te_", "lora_te1_")),
    "clip_g": (("clip_g.", "text_encoders.clip_g.transformer."), ("lora_te2_",)),
    "t5": (("t5.", "text_encoders.t5xxl.transformer."), ("lora_te3_", "lora_te2_")),
}
"""By kind of component, behind its name in diffusers: dotted prefixes (bare, ComfyUI's, OMI's), then flat
ones (kohya's, OneTrainer's, LyCORIS' own).

T5 is the second encoder of FLUX in OneTrainer, the third everywhere in kohya's scripts; a single encoder is
`clip_l` in OneTrainer, whichever it is.
"""


@functools.cache
def spellings(family: str) -> Mapping[str, tuple[Part, ...]]:
    """Every spelling of a family's layers -> the base layers it covers, the earlier kind first."""
    layers = table(family)
    found: dict[str, tuple[Part, ...]] = {}
    components = families()[family].components
    for component in components:
        own = {n: m for n, m in layers.items() if n.startswith(f"{component.name}.")}
        for path, parts in _paths(component, own):
            _spell(found, component, path, parts, many=len(components) > 2)
    for numbered, name in _numbered(layers).items():
        found[numbered] = (Part(name),)
    return found


def _paths(component: Component, layers: Table) -> Iterator[tuple[str, tuple[Part, ...]]]:
    for name in layers:
        path = name.split(".", 1)[1]
        # Files have been written with and without `text_model`; old diffusers left out `to_out`'s index, and
        # called a text encoder's projections what they are in a UNet.
        old = re.sub(r"(?<=self_attn\.)(q|k|v|out)_proj$", r"to_\1", path).removesuffix(".0")
        for spelled in dict.fromkeys((path, path.removeprefix("text_model."), old)):
            yield spelled, (Part(name),)
    if first := _FIRST_CODE.get(component.kind):
        yield from first(layers)


def _spell(
    found: dict[str, tuple[Part, ...]],
    component: Component,
    path: str,
    parts: tuple[Part, ...],
    *,
    many: bool,
) -> None:
    dotted, flat = _PREFIXES[component.kind.removesuffix("_projecting")]
    flat = tuple(
        prefix for prefix in flat if not many or prefix != "lora_te_"
    )  # that is of one encoder's bases
    for prefix in (f"{component.name}.", *dotted):
        found.setdefault(prefix + path, parts)
    for prefix in flat:
        found.setdefault(prefix + path.replace(".", "_"), parts)


@functools.cache
def kohya(family: str) -> Mapping[str, tuple[Part, ...]]:
    """The names that kohya's scripts write, each layer under one: sgm's for the UNet of SDXL, the first
    code's, with its fused projections, for transformers, diffusers' for everything else.
    """
    layers = table(family)
    found: dict[str, tuple[Part, ...]] = {}
    components = families()[family].components
    for component in components:
        own = {n: m for n, m in layers.items() if n.startswith(f"{component.name}.")}
        text = component.name.startswith("text_encoder")
        number = {"clip_g": 2, "t5": 3}.get(component.kind, 1 if len(components) > 2 else "")
        prefix = f"lora_te{number}_" if text else "lora_unet_"
        taken: set[str] = set()
        paths = (
            _FIRST_CODE[component.kind](own) if not text and len(components) > 2 else _paths(component, own)
        )
        for path, parts in paths:
            names = {part.name for part in parts}
            if not names & taken:  # the checkpoint's name comes first, XLabs' and OMI's after it
                taken |= names
                found[prefix + path.replace(".", "_")] = parts
    return found


def _numbered(layers: Table) -> dict[str, str]:
    """lora_diffusion counts the Linear layers of the modules it targets, in the order of registration of its
    time: down, up, mid; in a block its transformers, then its resnets, which count only in the extended list
    of targets; in a transformer attn1, ff, attn2.

    Checked against a published file (cloneofsimo/lora, example_loras): 144 UNet layers, nine a transformer.
    """
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    block = (*(f"attn1.{p}" for p in attention), "ff.net.0.proj", *(f"attn2.{p}" for p in attention))
    resnet = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
    found = (re.match(r"unet\..+?\.(?:transformer_blocks|resnets)\.\d+\.", name) for name in layers)
    units = dict.fromkeys(match[0] for match in found if match)
    every = [unit + part for unit in units for part in (resnet if ".resnets." in unit else block)]
    counts = {
        "unet": [name for name in every if ".resnets." not in name],
        EXTENDED: [name for name in every if name in layers],
        "text_encoder": [n for n in layers if n.startswith("text_encoder.") and ".self_attn." in n],
    }
    return {f"{prefix}:{i}": name for prefix, names in counts.items() for i, name in enumerate(names)}


__all__ = ["EXTENDED", "Part", "kohya", "spellings"]
