"""FLUX.1 as Black Forest Labs wrote it: `double_blocks.0.img_attn.qkv`, `single_blocks.0.linear1`.

qkv is to_q, to_k and to_v one below the other; linear1 is those and proj_mlp. The last modulation is shift,
scale there and scale, shift in diffusers. Also XLabs' names for the processors of the same blocks, and OMI's
for fused projections taken apart (`qkv.0`, OneTrainer).

Of diffusers' converters, the one for kohya's files drops alpha in `final_layer`, and forgets the component
in front of the embedders; the one for BFL's control LoRAs swaps the halves of the down of the last modulation
too, which mixes up its ranks; the one for OneTrainer's files knows only attention.
"""

import re
from collections.abc import Iterator

from compose.families import Table
from compose.formats.naming.parts import Part, fused, swapped

_OUTER = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "img_in.proj": "x_embedder",  # OMI
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "proj_lora1": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.proj": "attn.to_add_out",
    "proj_lora2": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_SINGLE = {"linear2": "proj_out", "proj": "proj_out", "modulation.lin": "norm.linear"}
_IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE_FUSED = {"img_attn.qkv": _IMAGE, "qkv_lora1": _IMAGE, "txt_attn.qkv": _TEXT, "qkv_lora2": _TEXT}
_SINGLE_FUSED = {"linear1": (*_IMAGE, "proj_mlp"), "qkv": _IMAGE}


def paths(layers: Table) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """(BFL's path, the layers it covers) for every layer of a FLUX transformer."""
    for path, ours in _OUTER.items():
        yield path, (Part(f"transformer.{ours}"),)
    yield "final_layer.adaLN_modulation.1", swapped("transformer.norm_out.linear", layers)
    for theirs, here, plain, joined in (
        ("double_blocks", "transformer_blocks", _DOUBLE, _DOUBLE_FUSED),
        ("single_blocks", "single_transformer_blocks", _SINGLE, _SINGLE_FUSED),
    ):
        for block in _blocks(here, layers):
            prefix = f"transformer.{here}.{block}."
            for path, ours in plain.items():
                yield f"{theirs}.{block}.{path}", (Part(prefix + ours),)
            for path, several in joined.items():
                names = [prefix + ours for ours in several]
                yield f"{theirs}.{block}.{path}", fused(names, layers)
                for index, name in enumerate(names):
                    yield f"{theirs}.{block}.{path}.{index}", (Part(name),)


def _blocks(kind: str, layers: Table) -> list[str]:
    found = (re.match(rf"transformer\.{kind}\.(\d+)\.", name) for name in layers)
    return list(dict.fromkeys(match[1] for match in found if match))
