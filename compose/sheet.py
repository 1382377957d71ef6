"""Contact sheets: rows of pictures with a label each, as one picture to decide by."""

import re
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from compose.lettering import Font, lettering
from compose.render import Picture

LABEL, GAP, TEXT, LINE = 230, 4, 15, 16
TITLE_LINES, NOTE_LINES, COLUMN_LINES = 3, 2, 3
WIDTH, COLUMN = 440, 64
"""Pixels that a folded title, and a folded name of a column, have at least."""
LARGE, WIDE = 200, 1300
"""Pixels of a picture's side, and of a row, beyond which folded text grows with them, to twice its size."""


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Picture]]],
    *,
    title: str,
    columns: Sequence[str] = (),
    side: int = 128,
    notes: Sequence[str] = (),
    fold: bool = False,
) -> Picture:
    """One picture of all: `rows` are (label, pictures of one size `[h, w, 3]`), `columns` name what stands
    above them (more than pictures in a row go on above the next one), `notes` are lines below the title.

    A label's second line, after a newline, is printed smaller. With `fold` all are, and every text keeps
    to its place: it goes on in the next line, and ends in "…" where there is no more room.
    """
    shown = rows[0][1][0].shape[:2]
    height, width = (max(1, round(length * side / max(shown))) for length in shown)
    across, down = max(len(pictures) for _, pictures in rows), height + GAP
    scale = min(2.0, max(1.0, side / LARGE, across * (width + GAP) / WIDE)) if fold else 1.0
    line, text = round(LINE * scale), round(TEXT * scale)
    letters = lettering([title, *notes, *columns, *(row for row, _ in rows)])
    title, notes, columns = letters.line(title), [*map(letters.line, notes)], [*map(letters.line, columns)]
    lines = [[letters.line(part) for part in row.splitlines()] for row, _ in rows]
    heading, large, small = (letters.font(text + more) for more in (round(2 * scale), 0, -3))
    label, column = LABEL, width + GAP
    titles, names = [title], [[name] for name in columns]
    told = [("".join(row[:1]), row[1:]) for row in lines]
    if fold:
        column, down = max(column, COLUMN), max(down, line + GAP)
        room = max((int(small.getlength(part)) + 16 for row in lines for part in row), default=GAP)
        label = min(round(LABEL * scale), room)
        full = max(label + across * column, WIDTH) - 2 * GAP
        titles = folded(title, heading, full - GAP, TITLE_LINES)
        notes = [part for note in notes for part in folded(note, small, full - GAP, NOTE_LINES)]
        names = [folded(name, small, column - 2 * GAP, COLUMN_LINES) for name in columns]
        most = (down - GAP) // line
        parts = [[p for part in row for p in folded(part, small, label - 16, most)] for row in lines]
        told = [("", row[:most]) for row in parts]
    top = 8 + len(titles) * round(26 * scale) + len(notes) * line + (line // 2 if notes else 0)
    band = 6 + line * max(map(len, names)) if names else 0
    each = band if len(names) > across else 0  # every row has names of its own
    head, down = top + (0 if each else band), down + each
    wide = label + across * column + GAP
    sheet = Image.new("RGB", (max(wide, WIDTH if fold else 0), head + len(rows) * down + GAP), "white")
    pen = ImageDraw.Draw(sheet)

    def write(x: int, y: int, parts: Sequence[str], font: Font, pitch: int) -> None:
        """Lines on their baselines, since fonts differ in the room that they leave above their letters."""
        fill = "#555555" if font is small else "black"
        for place, part in enumerate(parts):
            pen.text((x, y + place * pitch + font.size), part, fill=fill, font=font, anchor="ls")

    write(8, 8, titles, heading, round(26 * scale))
    write(8, 8 + len(titles) * round(26 * scale), notes, small, line)
    for index, name in enumerate(names):
        write(label + index % across * column, top + index // across * down, name, small, line)
    for index, ((first, second), (_, pictures)) in enumerate(zip(told, rows, strict=True)):
        y = head + index * down + each
        write(8, y + 6, [first], large, line)
        write(8, y if fold else y + 30, second, small, line)
        for place, picture in enumerate(pictures):
            image = Image.fromarray(picture).resize(
                (width, height), Image.Resampling.NEAREST if side >= max(shown) else Image.Resampling.LANCZOS
            )
            sheet.paste(image, (label + place * column, y))
    return np.asarray(sheet)


def folded(text: str, font: Font, width: int, lines: int) -> list[str]:
    """The text in at most so many lines of `width` pixels, broken between words where it can be; "…" ends
    what is cut short, before the number that a label may end in.
    """
    found: list[str] = []
    left = text
    while left and len(found) < lines:
        cut = _fits(left, font, width)
        if cut == len(left):
            return [*found, left]
        if len(found) == lines - 1:
            number = re.search(r" -?[\d.]+$", left)
            end = f"…{number[0]}" if number else "…"
            return [*found, left[: _fits(left, font, width - font.getlength(end))].rstrip() + end]
        space = left.rfind(" ", 0, cut + 1)
        cut = space if space > 0 else cut
        found.append(left[:cut].rstrip())
        left = left[cut:].lstrip()
    return found


def _fits(text: str, font: Font, width: float) -> int:
    """How many of its characters fit into so many pixels; one at least."""
    most = min(len(text), max(1, int(width)))  # no letter is narrower than a pixel
    return max(1, bisect_right(range(1, most + 1), width, key=lambda cut: font.getlength(text[:cut])))
