"""What a check-in finds out of a file while it still comes in: what its header says, whether its numbers are
finite, its projection. All of it can be found out of the whole file as well, and is, where something is
wrong or unusual: nothing is refused here, and little is held.
"""

from collections.abc import Callable
from dataclasses import dataclass

from compose.arriving import ArrivingLayers
from compose.errors import ComposeError
from compose.formats.sketch import Binding, Sketch
from compose.threads import heed
from registry.errors import RegistryError
from registry.headers import Header
from registry.intake import Bytes
from registry.tensors import TensorStream

HELD_LIMIT = 16 << 20
"""Bytes of tensors that may wait for the others of their layer: files keep them side by side."""


@dataclass(frozen=True, slots=True)
class Gated:
    """A header that was let in, and what it says."""

    header: Header
    sketch: Sketch
    binding: Binding


class Arriving:
    """A file of `size` bytes, whose header `look` lets in; of 0 where nobody said how many: then all is left
    for later.
    """

    def __init__(self, size: int, look: Callable[[Header], Gated]) -> None:
        self._stream, self._look = TensorStream(size, self._begin), look
        self._gated: Gated | None = None
        self._layers: ArrivingLayers | None = None
        self._given_up = not size

    def update(self, data: Bytes) -> None:
        """The next bytes of the file."""
        if self._given_up:
            return
        heed()
        try:
            self._take(data)
        except (RegistryError, ComposeError):  # `check_in` will meet it again, and say so
            self._give_up()

    def _begin(self, header: Header) -> None:
        self._gated = self._look(header)
        if self._gated.sketch.is_words or any(t.stop - t.start > HELD_LIMIT for t in header.tensors.values()):
            self._give_up()
        else:
            self._layers = ArrivingLayers(self._gated.binding)

    def _take(self, data: Bytes) -> None:
        for name, info, tensor in self._stream.update(data):
            if not self._layers:
                return
            self._layers.put(name, tensor, info.dtype, info.shape)
            if self._layers.held > HELD_LIMIT:
                self._give_up()

    def found(self) -> tuple[Gated, bytes] | None:
        """What the header says, and the projection, of a file that went by whole and is sound."""
        if not (self._stream.done and self._gated and self._layers):
            return None
        try:
            return self._gated, self._layers.projection()
        except ComposeError:
            return None

    def _give_up(self) -> None:
        self._given_up, self._layers = True, None
