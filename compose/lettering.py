"""The letters of labels: Pillow's own font, and where a text has more than that, the one of the system that
has most of it, if fontconfig (`fc-match`) is there. What neither has is told by its code points, so that no
two words of another script look the same.

    letters = lettering(["星 red", "1.25"])      # for all texts of a picture
    letters.line("星 red")                       # "星 red", or "\\u661f red"
    letters.font(12)
"""

import functools
import subprocess
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from PIL import ImageFont

OWN = frozenset(map(chr, range(0x20, 0x7F))) | set("·…“”‘’")
"""What Pillow's own font has, as far as labels go."""
SECONDS = 5.0
Font = ImageFont.FreeTypeFont


@dataclass(frozen=True, slots=True)
class Lettering:
    """A font file (its face `index`), and what it `has` of what was asked for; "" is Pillow's own."""

    file: str = ""
    index: int = 0
    has: frozenset[str] = OWN

    def font(self, size: int) -> Font:
        """In pixels."""
        if not self.file:
            return cast(Font, ImageFont.load_default(size))
        return ImageFont.truetype(self.file, size, self.index)

    def line(self, text: str) -> str:
        """The text as one line of what the font has: for the rest the letters of which it is made, less their
        accents, where these are plain, else code points.
        """
        line = " ".join(unicodedata.normalize("NFC", text).replace("×", "x").split())
        return "".join(c if c in self.has else _told(c) for c in line)


def _told(character: str) -> str:
    parts = unicodedata.normalize("NFKD", character)
    plain = "".join(c for c in parts if not unicodedata.combining(c))
    return (
        plain if plain and OWN.issuperset(plain) else character.encode("ascii", "backslashreplace").decode()
    )


def lettering(texts: Iterable[str]) -> Lettering:
    """What draws most of these texts."""
    asked = {c for text in texts for c in unicodedata.normalize("NFC", text) if not c.isspace()} - {"×"}
    return _of(frozenset(asked | OWN)) if asked - OWN else Lettering()


@functools.lru_cache(maxsize=16)
def _of(asked: frozenset[str]) -> Lettering:
    """Asks fontconfig, which prefers the font that lacks least."""
    charset = " ".join(f"{ord(c):x}" for c in sorted(asked))
    command = ["fc-match", "--format", r"%{file}\n%{index}\n%{charset}", f":charset={charset}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
        file, index, ranges = told.split("\n")
        runs = [run.partition("-") for run in ranges.split()]
        there = [range(int(first, 16), int(last or first, 16) + 1) for first, _, last in runs]
        has = frozenset(c for c in asked if any(ord(c) in run for run in there))
        found = Lettering(file, int(index) & 0xFFFF, has)  # above them the instance of a variable font
        found.font(12)
    except (
        OSError,
        ValueError,
        subprocess.SubprocessError,
    ):  # no fontconfig, no fonts, more than a line holds
        return Lettering()
    return found if has >= OWN and has > OWN else Lettering()
