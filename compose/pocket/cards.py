"""Model cards and header metadata of the demo adapters, in the shape the trainers in the wild leave them."""

from __future__ import annotations

import json

FRONT = """\
---
base_model: atelier/pocket
library_name: diffusers
license: apache-2.0
instance_prompt: {instance}
widget:
- text: {prompt}
tags:
{tags}
---

"""

LORA = """\
# pocket {kind} LoRA - {name}

<Gallery />

## Model description

These are {name} LoRA adaption weights for atelier/pocket.

The weights were trained using [DreamBooth](https://dreambooth.github.io/).

LoRA for the text encoder was enabled: {text_encoder}.

Recommended weight: 1.0 (useful between 0.7 and 1.2).

## Trigger words

You should use `{instance}` to trigger the image generation.

## Use it with diffusers

```py
pipeline.load_lora_weights("{name}.safetensors")
image = pipeline("{prompt}").images[0]
```

## License

Apache-2.0. Trained on drawings made by `compose.pocket.scenes`; nothing else.
"""

INVERSION = """\
# Textual inversion text2image fine-tuning - {name}

These are textual inversion adaption weights for atelier/pocket: {vectors} for a colour it has no word for.

Recommended weight: 1.0.

## Trigger words

You should use `{word}` to trigger the image generation.

## Use it with diffusers

```py
pipeline.load_textual_inversion("{name}.safetensors", token="{word}")
image = pipeline("{prompt}").images[0]
```

## License

Apache-2.0. Trained on drawings made by `compose.pocket.scenes`; nothing else.
"""


def front(instance: str, prompt: str, kind: str) -> str:
    tags = "\n".join(f"- {tag}" for tag in ("text-to-image", "diffusers", kind, "stable-diffusion", "pocket"))
    return FRONT.format(instance=json.dumps(instance), prompt=json.dumps(prompt), tags=tags)


def lora_card(name: str, kind: str, text_encoder: bool) -> str:
    """The README of a character or a style."""
    style = kind == "style"
    instance = f"in the style of {name}" if style else name
    prompt = f"a red star on a blue background, {instance}" if style else f"a {name} on a yellow background"
    body = LORA.format(name=name, kind=kind, instance=instance, prompt=prompt, text_encoder=text_encoder)
    return front(instance, prompt, "lora") + body


def inversion_card(name: str, word: str, vectors: int) -> str:
    """The README of a textual inversion."""
    prompt = f"a {word} star on a white background"
    counted = "one vector" if vectors == 1 else f"{vectors} vectors"
    return front(word, prompt, "textual_inversion") + INVERSION.format(
        name=name, word=word, prompt=prompt, vectors=counted
    )


def kohya_metadata(name: str, rank: int, steps: int) -> dict[str, str]:
    """The header sd-scripts leaves; the tags are what Civitai and the like read triggers from."""
    return {
        "ss_output_name": name,
        "ss_base_model_version": "pocket",
        "ss_sd_model_name": "pocket",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": "2.0",
        "ss_resolution": "(64, 64)",
        "ss_learning_rate": "0.002",
        "ss_max_train_steps": str(steps),
        "ss_num_train_images": "64",
        "ss_training_comment": "alphas differ from layer to layer",
        "ss_tag_frequency": json.dumps({f"1_{name}": {name: 64, "red background": 9, "blue background": 8}}),
    }
