"""A picture of who fights whom, and where: parts of the base by pairs of adapters, the crosstalk as colour
and number.
"""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from compose.interference import Report

CELL_WIDTH, CELL_HEIGHT, MARGIN = 96, 24, 12
ADAPTERS_LIMIT, NAME_LIMIT = 6, 24
LINE_HEIGHT = 18
LEGEND = (
    "How loudly one adapter answers to what the other's layers see, against that one's own voice: 0 is "
    "silence, 1 as loud. Grey: the one that lives there changes nothing itself. By weights: not calibrated, "
    "so for all inputs alike that its weights take."
)
_QUIET, _LOUD = (247, 247, 242), (178, 34, 24)


def heat_map(report: Report, names: Sequence[str]) -> Image.Image:
    """A row for each part, a column for each ordered pair: how loudly the second answers where the first
    lives.

    The colour is linear in the logarithm from 0.1 (white) to 3 times (red); grey where the first does
    nothing. Below it says so.
    """
    font = ImageFont.load_default(13)
    names = [name if len(name) <= NAME_LIMIT else f"{name[: NAME_LIMIT - 1]}…" for name in names]
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    parts = report.parts
    label = max((int(font.getlength(part)) for part in parts), default=0) + 2 * MARGIN
    lives = ["lives" if measured else "lives (by weights)" for measured in report.calibrated]
    heads = [*(f"where {name}" for name in names), *lives]
    column = max([CELL_WIDTH, *(int(font.getlength(head)) + 2 * MARGIN for head in heads)])
    head, width = 3 * CELL_HEIGHT, label + column * len(pairs) + MARGIN
    foot = head + CELL_HEIGHT * (len(parts) + 1)
    legend = textwrap.wrap(LEGEND, max(30, int((width - 2 * MARGIN) / font.getlength("n"))))
    image = Image.new("RGB", (width, foot + LINE_HEIGHT * len(legend) + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), "crosstalk", fill="black", font=font)
    for row, line in enumerate(legend):
        draw.text((MARGIN, foot + MARGIN + LINE_HEIGHT * row), line, fill=(90, 90, 90), font=font)
    for column_index, (i, j) in enumerate(pairs):
        x = label + column * column_index + column // 2
        for row, text in enumerate((names[j], f"where {names[i]}", lives[i])):
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
