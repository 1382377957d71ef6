"""CLIP and SigLIP models, tiny, with random weights, in directories that transformers wrote."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from compose import pocket


def tiny_scorer(path: Path, *, kind: str = "clip") -> Path:
    """Writes a model that sees pictures of 32 x 32 into `path`."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(pocket.WEIGHTS / "tokenizer")
    small = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_size": 32,
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    if kind == "clip":
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        CLIPModel(config).save_pretrained(path)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
            path
        )
    else:
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(path)
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
