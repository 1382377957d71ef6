"""A picture of who fights whom, and where: parts of the base by pairs of adapters, the crosstalk as colour
and number.
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from compose.interference import Report

CELL_WIDTH, CELL_HEIGHT, MARGIN = 96, 24, 12
ADAPTERS_LIMIT, NAME_LIMIT = 6, 24
_QUIET, _LOUD = (247, 247, 242), (178, 34, 24)


def heat_map(report: Report, names: Sequence[str]) -> Image.Image:
    """A row for each part, a column for each ordered pair: how loudly the second answers where the first
    lives.

    The colour is linear in the logarithm from 0.1 (white) to 3 times (red); grey where the first does
    nothing.
    """
    font = ImageFont.load_default(13)
    names = [name if len(name) <= NAME_LIMIT else f"{name[: NAME_LIMIT - 1]}…" for name in names]
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    parts = report.parts
    label = max((int(font.getlength(part)) for part in parts), default=0) + 2 * MARGIN
    column = max([CELL_WIDTH, *(int(font.getlength(f"where {name}")) + 2 * MARGIN for name in names)])
    head = 3 * CELL_HEIGHT
    image = Image.new(
        "RGB",
        (label + column * len(pairs) + MARGIN, head + CELL_HEIGHT * (len(parts) + 1) + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), "crosstalk", fill="black", font=font)
    for column_index, (i, j) in enumerate(pairs):
        x = label + column * column_index + column // 2
        for row, text in enumerate((names[j], f"where {names[i]}", "lives")):
            draw.text((x, CELL_HEIGHT * row + 12), text, fill="black", font=font, anchor="mm")
    for row, part in enumerate(["all layers", *parts]):
        y = head + CELL_HEIGHT * row
        draw.text((MARGIN, y + CELL_HEIGHT // 2), part, fill="black", font=font, anchor="lm")
        for column_index, (i, j) in enumerate(pairs):
            x, value = label + column * column_index, report.crosstalk(i, j, "" if row == 0 else part)
            box = (x, y, x + column - 2, y + CELL_HEIGHT - 2)
            draw.rectangle(box, fill=_colour(value))
            text = f"{value:.2f}" if math.isfinite(value) else "alone"
            draw.text((x + column // 2, y + CELL_HEIGHT // 2), text, fill="black", font=font, anchor="mm")
    return image


def _colour(value: float) -> tuple[int, int, int]:
    if not math.isfinite(value):
        return (225, 225, 225)
    heat = math.log(max(value, 0.1) / 0.1) / math.log(30)
    share = min(1.0, heat)
    red, green, blue = (
        round(quiet + (loud - quiet) * share * 0.85) for quiet, loud in zip(_QUIET, _LOUD, strict=True)
    )
    return red, green, blue
