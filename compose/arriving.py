"""The projection of an adapter whose tensors come one after the other: each layer is looked at once its last
tensor is here, and then let go.
"""

import torch
from torch import Tensor

from compose.formats import Binding, Layers
from compose.projection import Sketches

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}
"""What safetensors' names mean."""


class ArrivingLayers:
    """The bound layers of a file, and its other tensors. `held` is how many bytes wait for others."""

    def __init__(self, binding: Binding) -> None:
        self._here, self.held = _Here(), 0
        self._layers, self._sketches = Layers(lambda: self._here, binding), Sketches(binding.bound)
        self._together: dict[tuple[str, ...], list[str]] = {}
        self._users: dict[str, list[tuple[str, ...]]] = {}
        for name, entry in binding.bound.items():
            keys = tuple(sorted(entry.tensors.values()))
            self._together.setdefault(keys, []).append(name)
        self._missing = {keys: set(keys) for keys in self._together}
        for keys in self._together:
            for key in keys:
                self._users.setdefault(key, []).append(keys)

    def put(self, key: str, data: bytearray, dtype: str, shape: tuple[int, ...]) -> None:
        """A tensor is here. Raises NonFinite, UnsupportedLayout."""
        kind = DTYPES[dtype]
        self._here[key] = (
            torch.frombuffer(data, dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)
        )
        self.held += len(data)
        if key not in self._users:
            self._layers.check(key)
            self._drop(key)
        for keys in self._users.get(key, ()):
            self._missing[keys].discard(key)
        for keys in [keys for keys in self._users.get(key, ()) if not self._missing[keys]]:
            for name in self._together[keys]:
                self._sketches.put(name, self._layers[name])
            for used in keys:
                self._users[used].remove(keys)
                if not self._users[used]:
                    self._drop(used)

    def _drop(self, key: str) -> None:
        self.held -= self._here.pop(key).nbytes

    def projection(self) -> bytes:
        """As `compose.projection.projection` makes it, when all are here. Raises NonFinite."""
        return self._sketches.projection()


class _Here(dict[str, Tensor]):
    """Tensors as `Layers` asks for them."""

    def get_tensor(self, key: str) -> Tensor:
        return self[key]
