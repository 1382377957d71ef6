"""Arenas: all layers of one shape in one piece of memory, golden and live side by side.

The parameters of a model become views of its arenas, so that patching many layers is one batched product

    live[a:b] = round(golden[a:b] + up[a:b] @ down[a:b])        float32, one rounding

and no address ever changes: compiled code and CUDA graphs go on as they are. The golden copy of an arena is
made when the first of its layers is about to change; until then the live weights are golden. It lies beside
them, or in (pinned) host memory where the device has no room for it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from compose.errors import InvalidRequest
from compose.factors import Factors
from compose.formats.products import Product

SCRATCH_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Of float32 that are patched at once: on a CPU what stays in its cache, on a GPU what it has to spare."""

Part = tuple[Factors, float]
"""What an adapter adds to a layer, and its weight there."""


class Arena:
    """Layers `names`, weights `[n, d, k]`. Not thread-safe."""

    def __init__(self, modules: Sequence[tuple[str, nn.Linear | nn.Conv2d]], *, golden_on_host: bool) -> None:
        self.names = [name for name, _ in modules]
        self.place = {name: i for i, name in enumerate(self.names)}
        first = modules[0][1].weight
        d, k = first.shape[0], first[0].numel()
        self.live = torch.empty(len(modules), d, k, dtype=first.dtype, device=first.device)
        for view, (_, module) in zip(self.live, modules, strict=True):
            weight = module.weight
            view.copy_(weight.data.view(d, k))
            weight.data = view.view(weight.shape)
        self.golden_is_on_host = golden_on_host and first.is_cuda
        self._golden: Tensor | None = None

    def nbytes(self) -> int:
        """Of the live weights, and of the golden ones where they lie on the same device."""
        golden = self._golden if self._golden is not None and not self.golden_is_on_host else None
        return self.live.nbytes + (golden.nbytes if golden is not None else 0)

    def golden_bytes(self) -> int:
        """Of its golden weights when a layer was changed once, wherever they lie."""
        return pinned_bytes(self.live.nbytes) if self.golden_is_on_host else self.live.nbytes

    def golden(self, name: str) -> Tensor:
        """The base's own weight `[d, k]` of a layer. Not to be written."""
        source = self.live if self._golden is None else self._golden
        return source[self.place[name]]

    def is_golden(self) -> bool:
        """Whether every layer holds the base's own bytes."""
        if self._golden is None:
            return True
        golden = self._golden.to(self.live.device)
        return torch.equal(self.live.view(torch.uint8), golden.view(torch.uint8))  # 0 equals -0, NaN nothing

    def patch(self, layers: Iterable[str], parts: Mapping[str, Sequence[Part]]) -> None:
        """Makes `layers` golden plus what `parts` adds to each."""
        golden = self.copied()
        plain = []
        for name in layers:
            if any(needs_forming(factors) for factors, _ in parts[name]):
                self._patch_one(self.place[name], parts[name])
            else:
                plain.append(name)
        signature = {n: tuple(f.rank for f, _ in parts[n]) for n in plain}
        scratch: Tensor | None = None
        for a, b in self._runs(plain, signature):
            rows = [parts[name] for name in self.names[a:b]]
            up, down = _stacked(rows, self.live.device)
            live = self.live[a:b]
            if live.dtype == torch.float32:
                torch.baddbmm(golden[a:b].to(live.device), up, down, out=live)
                continue
            if scratch is None:
                scratch = torch.empty(self._most(), *live.shape[1:], device=live.device)
            total = scratch[: b - a].copy_(golden[a:b], non_blocking=True)
            live.copy_(total.baddbmm_(up, down))

    def restore(self, layers: Iterable[str]) -> None:
        """Makes `layers` golden."""
        if self._golden is None:  # nothing was ever written
            return
        golden = self._golden
        layers = list(layers)
        for a, b in self._runs(layers, dict.fromkeys(layers)):
            self.live[a:b].copy_(golden[a:b], non_blocking=True)

    def copied(self) -> Tensor:
        """The golden weights `[n, d, k]`, which are copied now if they never were. Not to be written."""
        if self._golden is None:
            if self.golden_is_on_host:
                self._golden = torch.empty_like(self.live, device="cpu", pin_memory=True).copy_(self.live)
            else:
                self._golden = self.live.clone()
        return self._golden

    def _patch_one(self, index: int, parts: Sequence[Part]) -> None:
        """A layer of which something is a DoRA or a product; factors first, then those."""
        live = self.live[index]
        start = total = self.copied()[index].to(live.device).float()
        if plain := [part for part in parts if not needs_forming(part[0])]:
            up, down = _stacked([plain], live.device)
            total = torch.addmm(start, up[0], down[0])
        for factors, weight in parts:
            if factors.magnitude is not None:
                total = total + weight * (decomposed(start, factors) - start)
            elif isinstance(factors, Product):
                total = torch.add(total, factors.to(live.device).whole(), alpha=weight)
        live.copy_(total)

    def _most(self) -> int:
        """Layers that are patched at once."""
        most = SCRATCH_BYTES.get(self.live.device.type, 0) // (4 * self.live[0].numel())
        return max(1, min(most, len(self.names)))

    def _runs(self, layers: Iterable[str], signature: Mapping[str, object]) -> Iterator[tuple[int, int]]:
        """[a, b) of neighbours with one signature, none larger than the scratch memory allows."""
        most, start, last = self._most(), None, None
        for index in sorted(self.place[name] for name in layers):
            if start is not None and last is not None:
                same = signature[self.names[index]] == signature[self.names[last]]
                if index != last + 1 or not same or index - start >= most:
                    yield start, last + 1
                    start = index
            start, last = index if start is None else start, index
        if start is not None and last is not None:
            yield start, last + 1


def arenas(modules: Iterable[tuple[str, nn.Linear | nn.Conv2d]], *, golden_on_host: bool) -> list[Arena]:
    """The arenas of a model's layers; from now on these are the layers' memory."""
    groups: dict[object, list[tuple[str, nn.Linear | nn.Conv2d]]] = defaultdict(list)
    for name, module in modules:
        weight = module.weight
        groups[weight.shape[0], weight[0].numel(), weight.dtype, weight.device].append((name, module))
    for group in groups.values():  # layers of one kind are neighbours: adapters change kinds
        group.sort(key=lambda item: (re.sub(r"\d+", "", item[0].rsplit("blocks.", 1)[-1]), item[0]))
    return [Arena(group, golden_on_host=golden_on_host) for group in groups.values()]


def pinned_bytes(size: int) -> int:
    """What a pinned tensor of so many bytes takes of the host's memory: torch allocates powers of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _stacked(rows: Sequence[Sequence[Part]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[w_1 up_1 …] `[n, d, r]` and [down_1; …] `[n, r, k]` of layers that have as many parts of the same
    ranks.
    """
    ups, downs = [], []
    for parts in zip(*rows, strict=True):
        up = torch.stack([factors.up for factors, _ in parts]).to(device)
        weights = {weight for _, weight in parts}
        if weights != {1.0}:
            up = up * torch.tensor([w for _, w in parts], dtype=up.dtype, device=device)[:, None, None]
        ups.append(up)
        downs.append(torch.stack([factors.down for factors, _ in parts]).to(device))
    return (ups[0], downs[0]) if len(ups) == 1 else (torch.cat(ups, 2), torch.cat(downs, 1))


def needs_forming(factors: Factors) -> bool:
    """Whether an update is no pair of factors that is multiplied as it is: a DoRA layer, or a product."""
    return factors.magnitude is not None or isinstance(factors, Product)


def decomposed(golden: Tensor, dora: Factors) -> Tensor:
    """m W / ||W||, `[d, k]`, of W = golden + up @ down, float32; the norm is over rows for a magnitude m
    `[d, 1]`, over columns for `[1, k]`, over all of an input channel for `[1, n]` (arXiv 2402.09353, eq. 5).
    """
    if dora.magnitude is None:
        raise InvalidRequest("a layer without a magnitude is no DoRA layer", field="stack")
    magnitude = dora.magnitude.to(golden.device)
    W = dora.onto(golden)
    rows, n = magnitude.shape
    if n == 1 and rows == len(W):
        norm = W.norm(dim=1, keepdim=True)
    else:
        norm = W.view(len(W), n, -1).norm(dim=(0, 2))[None].repeat_interleave(W.shape[1] // n, dim=1)
        magnitude = magnitude.repeat_interleave(W.shape[1] // n, dim=1)
    weight: Tensor = W * (magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny))
    return weight
