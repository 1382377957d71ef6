"""Contact sheets: rows of pictures with a label each, as one picture to decide by."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from compose.render import Picture

LABEL, GAP, TEXT = 230, 4, 15


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Picture]]], *, title: str, columns: Sequence[str] = (), side: int = 128
) -> Picture:
    """One picture of all: `rows` are (label, pictures of one size `[h, w, 3]`), `columns` name what stands
    above them.

    A label's second line, after a newline, is printed smaller.
    """
    shown = rows[0][1][0].shape[:2]
    height, width = (max(1, round(length * side / max(shown))) for length in shown)
    head = 34 + (22 if columns else 0)
    across = max(len(pictures) for _, pictures in rows)
    size = (LABEL + across * (width + GAP) + GAP, head + len(rows) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT - 3)
    pen.text((8, 8), title, fill="black", font=ImageFont.load_default(TEXT + 2))
    for index, column in enumerate(columns):
        pen.text((LABEL + index * (width + GAP), 34), column, fill="#555555", font=small)
    for index, (label, pictures) in enumerate(rows):
        top = head + index * (height + GAP)
        first, _, second = label.partition("\n")
        pen.text((8, top + 6), first, fill="black", font=large)
        pen.multiline_text((8, top + 30), second, fill="#555555", font=small)
        for place, picture in enumerate(pictures):
            image = Image.fromarray(picture).resize(
                (width, height), Image.Resampling.NEAREST if side >= max(shown) else Image.Resampling.LANCZOS
            )
            sheet.paste(image, (LABEL + place * (width + GAP), top))
    return np.asarray(sheet)
