"""Pictures as they were sent, decoded once for all orders that hold the same: the cells of a sweep do.

    sent = Original(data, "image", behind=WHITE)
    sent.size                      # width, height in pixels, turned as its EXIF says
    sent.fitted((512, 512))        # the very array that other orders hold

What was made of a picture is known by its digest, kind, size and what was put behind it for as long as an
order holds it.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compose.errors import InvalidRequest
from compose.source import gray, opened, resized

Picture = NDArray[np.uint8]
SIZES = 1024
"""Pictures whose sizes are remembered."""
_made: WeakValueDictionary[tuple[object, ...], Picture] = WeakValueDictionary()
_sizes: OrderedDict[str, tuple[int, int]] = OrderedDict()
_mutex = threading.Lock()


class Original:
    """A picture as it was sent, decoded when it has to be. `field` is what the request calls it; `behind` is
    the colour that it lies on where it is transparent. Raises InvalidRequest, when it is decoded, for one
    that is damaged, none, or too large.
    """

    def __init__(self, data: bytes, field: str, *, behind: str) -> None:
        self.digest = digest(data)
        self._data, self._field, self._behind = data, field, behind
        self._image: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        with _mutex:
            known = _sizes.get(self.digest)
        return known or self._opened().size

    def fitted(self, size: tuple[int, int]) -> Picture:
        """All of it at this size, `[height, width, 3]`."""
        return self.made("whole", size, lambda image: resized(image, size))

    def mask(self, size: tuple[int, int]) -> Picture:
        """As a mask of this size, `[height, width]`."""
        return self.made("mask", size, lambda image: gray(image, size))

    def made(self, kind: str, size: tuple[int, ...], make: Callable[[Image.Image], Image.Image]) -> Picture:
        """What `make` makes of it, or made of the same before. `make` must not change what it is given."""
        key = (self.digest, kind, size, self._behind)
        with _mutex:
            known = _made.get(key)
        if known is None:
            fresh = np.asarray(make(self._opened()))
            with _mutex:
                known = _made.setdefault(key, fresh)
        return known

    def _opened(self) -> Image.Image:
        if self._image is None:
            self._image = opened(self._data, field=self._field, behind=self._behind)
            with _mutex:
                _sizes[self.digest] = self._image.size
                if len(_sizes) > SIZES:
                    _sizes.popitem(last=False)
        return self._image


def apart(sent: bytes, made: bytes) -> list[str]:
    """In what the picture of a PNG that was sent is not the one that was made of its manifest."""
    try:
        was, now = (np.asarray(opened(data, field="png", behind=""), np.int16) for data in (sent, made))
    except InvalidRequest as error:
        return [f"the picture in the PNG cannot be compared: {error}"]
    if was.shape != now.shape:
        (high, wide), (rows, columns) = was.shape[:2], now.shape[:2]
        return [f"the picture in the PNG is {wide}x{high}, this one {columns}x{rows}: it was cut or scaled"]
    by = np.abs(was - now).max(axis=2)
    if not by.any():
        return []
    return [
        f"{np.count_nonzero(by)} of {by.size} pixels are not those in the PNG, by up to {by.max()} of 255: "
        "it was edited, or this machine computes otherwise"
    ]


def digest(data: bytes) -> str:
    """Of what was sent."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
