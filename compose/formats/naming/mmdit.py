"""SD3 as Stability wrote it: `joint_blocks.0.x_block.attn.qkv`, what kohya writes for it.

qkv is taken apart as in FLUX. The last modulation, and that of the last block's context, which only scales
and shifts, are shift, scale there and scale, shift in diffusers. diffusers converts none of these names
(huggingface/diffusers#9950). Source: diffusers' scripts/convert_sd3_to_diffusers.py.
"""

import re
from collections.abc import Iterator

from compose.families import Table
from compose.formats.naming.parts import Part, fused, swapped

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def paths(layers: Table) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """(Stability's path, the layers it covers) for every layer of an SD3 transformer."""
    for path, ours in _OUTER.items():
        yield path, (Part(f"transformer.{ours}"),)
    yield "final_layer.adaLN_modulation.1", swapped("transformer.norm_out.linear", layers)
    found = (re.match(r"transformer\.transformer_blocks\.(\d+)\.", name) for name in layers)
    blocks = list(dict.fromkeys(match[1] for match in found if match))
    for block in blocks:
        prefix = f"transformer.transformer_blocks.{block}."
        for path, ours in _BLOCK.items():
            name = prefix + ours
            if name in layers:  # the last block's context ends in its attention, few blocks have a second
                last = ours == "norm1_context.linear" and block == blocks[-1]
                yield f"joint_blocks.{block}.{path}", swapped(name, layers) if last else (Part(name),)
        for path, several in _FUSED.items():
            names = [prefix + ours for ours in several]
            if names[0] not in layers:
                continue
            yield f"joint_blocks.{block}.{path}", fused(names, layers)
            for index, name in enumerate(names):
                yield f"joint_blocks.{block}.{path}.{index}", (Part(name),)
