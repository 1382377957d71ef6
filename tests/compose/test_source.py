"""Pictures as they are opened: in RGB, whatever the file has."""

import io

import numpy as np
import pytest
from PIL import Image

from compose.source import BLACK, WHITE, opened

HALF = 128


def png(image: Image.Image, **more: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "png", **more)
    return out.getvalue()


def colours(data: bytes, behind: str) -> list[tuple[int, ...]]:
    found = np.asarray(opened(data, field="image", behind=behind))
    return [tuple(map(int, pixel)) for pixel in found[0]]


def row(mode: str, *values: int | tuple[int, ...]) -> Image.Image:
    found = Image.new(mode, (len(values), 1))
    for place, value in enumerate(values):
        found.putpixel((place, 0), value)
    return found


RGBA = png(row("RGBA", (200, 100, 0, 255), (9, 90, 200, 0), (200, 100, 0, HALF)))
GRAY = png(row("LA", (200, 255), (9, 0), (200, HALF)))
COLOUR_KEY = png(row("RGB", (200, 100, 0), (9, 90, 200)), transparency=(9, 90, 200))
_PALETTE = row("P", 0, 1)
_PALETTE.putpalette([200, 100, 0, 9, 90, 200])
PALETTE = png(_PALETTE, transparency=b"\xff\x00")


@pytest.mark.parametrize(("behind", "ground"), [(WHITE, 255), (BLACK, 0), ("", None)])
def test_what_is_transparent_is_its_ground(behind: str, ground: int | None) -> None:
    def over(*colour: int, alpha: int) -> tuple[int, ...]:
        if ground is None:
            return colour
        return tuple(round((c * alpha + ground * (255 - alpha)) / 255) for c in colour)

    orange, hidden = (200, 100, 0), (9, 90, 200)
    assert colours(RGBA, behind) == [orange, over(*hidden, alpha=0), over(*orange, alpha=HALF)]
    gray = [(200,) * 3, over(*(9,) * 3, alpha=0), over(*(200,) * 3, alpha=HALF)]
    assert colours(GRAY, behind) == gray
    for data in (COLOUR_KEY, PALETTE):
        assert colours(data, behind) == [orange, over(*hidden, alpha=0)]
