"""The live pipeline: golden weights, exact patching.

Golden weights are the base's own tensors, copied once and never written. A stack is applied as

    live = round(golden + up @ down)        float32, one rounding, into the same storage

so any stack costs nothing per step, addresses never change, nothing adds up over switches, and taking the
stack off is a copy. A DoRA layer of weight w, magnitude m, norms over what m says (arXiv 2402.09353, eq. 5),
adds to the sum before it is rounded

    w (m (golden + up @ down) / ||golden + up @ down|| - golden)

which at w = 1 is what PEFT and LyCORIS do with one adapter; ComfyUI blends it like this too. At other weights
they differ: PEFT scales up @ down alone and keeps m whole, LyCORIS scales m / ||…|| - 1.

Only layers of the old or the new stack are touched; when anything fails midway, every layer goes back to
golden.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from compose.bases import Base, adaptable, load
from compose.errors import IncompatibleBase, InvalidRequest
from compose.factors import Factors
from compose.weights import Weight
from compose.words import Words

Doras = Sequence[tuple[Mapping[str, Factors], Weight]]
"""The DoRA layers of each adapter, with its weight."""


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

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, the golden copy included."""
        parts = (getattr(self.pipeline, name) for name in ("unet", "text_encoder", "vae"))
        weights = [tensor for part in parts for tensor in part.parameters()]
        return sum(tensor.nbytes for tensor in (*weights, *self._golden.values()))

    def norms(self) -> dict[str, float]:
        """||W||_F of every layer an adapter can change, golden."""
        return {name: float(golden.float().norm()) for name, golden in self._golden.items()}

    def is_golden(self) -> bool:
        """Whether every layer holds the base's own bytes."""
        return all(torch.equal(self._live[name], golden) for name, golden in self._golden.items())

    @torch.no_grad()
    def apply(
        self,
        layers: Mapping[str, Factors],
        *,
        key: object = None,
        doras: Doras = (),
    ) -> None:
        """Makes the live weights golden + `layers` + the DoRA layers of `doras`, each adapter's with its
        weight; {} takes every adapter off.

        `key`, when not None, names the stack: the same key as before means nothing to do. Raises
        IncompatibleBase for a layer the base does not have, and changes nothing; after any other failure the
        pipeline is golden.
        """
        if key is not None and key == self._key:
            return
        for name, factors in (
            item for adapter in (layers, *(d for d, _ in doras)) for item in adapter.items()
        ):
            shape = (factors.up.shape[0], factors.down.shape[1])
            if name not in self._live or shape != self._live[name].shape:
                raise IncompatibleBase(f"{self.base.name} has no {name!r} of shape {shape}", field="stack")
        touched = dict.fromkeys([*layers, *(name for adapter, _ in doras for name in adapter)])
        self._key = None
        try:
            self._restore(self._patched - touched.keys())
            for name in touched:
                self._patched.add(name)
                decomposed = [
                    (adapter[name], weight.of(name)) for adapter, weight in doras if name in adapter
                ]
                self._patch(name, layers.get(name), decomposed)
        except BaseException:
            self._restore(set(self._patched))
            raise
        self._key = key

    def _patch(self, name: str, factors: Factors | None, decomposed: Sequence[tuple[Factors, float]]) -> None:
        live, golden = self._live[name], self._golden[name]
        if factors and not decomposed and live.dtype == torch.float32:
            torch.addmm(golden, factors.up.to(self.device), factors.down.to(self.device), out=live)
            return
        start = total = golden.float()
        if factors:
            total = torch.addmm(start, factors.up.to(self.device), factors.down.to(self.device))
        for dora, weight in decomposed:
            total = total + weight * (_decomposed(start, dora) - start)
        live.copy_(total)

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            self._live[name].copy_(self._golden[name])
            self._patched.discard(name)


def _decomposed(golden: Tensor, dora: Factors) -> Tensor:
    """magnitude * W / ||W||, `[d, k]`, of W = golden + up @ down; over rows for a magnitude `[d, 1]`, over
    columns for `[1, k]`, over all of an input channel for `[1, n]`.
    """
    if dora.magnitude is None:
        raise InvalidRequest("a layer without a magnitude is no DoRA layer", field="stack")
    magnitude = dora.magnitude.to(golden.device)
    W = torch.addmm(golden, dora.up.to(golden.device), dora.down.to(golden.device))
    rows, n = magnitude.shape
    if n == 1 and rows == len(W):
        norm = W.norm(dim=1, keepdim=True)
    else:
        norm = W.view(len(W), n, -1).norm(dim=(0, 2))[None].repeat_interleave(W.shape[1] // n, dim=1)
        magnitude = magnitude.repeat_interleave(W.shape[1] // n, dim=1)
    weight: Tensor = W * (magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny))
    return weight
