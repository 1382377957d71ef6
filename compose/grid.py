"""The picture of a sweep: its cells, labelled, with the sweep's JSON inside the PNG (an iTXt chunk named
`atelier-sweep`).
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, PngImagePlugin

from compose.render import Picture
from compose.sheet import contact_sheet

CHUNK = "atelier-sweep"
SMALLEST, LARGEST = 128, 512
"""Pixels of a cell's longer side: smaller pictures are enlarged, larger ones reduced."""
PIXELS, LONGEST = 6_000_000, 16_000
"""Of all cells together, and of a row or column of them: a PNG of that many can be shown with a card."""
ACROSS = 8


def side(width: int, height: int, *, columns: int, rows: int) -> int:
    """Pixels of a cell's longer side in the grid."""
    room = PIXELS / (columns * rows) * max(width, height) / min(width, height)
    longest = LONGEST // max(across_of(columns, rows), rows)
    return max(8, min(max(SMALLEST, min(max(width, height), LARGEST)), int(math.sqrt(room)), longest))


def across_of(columns: int, rows: int) -> int:
    """Cells in a row of the grid: many in the only row go on in further ones."""
    return columns if rows > 1 else min(columns, max(ACROSS, math.ceil(math.sqrt(columns))))


def thumbnail(png: bytes, side: int) -> Picture:
    """A finished cell, no larger than it is drawn."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.array(image)


def draw(
    rows: Sequence[tuple[str, Sequence[Picture]]],
    *,
    columns: Sequence[str],
    title: str,
    notes: Sequence[str],
    side: int,
) -> Picture:
    """All cells as one picture: `rows` are (label, cells), `columns` the labels above them."""
    across = across_of(len(columns), len(rows))
    if across < len(columns):
        ((label, cells),) = rows
        rows = [(label, cells[start : start + across]) for start in range(0, len(cells), across)]
    return contact_sheet(rows, columns=columns, title=title, notes=notes, side=side, fold=True)


def to_png(picture: Picture, sweep: str) -> bytes:
    """The grid as PNG, with the sweep inside."""
    info, out = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(CHUNK, sweep)
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "png", pnginfo=info)
    return out.getvalue()
