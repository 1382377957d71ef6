"""Pictures that strangers send, made harmless: decoded within limits, drawn anew as a plain PNG.

Nothing of the file survives but its pixels: no EXIF, no GPS, no prompt of another program, no second frame.
What is transparent is white.
"""

import io
import threading

from PIL import Image

from compose.errors import InvalidRequest
from compose.source import WHITE, opened
from registry.errors import InvalidFile

BYTES_LIMIT, SIDE = 20 << 20, 1024
_one = threading.Lock()
"""A picture of the largest size takes hundreds of megabytes: one at a time."""


def redrawn(data: bytes) -> tuple[bytes, int, int]:
    """A picture's pixels as a PNG of at most `SIDE` a side, width and height. Raises InvalidFile."""
    with _one:
        try:
            turned = opened(data, field="image", behind=WHITE, limit=BYTES_LIMIT)
        except InvalidRequest as error:
            raise InvalidFile(str(error), field="image") from None
        turned.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    plain, out = Image.new("RGB", turned.size), io.BytesIO()
    plain.paste(turned)  # an image of ours, without the `info` that PNGs are saved with
    plain.save(out, "PNG", optimize=True)
    return out.getvalue(), *plain.size
