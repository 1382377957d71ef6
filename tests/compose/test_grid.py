"""The picture of a sweep: everything in its place, at any size and however long a label is."""

import io
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from compose import grid
from compose.lettering import Lettering, _of, lettering
from compose.render import Picture
from compose.sheet import GAP, contact_sheet, folded

FONT = ImageFont.load_default(12)
CELL = (255, 0, 255)
LONG = "a very long prompt of many words " * 20


def flat(width: int, height: int, colour: int = 128) -> Picture:
    return np.full((height, width, 3), colour, np.uint8)


def png(picture: Picture) -> bytes:
    return grid.to_png(picture, "{}")


def test_a_text_is_folded_between_words_and_cut_short_where_there_is_no_more_room() -> None:
    assert folded("short", FONT, 100, 3) == ["short"]
    lines = folded(LONG, FONT, 100, 3)
    assert len(lines) == 3
    assert lines[2].endswith("…")
    assert LONG.startswith(" ".join(lines)[:-1])
    assert all(FONT.getlength(line) <= 100 for line in lines)
    assert folded("", FONT, 100, 3) == []
    assert folded("x" * 300, FONT, 50, 2)[1].endswith("x…")
    assert len(folded("word", FONT, 1, 2)) == 2
    assert folded(f"{'name-' * 40}x 0.25", FONT, 100, 2)[1].endswith("… 0.25")


def test_what_the_font_cannot_draw_is_told_plainly() -> None:
    assert Lettering().line("Éclat\nünd 漢字 2×3") == "Eclat und \\u6f22\\u5b57 2x3"
    assert Lettering().line("ﬁn Å か が 👍") == "fin A \\u304b \\u304c \\U0001f44d"


@pytest.fixture(params=["with fontconfig", "without"])
def fonts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The system's fonts, or none that anybody finds."""
    if request.param == "without":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif not shutil.which("fc-match"):
        pytest.skip("fontconfig is not installed")
    _of.cache_clear()
    yield
    _of.cache_clear()


@pytest.mark.usefixtures("fonts")
def test_words_of_any_script_do_not_look_alike() -> None:
    words = ["漢字", "仮名", "かき", "がき", "фонарь", "фонари", "سلام", "👍", "👎"]

    def drawn(word: str) -> bytes:
        return contact_sheet([(f"{word} 1", [flat(64, 64)])], title="t", fold=True).tobytes()

    assert len({drawn(word) for word in words}) == len(words)


def test_a_font_of_the_system_draws_what_it_has() -> None:
    letters = lettering(["фонарь", "1"])
    if not letters.file:
        pytest.skip("no font here has Cyrillic letters")
    assert letters.line("фонарь\n\ue000 ×") == "фонарь \\ue000 x"
    boxes = {bytes(letters.font(12).getmask(c)) for c in "фонарь\ue000"}
    assert len(boxes) == 7  # none of them is the box that stands for what is not there


def test_what_pillow_draws_is_drawn_by_its_own_font() -> None:
    assert lettering(["plain × “text” · 0.5…"]) == Lettering()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (2048, 512)])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (16, 16), (256, 1), (1, 256)])
def test_labels_keep_to_their_places(width: int, height: int, columns: int, rows: int) -> None:
    side = grid.side(width, height, columns=columns, rows=rows)
    cell = grid.thumbnail(png(flat(width, height)), side)
    cell[:] = CELL
    cells = [(LONG, [cell] * columns) for _ in range(rows)]
    sheet = grid.draw(cells, columns=[LONG] * columns, title=LONG, notes=[LONG, LONG], side=side)
    assert sheet.shape[0] * sheet.shape[1] < 50_000_000
    assert max(sheet.shape[:2]) < 30_000
    seen, paper = (sheet == CELL).all(2), (sheet == 255).all(2)
    assert seen.sum() >= columns * rows * cell.shape[0] * cell.shape[1]  # nothing is drawn over a cell
    across, down = runs(seen.any(0)), runs(seen.any(1))
    (left, _), (top, _) = across[0], down[0]
    assert paper[top:, left - 2 : left].all()  # nor hidden by one
    for (_, end), (start, _) in itertools.pairwise(across):
        assert paper[top - 12 : top, max(end, start - 2) : start].all()
    for start, _ in down[1:]:
        assert paper[start - 2 : start, :left].all()
    assert not paper[top - 20 : top, left:].all()
    assert not paper[top:, :left].all()


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Where it is true, from and to."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def test_many_in_one_row_go_on_in_the_next_with_their_names() -> None:
    cells = [("", [flat(64, 64, 10 * i) for i in range(20)])]
    names = [f"seed {i}" for i in range(20)]
    sheet = grid.draw(cells, columns=names, title="t", notes=[], side=128)
    assert grid.across_of(20, 1) == 8
    for colour in range(10, 200, 10):  # white, black and grey are those of paper and text, too
        assert (sheet == colour).all(2).sum() >= 128 * 128
    assert sheet.shape[1] == 8 * (128 + GAP) + 2 * GAP


def test_a_cell_is_enlarged_in_whole_pixels_and_a_large_one_reduced() -> None:
    assert grid.side(64, 64, columns=3, rows=3) == 128
    assert grid.side(512, 512, columns=3, rows=3) == 512
    assert grid.side(2048, 1024, columns=2, rows=1) == 512
    assert grid.side(512, 512, columns=16, rows=16) == 153
    assert grid.thumbnail(png(flat(1024, 512)), 512).shape == (256, 512, 3)


def test_the_sweep_is_in_the_png() -> None:
    with Image.open(io.BytesIO(grid.to_png(flat(8, 8), '{"sweep": "漢"}'))) as image:
        assert image.info[grid.CHUNK] == '{"sweep": "漢"}'


def test_a_sheet_that_does_not_fold_has_room_for_its_names_alone() -> None:
    rows = [("first\nsecond", [flat(64, 64)] * 2), ("third", [flat(64, 64)])]
    assert contact_sheet(rows, title="t").shape == (34 + 2 * 132 + 4, 230 + 2 * 132 + 4, 3)
    assert contact_sheet(rows, title="t", columns=["a", "b"]).shape[0] == 56 + 2 * 132 + 4


def test_a_folded_label_of_two_lines_keeps_them_and_covers_no_picture() -> None:
    green = np.full((64, 64, 3), (10, 200, 60), np.uint8)

    def drawn(label: str) -> np.ndarray:
        return contact_sheet([(label, [green] * 2)], title="t", fold=True)

    long = "milo 0.8 > ochreframe 0.8,text_encoder=0.5,up_blocks.1=0.25"
    sheet = drawn(f"tsv: 50%\n{long}")
    assert ((sheet == green[0, 0]).all(2)).sum() == 2 * 128 * 128
    assert not np.array_equal(sheet, drawn(f"tsv: 50% {long}"))
    assert not np.array_equal(drawn("tsv: 50%\ncut"), drawn("tsv: 50% cut"))
