"""Adapters beside layers that cannot be patched: quantised ones, and those that are stored in 8 bits and
cast for each forward (diffusers' layerwise casting). Adding an update to such a weight would round it away,
so it is computed beside the layer at every step:

    y = W(x) + up (down x)        up = [w_1 up_1 …], down = [down_1; …], both cast once to the type of W(x)

W(x) is whatever the layer does by itself; with nothing beside it, it is left alone, to the bit. This costs
two thin products a layer and step, while patched layers cost nothing; a product (`compose.formats.products`)
a whole one, formed for each step so that nothing as large as the layer is held.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compose.arenas import Part
from compose.errors import IncompatibleBase
from compose.formats.products import Product

PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def is_plain(module: nn.Linear | nn.Conv2d) -> bool:
    """Whether a layer's weight is a tensor of numbers that can be patched in place."""
    weight = module.weight
    return type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.dtype in PLAIN


class Sidecar:
    """What is computed beside one layer. Not thread-safe."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self.module = module
        if isinstance(module, nn.Conv2d):
            self._kernel: tuple[int, ...] = tuple(module.kernel_size)
            self.shape = module.out_channels, module.in_channels * self._kernel[0] * self._kernel[1]
        else:
            self._kernel = ()
            self.shape = module.out_features, module.in_features
        self._parts: tuple[Part, ...] = ()
        self._cast: tuple[Tensor, Tensor] | None = None
        module.register_forward_hook(self._beside)

    @property
    def is_empty(self) -> bool:
        """Whether the layer is left alone."""
        return not self._parts

    def check(self, name: str, magnitude: Tensor | None) -> None:
        """Raises IncompatibleBase for what cannot be computed beside this layer."""
        if magnitude is not None:
            raise IncompatibleBase(
                f"{name!r} is a DoRA layer, whose effect depends on the base's exact weight, and that is "
                "quantised here: load the base in full precision to put it on",
                field="stack",
            )
        if isinstance(self.module, nn.Conv2d) and self.module.groups != 1:
            raise IncompatibleBase(
                f"{name!r} is a quantised convolution of {self.module.groups} groups: load the base in full "
                "precision to put adapters on it",
                field="stack",
            )

    def put(self, parts: Sequence[Part]) -> None:
        """What is beside the layer from now on; nothing for ()."""
        self._parts, self._cast = tuple(parts), None

    def weight(self) -> Tensor:
        """The layer's own weight `[d, k]` as it is read, float32. Raises IncompatibleBase for packed ones."""
        weight = self.module.weight.data
        if not weight.is_floating_point() or weight.numel() != self.shape[0] * self.shape[1]:
            raise IncompatibleBase(f"a weight packed as {weight.dtype} cannot be looked at", field="base")
        return weight.to(torch.float32).reshape(self.shape)

    def _beside(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._parts:
            return None
        up, down = self._factors(output)
        x = args[0].to(output.dtype)
        if up.shape[1]:
            inner = self._through(x, down)
            output = output + (
                functional.conv2d(inner, up[:, :, None, None])
                if self._kernel
                else functional.linear(inner, up)
            )
        for factors, weight in self._parts:
            if isinstance(factors, Product):
                update = factors.to(output.device).whole().mul_(weight)
                output = output + self._through(x, update.to(output.dtype))
        return output

    def _through(self, x: Tensor, matrix: Tensor) -> Tensor:
        """What the layer would make of x with `matrix` `[n, k]` for its weight."""
        if not isinstance(self.module, nn.Conv2d):
            return functional.linear(x, matrix)
        weight, of = matrix.view(len(matrix), -1, *self._kernel), self.module
        return functional.conv2d(x, weight, None, of.stride, of.padding, of.dilation)

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of factors in one, up `[d, R]`, down `[R, k]`."""
        if self._cast is None or self._cast[0].dtype != like.dtype or self._cast[0].device != like.device:
            d, k = self.shape
            pairs = [(f.up * weight, f.down) for f, weight in self._parts if not isinstance(f, Product)]
            up = torch.cat([up for up, _ in pairs], 1) if pairs else torch.empty(d, 0)
            down = torch.cat([down for _, down in pairs], 0) if pairs else torch.empty(0, k)
            self._cast = up.to(like.device, like.dtype), down.to(like.device, like.dtype)
        return self._cast
