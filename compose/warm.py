"""The live pipeline: golden weights, exact patching.

Golden weights are the base's own tensors, copied once and never written. A stack is applied as

    live = round(golden + up @ down)        float32, one rounding, into the same storage

so any stack costs nothing per step, addresses never change, nothing adds up over switches, and taking the
stack off is a copy. Only layers of the old or the new stack are touched; when anything fails midway, every
layer goes back to golden.
"""

from collections.abc import Iterable, Mapping

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from compose.bases import Base, adaptable, load
from compose.errors import IncompatibleBase
from compose.factors import Factors
from compose.words import Words


def warm_up(base: Base, *, device: str = "cpu") -> "WarmPipeline":
    """Loads a base: in float16 on a GPU, in float32 on a CPU. Raises IncompatibleBase."""
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    return WarmPipeline(base, load(base, device=device, dtype=dtype))


class WarmPipeline:
    """A base on its device, ready to take any stack. Not thread-safe: one thread owns it."""

    def __init__(self, base: Base, pipeline: StableDiffusionPipeline) -> None:
        self.base = base
        self.pipeline = pipeline
        self.device: torch.device = pipeline.device
        self.dtype = str(pipeline.dtype).removeprefix("torch.")
        self.words = Words(pipeline.tokenizer, pipeline.text_encoder)
        self._live: dict[str, Tensor] = {
            name: module.weight.data.view(module.weight.shape[0], -1)  # of the parameter's own storage
            for component in ("unet", "text_encoder")
            for name, module in adaptable(component, getattr(pipeline, component))
        }
        self._golden = {name: live.clone() for name, live in self._live.items()}
        self._patched: set[str] = set()
        self._key: object = None

    @property
    def modules(self) -> int:
        """Layers an adapter can change."""
        return len(self._live)

    def norms(self) -> dict[str, float]:
        """||W||_F of every layer an adapter can change, golden."""
        return {name: float(golden.float().norm()) for name, golden in self._golden.items()}

    def is_golden(self) -> bool:
        """Whether every layer holds the base's own bytes."""
        return all(torch.equal(self._live[name], golden) for name, golden in self._golden.items())

    @torch.no_grad()
    def apply(self, layers: Mapping[str, Factors], *, key: object = None) -> None:
        """Makes the live weights golden + `layers`; {} takes every adapter off.

        `key`, when not None, names the stack: the same key as before means nothing to do. Raises
        IncompatibleBase for a layer the base does not have, and changes nothing; after any other failure the
        pipeline is golden.
        """
        if key is not None and key == self._key:
            return
        for name, factors in layers.items():
            shape = (factors.up.shape[0], factors.down.shape[1])
            if name not in self._live or shape != self._live[name].shape:
                raise IncompatibleBase(f"{self.base.name} has no {name!r} of shape {shape}", field="stack")
        self._key = None
        try:
            self._restore(self._patched - layers.keys())
            for name, factors in layers.items():
                self._patched.add(name)
                self._patch(name, factors)
        except BaseException:
            self._restore(set(self._patched))
            raise
        self._key = key

    def _patch(self, name: str, factors: Factors) -> None:
        live, golden = self._live[name], self._golden[name]
        up, down = factors.up.to(self.device), factors.down.to(self.device)
        if live.dtype == torch.float32:
            torch.addmm(golden, up, down, out=live)
        else:
            live.copy_(torch.addmm(golden.float(), up, down))

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            self._live[name].copy_(self._golden[name])
            self._patched.discard(name)
