"""Pictures that strangers send, made harmless: decoded within limits, drawn anew as a plain PNG.

Nothing of the file survives but its pixels: no EXIF, no GPS, no prompt of another program, no second frame.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from PIL import Image, ImageOps, UnidentifiedImageError

from registry.errors import InvalidFile

FORMATS = ("PNG", "JPEG", "WEBP")
BYTES_LIMIT, PIXELS_LIMIT, SIDE_LIMIT, SIDE = 20 << 20, 50_000_000, 30_000, 1024
SCANS_LIMIT = 40
"""Every scan of a progressive JPEG costs the time of a whole picture, and a few bytes."""
_one = threading.Lock()
"""A picture of the largest size takes hundreds of megabytes: one at a time."""


def redrawn(data: bytes) -> tuple[bytes, int, int]:
    """A picture's pixels as a PNG of at most `SIDE` a side, with its width and height. Raises InvalidFile."""
    if len(data) > BYTES_LIMIT:
        raise InvalidFile(f"the picture has {len(data)} bytes, the limit is {BYTES_LIMIT}", field="image")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > SCANS_LIMIT:
        raise InvalidFile(f"the picture has more than {SCANS_LIMIT} scans; save it anew", field="image")
    with _one, _decoding(), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        width, height = opened.size  # of the header: nothing is decoded yet
        if width * height > PIXELS_LIMIT or max(width, height) > SIDE_LIMIT:
            raise InvalidFile(
                f"the picture has {width}x{height} pixels, the limit is {PIXELS_LIMIT}, "
                f"and {SIDE_LIMIT} a side",
                field="image",
            )
        opened.load()
        turned: Image.Image = opened
        with suppress(Exception):  # EXIF that cannot be read turns nothing
            turned = ImageOps.exif_transpose(opened)
        if turned.mode.startswith("I"):  # 16 bits
            turned = turned.convert("I").point(lambda value: value / 256).convert("L")
        turned = turned.convert("RGB")
        turned.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    plain, out = Image.new("RGB", turned.size), io.BytesIO()
    plain.paste(turned)  # an image of ours, without the `info` that PNGs are saved with
    plain.save(out, "PNG", optimize=True)
    return out.getvalue(), *plain.size


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise InvalidFile(
            "the picture is no PNG, JPEG or WebP; convert it to one of these", field="image"
        ) from None
    except Image.DecompressionBombError:
        raise InvalidFile(
            f"the picture's pixels are more than the limit, {PIXELS_LIMIT}", field="image"
        ) from None
    except InvalidFile:
        raise
    except Exception as error:  # whatever a hostile file makes a decoder raise
        raise InvalidFile(f"the picture is damaged: {error}", field="image") from None
