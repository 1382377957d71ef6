"""The embedded base model: a Stable Diffusion small enough to live in the repository.

`WEIGHTS` is an ordinary diffusers directory (AutoencoderTiny, UNet2DConditionModel, CLIPTextModel,
CLIPTokenizer, DDIMScheduler; at most 12 MB, fp16) and `ADAPTERS` holds demo adapters trained on it, each in
a different file layout with its model card beside it. Both are made by `compose.pocket.train` and
`compose.pocket.adapters` from drawings of `compose.pocket.scenes`.

Importing this package never imports torch.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
ADAPTERS = Path(__file__).parent / "adapters"

__all__ = ["ADAPTERS", "WEIGHTS"]
