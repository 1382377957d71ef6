"""What flows through the layers while an adapter is rendered alone: its moments, for `activation` and
`regmean`.

    moments = measure(warm, prompts, ...)       {layer: Moment}, every Linear of the base, changed or not
    data = to_bytes(moments, {...});  moments = from_bytes(data, "pocket")

Each layer's second moment is sketched as it is seen (Nystroem: Y = G Omega, one Gaussian Omega of twice the
rank kept), so that a wide layer costs k x 64 numbers and not k x k. Layers that read the same tensor share
one moment: q, k and v of a self-attention, and what is computed beside it; every k and v of all
cross-attentions. On disk: safetensors, half
precision, `<what is read>.diagonal` and `.factor`; who was measured, and on what, in the metadata.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from compose.errors import InvalidRequest, NonFinite
from compose.families import adaptable, families, table
from compose.layerwise import Stack
from compose.moments import Moment
from compose.render import Listener, Picture, render
from compose.settings import Settings
from compose.warm import WarmPipeline
from compose.words import Word

RANK = 32
"""Of a moment's low-rank part. On pocket 32 of up to 512 directions hold nearly all of a layer's energy."""

PICTURES, STEPS = 24, 20
_SHARED = (
    (re.compile(r"(.+\.attn1)\.to_[qkv]"), r"\1"),
    (re.compile(r"unet\..+\.attn2\.to_[kv]"), "unet.encoder_hidden_states"),
    (re.compile(r"(.+\.self_attn)\.[qkv]_proj"), r"\1"),
    (re.compile(r"(transformer\.transformer_blocks\.\d+\.attn)\.to_[qkv]"), r"\1"),
    (re.compile(r"(transformer\.transformer_blocks\.\d+\.attn)\.add_[qkv]_proj"), r"\1.add"),
    (re.compile(r"(transformer\.single_transformer_blocks\.\d+)\.(?:attn\.to_[qkv]|proj_mlp)"), r"\1"),
    (re.compile(r"(.+\.SelfAttention)\.[qkv]"), r"\1"),
    (re.compile(r"(.+\.DenseReluDense)\.wi_[01]"), r"\1"),
)


def reads(layer: str) -> str:
    """What a layer reads, under one name for all layers that read the same."""
    for pattern, name in _SHARED:
        if found := pattern.fullmatch(layer):
            return found.expand(name)
    return layer


@dataclass(slots=True)
class _Sketch:
    """Y = G Omega and diag(G), summed over what was seen where it was seen."""

    omega: Tensor
    product: Tensor
    diagonal: Tensor

    @classmethod
    def of(cls, omega: Tensor) -> "_Sketch":
        return cls(omega, torch.zeros_like(omega), omega.new_zeros(len(omega)))

    def see(self, x: Tensor) -> None:
        """x: `[…, k]`"""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.product += x.mT @ (x @ self.omega)
        self.diagonal += x.square().sum(0)

    def moment(self, rank: int) -> Moment | None:
        """G ~ Y (Omega' Y)^-1 Y', its `rank` strongest directions, what they leave of the diagonal; None for
        nothing seen.
        """
        diagonal = self.diagonal.double().cpu()
        mean = diagonal.mean()
        if not math.isfinite(float(mean)):
            raise NonFinite("what flows through the layers is infinite: this adapter cannot be measured")
        if not float(mean) > 0:
            return None
        Y, omega = self.product.double().cpu() / mean, self.omega.double().cpu()
        values, vectors = torch.linalg.eigh((omega.mT @ Y + Y.mT @ omega) / 2)
        keep = values > values[-1] * 1e-9
        half = Y @ (vectors[:, keep] * values[keep].rsqrt())
        U, S, _ = torch.linalg.svd(half, full_matrices=False)
        factor = U[:, :rank] * S[:rank]
        left = (diagonal / mean - factor.square().sum(-1)).clamp_min(0)
        return Moment(left.float(), factor.float())


def _omega(k: int, *, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """`[k, q]`, of a width always the same: layers of that width share it."""
    q = min(k, 2 * rank)
    if q == k:
        return torch.eye(k, device=device)
    return torch.randn(k, q, generator=torch.Generator("cpu").manual_seed(k)).to(device)


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A listener that is told which of the prompts is rendered."""

    to: Listener
    image: int

    def check(self) -> None:
        self.to.check()

    def step(self, image: int, step: int) -> None:
        del image
        self.to.step(self.image, step)

    def preview(self, image: int, step: int, picture: Picture) -> None:
        """Nobody asked for one."""

    def picture(self, image: int, picture: Picture) -> None:
        """The pictures are not what was wanted."""


@contextmanager
def _watching(warm: WarmPipeline, rank: int) -> Iterator[dict[str, _Sketch]]:
    sketches: dict[str, _Sketch] = {}
    hooks = []
    omega = cache(partial(_omega, rank=rank, device=warm.device))
    for component in families()[warm.base.family].components:
        if (model := getattr(warm.pipeline, component.name, None)) is None:  # SD3 may come without its T5
            continue
        for name, module in adaptable(component.name, model):
            read = reads(name)
            if isinstance(module, nn.Linear) and read not in sketches:
                sketch = sketches[read] = _Sketch.of(omega(module.in_features))
                hooks.append(module.register_forward_pre_hook(lambda _, args, s=sketch: s.see(args[0])))
    try:
        yield sketches
    finally:
        for hook in hooks:
            hook.remove()


def measure(
    warm: WarmPipeline,
    prompts: Sequence[str],
    *,
    stack: Stack,
    words: Sequence[Word] = (),
    settings: Settings,
    listener: Listener,
    rank: int = RANK,
) -> dict[str, Moment]:
    """Renders every prompt once with the adapter alone, and returns the moments by what was read.

    All steps and both halves of the guidance count; the seed of the n-th prompt is that of `settings` plus n.
    """
    warm.prompts.forget()
    with _watching(warm, rank) as sketches:
        for index, prompt in enumerate(prompts):
            one = Settings(
                prompt=prompt,
                seed=settings.seed + index,
                steps=settings.steps,
                guidance=settings.guidance,
                width=settings.width,
                height=settings.height,
            )
            numbered = _Numbered(listener, index)
            render(warm, one, stack=stack, words=words, listener=numbered)
    found = {read: sketch.moment(rank) for read, sketch in sketches.items()}
    return {read: moment for read, moment in found.items() if moment is not None}


def by_layer(moments: Mapping[str, Moment], family: str) -> dict[str, Moment]:
    """The moments of every layer of a family whose input was seen."""
    return {layer: moments[read] for layer in table(family) if (read := reads(layer)) in moments}


def to_bytes(moments: Mapping[str, Moment], metadata: Mapping[str, str]) -> bytes:
    """The file, in half precision."""
    tensors = {
        f"{read}.{part}": tensor.half().contiguous()
        for read, moment in sorted(moments.items())
        for part, tensor in (("diagonal", moment.diagonal), ("factor", moment.factor))
    }
    data: bytes = safetensors.torch.save(tensors, dict(metadata))
    return data


def from_bytes(data: bytes, family: str) -> dict[str, Moment]:
    """Moments by layer of `family`. Raises InvalidRequest for a damaged file."""
    try:
        tensors: dict[str, Any] = safetensors.torch.load(data)
        reads_ = {name.rsplit(".", 1)[0] for name in tensors}
        moments = {
            read: Moment(tensors[f"{read}.diagonal"].float(), tensors[f"{read}.factor"].float())
            for read in reads_
        }
    except (SafetensorError, KeyError) as error:
        raise InvalidRequest(f"these moments are damaged: {error}; calibrate again", field="ref") from None
    found = by_layer(moments, family)
    for layer, moment in found.items():
        k = table(family)[layer].k
        shapes = (tuple(moment.diagonal.shape), moment.factor.shape[:-1])
        finite = bool(moment.diagonal.isfinite().all() and moment.factor.isfinite().all())
        if shapes != ((k,), (k,)) or moment.factor.dim() != 2 or not finite:
            raise InvalidRequest(f"these moments do not fit {layer!r}; calibrate again", field="ref")
    return found


def prompts(trigger: str, scenes: Sequence[tuple[str, str]]) -> list[str]:
    """Prompts that call an adapter, one for each scene (what is seen, where): a word stands for what is seen,
    a phrase ("in the style of …") follows it.
    """
    return prompts_together([trigger], scenes)


def prompts_together(triggers: Sequence[str], scenes: Sequence[tuple[str, str]]) -> list[str]:
    """The same for several adapters in one picture."""
    nouns = [trigger for trigger in triggers if " " not in trigger]
    phrases = "".join(f", {trigger}" for trigger in triggers if " " in trigger)
    return [f"a {' and a '.join(nouns) or seen} {where}{phrases}" for seen, where in scenes]


SCENES = tuple(
    (seen, where)
    for where in ("in a garden", "on a street at night", "in a bright room", "in front of mountains")
    for seen in ("portrait of a woman", "portrait of an old man", "cat", "red car", "house", "bowl of fruit")
)
"""Of bases that have read the world's captions."""
