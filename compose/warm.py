"""The live pipeline: golden weights, exact patching.

Golden weights are the base's own tensors, copied once and never written. A stack is applied as

    live = round(golden + [w_1 up_1 …] @ [down_1; …])     float32, one rounding, into the same storage

so any stack costs nothing per step, addresses never change, nothing adds up over switches, and taking the
stack off is a copy. A DoRA layer of weight w, magnitude m, norms over what m says, adds to the sum before it
is rounded

    w (m (golden + up @ down) / ||golden + up @ down|| - golden)

which at w = 1 is what PEFT and LyCORIS do with one adapter; ComfyUI blends it like this too. At other weights
they differ: PEFT scales up @ down alone and keeps m whole, LyCORIS scales m / ||…|| - 1.

Every bit depends on the stack and not on what was applied before. When anything fails midway, every layer
goes back to golden. There are two ways: in one launch on a GPU (`compose.switchboard`), and layer by layer
everywhere (`compose.layerwise`), quantised and DoRA layers included.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from torch import Tensor, nn

from compose.arenas import arenas
from compose.bases import Base, load
from compose.companions import numbers
from compose.errors import IncompatibleBase
from compose.factors import Factors
from compose.families import adaptable, families
from compose.layerwise import LayerByLayer, Stack
from compose.prompts import Prompts
from compose.sidecars import Sidecar, is_plain
from compose.switchboard import Switchboard, find_kernel
from compose.weights import AS_TRAINED

_VARIANTS: Mapping[str, Any] = {"image": AutoPipelineForImage2Image, "mask": AutoPipelineForInpainting}


def alone(layers: Mapping[str, Factors]) -> Stack:
    """One adapter as it was trained, or a finished merge."""
    return ((layers, AS_TRAINED),)


def warm_up(
    base: Base,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    check: Callable[[], None] = lambda: None,
    golden_on_host: bool = False,
) -> "WarmPipeline":
    """Loads a base: on a GPU in float16, SD3 and FLUX.1 in bfloat16; on a CPU in float32. Its golden weights
    lie beside the live ones where they fit and `golden_on_host` does not say otherwise, else in host memory.
    What `check` raises, between components, ends it. Raises IncompatibleBase.
    """
    cuda = torch.device(device).type == "cuda"
    pipeline = load(base, device=device, dtype=dtype or dtype_on(base, torch.device(device)), check=check)
    spare = torch.cuda.mem_get_info(device)[0] if cuda else 0
    needed = sum(w.nbytes for _, w in _weights(base, pipeline)) * 1.5 if cuda else 0
    needed += numbers((*base.controls, *base.references)) * pipeline.dtype.itemsize
    return WarmPipeline(base, pipeline, golden_on_host=cuda and (golden_on_host or needed > spare))


def dtype_on(base: Base, device: torch.device) -> torch.dtype:
    """What a base's weights are on a device."""
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if families()[base.family].config("unet") else torch.bfloat16


def dtype_name(base: Base, computes: torch.dtype) -> str:
    """Of a base's weights, as manifests tell it."""
    return "float8_e4m3fn" if base.fp8 else str(computes).removeprefix("torch.")


class WarmPipeline:
    """A base on its device, ready to take any stack. Not thread-safe: one thread owns it."""

    def __init__(self, base: Base, pipeline: DiffusionPipeline, *, golden_on_host: bool = False) -> None:
        self.base = base
        self.pipeline = pipeline
        self.device: torch.device = pipeline.device
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        self.denoiser: nn.Module = denoiser
        self.dtype = dtype_name(base, denoiser.dtype)
        self.vae_dtype: torch.dtype = pipeline.vae.dtype
        self.scheduler_config = dict(pipeline.scheduler.config)
        self.prompts = Prompts(pipeline, families()[base.family])
        self.words = self.prompts.words
        self.golden_on_host = golden_on_host
        modules = _modules(base, pipeline)
        plain = [(name, module) for name, module in modules if is_plain(module)]
        self._arenas = arenas(plain, golden_on_host=golden_on_host)
        self._arena = {name: arena for arena in self._arenas for name in arena.names}
        self._sidecars = {name: Sidecar(module) for name, module in modules if name not in self._arena}
        self._layerwise = LayerByLayer(base.name, self._arenas, self._sidecars)
        kernel = None if self._sidecars else find_kernel(self._arenas)
        self._board = Switchboard(base.name, self._arenas, kernel) if kernel else None
        self._key: object = None
        self._variants: dict[str, Any] = {"": pipeline}
        self.beside: dict[Path, nn.Module] = {}
        """Models that steered renders, by where they lie: loaded when first asked for, gone with the base."""
        parts = (getattr(pipeline, name, None) for name in pipeline.components)
        models = [part for part in parts if isinstance(part, nn.Module)]
        self._weight_bytes = sum(int(p.nbytes) for model in models for p in model.parameters())

    @property
    def modules(self) -> int:
        """Layers an adapter can change."""
        return len(self._arena) + len(self._sidecars)

    def nbytes(self) -> int:
        """Of everything it holds on its device."""
        beside = sum(int(p.nbytes) for model in self.beside.values() for p in model.parameters())
        golden = sum(arena.nbytes() - arena.live.nbytes for arena in self._arenas)
        return self.weight_bytes() + beside + golden

    def weight_bytes(self) -> int:
        """Of the weights of its components."""
        return self._weight_bytes

    def golden_bytes(self) -> int:
        """Of its golden weights when every layer was changed once."""
        return sum(arena.golden_bytes() for arena in self._arenas)

    def variant(self, kind: str) -> Any:
        """The pipeline that starts from nothing (""), from an "image", or paints within a "mask": the same
        models. Raises IncompatibleBase.
        """
        if kind not in self._variants:
            try:
                self._variants[kind] = _VARIANTS[kind].from_pipe(self.pipeline)
            except ValueError as error:
                raise IncompatibleBase(
                    f"{self.base.name} does not render from a picture: {error}", field="image"
                ) from None
            self._variants[kind].set_progress_bar_config(disable=True)
        return self._variants[kind]

    def norms(self) -> dict[str, float]:
        """||W||_F of every layer an adapter can change, golden; not of those that are packed."""
        found = {name: float(arena.golden(name).float().norm()) for name, arena in self._arena.items()}
        for name, sidecar in self._sidecars.items():
            with suppress(IncompatibleBase):
                found[name] = float(sidecar.weight().norm())
        return found

    def live(self, layer: str) -> Tensor:
        """A layer's weight `[d, k]` as it is now. Not to be written."""
        if layer in self._sidecars:
            return self._sidecars[layer].weight()
        arena = self._arena[layer]
        return arena.live[arena.place[layer]]

    def golden(self, layer: str) -> Tensor:
        """A layer's own weight `[d, k]`. Not to be written, nor kept beyond the next `apply`."""
        if layer in self._sidecars:
            return self._sidecars[layer].weight()
        return self._arena[layer].golden(layer)

    def text_key(self, key: object) -> object:
        """What names the text encoders as they are now, where `key` names the stack that is applied."""
        ways = (self._layerwise, self._board)
        return key if any(way.acts_on_text() for way in ways if way) else ""

    def layers(self) -> list[str]:
        """Names of all layers an adapter can change."""
        return [*self._arena, *self._sidecars]

    def is_golden(self) -> bool:
        """Whether every layer holds the base's own bytes."""
        return all(arena.is_golden() for arena in self._arenas) and all(
            sidecar.is_empty for sidecar in self._sidecars.values()
        )

    @torch.no_grad()
    def apply(
        self,
        stack: Stack,
        *,
        factors: Sequence[float] = (),
        key: object = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the live weights golden + the stack; () takes every adapter off.

        `factors` are further weights of each adapter, for the denoiser's layers alone. `key`, when not None,
        names all of it: the same key as before means nothing to do. What `check` raises, called before
        anything is written and layer by layer before every arena, ends it there: what was written stays,
        known layer by layer, until the next stack. Raises IncompatibleBase for a layer the base does not
        have, and changes nothing; after any other failure the pipeline is golden, or where not even that
        succeeds the next stack writes all that was touched.
        """
        if key is not None and key == self._key:
            return
        board = self._board
        bound = board.bound(stack) if board else None
        wanted = self._layerwise.wanted(stack if bound is None else (), factors)
        self._key = None
        if board is None or bound is None:
            if board:
                board.apply((), (), (), check)
            self._layerwise.apply(wanted, check)
        else:
            self._layerwise.apply(wanted, check)
            board.apply(bound, [weight for _, weight in stack], factors, check)
        self._key = key


def _modules(base: Base, pipeline: DiffusionPipeline) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    components = [c.name for c in families()[base.family].components]
    return [
        item
        for component in components
        if (model := getattr(pipeline, component, None)) is not None
        for item in adaptable(component, model)
    ]


def _weights(base: Base, pipeline: DiffusionPipeline) -> list[tuple[str, Tensor]]:
    return [(name, module.weight) for name, module in _modules(base, pipeline) if is_plain(module)]
