"""Pictures that a render starts from: decoded within limits, brought to the size of the render.

What is transparent in a picture lies on white, as web UIs have it; in a mask, and in what a ControlNet reads,
on black, which says nothing there; it stays transparent for a ControlNet that reads that.
"""

import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from compose.errors import InvalidRequest

FORMATS = ("PNG", "JPEG", "WEBP")
WHITE, BLACK, CLEAR = "white", "black", "clear"
BYTES_LIMIT, PIXELS_LIMIT, SIDE_LIMIT, SCANS_LIMIT = 32 << 20, 50_000_000, 30_000, 40


@dataclass(frozen=True, slots=True)
class Source:
    """A picture `[height, width, 3]` to start from, and the mask `[height, width]` (255: paint) if only a
    part is painted. `strength` is the share of the steps that is done; the digests are of what was sent.
    """

    picture: NDArray[np.uint8] = field(compare=False)
    mask: NDArray[np.uint8] | None = field(compare=False)
    strength: float
    digest: str
    mask_digest: str = ""

    def check(self, steps: int) -> None:
        """Raises InvalidRequest when so little of so few steps is none."""
        if int(steps * self.strength) < 1:
            raise InvalidRequest(
                f"strength {self.strength:g} of {steps} steps is less than one step; raise either",
                field="strength",
            )

    def told(self) -> Mapping[str, object]:
        """For a manifest."""
        mask = {"mask": self.mask_digest} if self.mask_digest else {}
        return {"image": self.digest, "strength": self.strength, **mask}


def opened(data: bytes, *, field: str, behind: str, limit: int = BYTES_LIMIT) -> Image.Image:
    """A picture, turned as its EXIF says, in RGB: on the colour `behind` where it is transparent, with "" in
    whatever colours it has there; with CLEAR in RGBA. Raises InvalidRequest.
    """
    if len(data) > limit:
        raise InvalidRequest(f"the {field} has {len(data)} bytes, the limit is {limit}", field=field)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > SCANS_LIMIT:
        raise InvalidRequest(f"the {field} has more than {SCANS_LIMIT} scans; save it anew", field=field)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size  # of the header: nothing is decoded yet
            if width * height > PIXELS_LIMIT or max(width, height) > SIDE_LIMIT:
                raise InvalidRequest(
                    f"the {field} has {width}x{height} pixels, the limit is {PIXELS_LIMIT}, "
                    f"and {SIDE_LIMIT} a side",
                    field=field,
                )
            image.load()
            turned: Image.Image = image
            with suppress(Exception):  # EXIF that cannot be read turns nothing
                turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I"):  # 16 bits
                turned = turned.convert("I").point(lambda value: value / 256).convert("L")
            if behind == CLEAR:
                return turned.convert("RGBA")
            if behind and turned.has_transparency_data:
                over, turned = turned.convert("RGBA"), Image.new("RGB", turned.size, behind)
                turned.paste(over, mask=over)
            return turned.convert("RGB")
    except InvalidRequest:
        raise
    except UnidentifiedImageError:
        raise InvalidRequest(f"the {field} is no PNG, JPEG or WebP; convert it", field=field) from None
    except Image.DecompressionBombError:
        raise InvalidRequest(
            f"the {field}'s pixels are more than the limit, {PIXELS_LIMIT}", field=field
        ) from None
    except Exception as error:  # whatever a hostile file makes a decoder raise
        raise InvalidRequest(f"the {field} is damaged: {error}", field=field) from None


def fitting(size: tuple[int, int], granularity: int, most: int) -> tuple[int, int]:
    """The size of a render from a picture of this size: its own, at most `most` a side, as the granularity
    allows.
    """
    shrink = min(1.0, most / max(size))
    width, height = (max(granularity, int(side * shrink) // granularity * granularity) for side in size)
    return width, height


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture to start from."""
    return image.resize(size, Image.Resampling.LANCZOS)


def gray(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask."""
    return image.convert("L").resize(size, Image.Resampling.BILINEAR)


def source(
    picture: NDArray[np.uint8],
    mask: NDArray[np.uint8] | None,
    *,
    strength: float | None,
    digest: str,
    mask_digest: str = "",
) -> Source:
    """A source of a picture and a mask of the render's size. Raises InvalidRequest."""
    share = strength if strength is not None else (1.0 if mask is not None else 0.6)
    if not 0 < share <= 1:
        raise InvalidRequest(f"strength {share} is not above 0 and up to 1", field="strength")
    if mask is not None and not mask.any():
        raise InvalidRequest("the mask is black all over: nothing would be painted", field="mask")
    return Source(picture, mask, share, digest, mask_digest)


def pasted(painted: NDArray[np.uint8], source: Source) -> NDArray[np.uint8]:
    """What was painted where the mask is white, the source's own pixels where it is black."""
    if source.mask is None:
        return painted
    share = source.mask[..., None].astype(np.float32) / 255
    mixed = source.picture + (painted.astype(np.float32) - source.picture) * share
    found: NDArray[np.uint8] = mixed.round().astype(np.uint8)
    return found
