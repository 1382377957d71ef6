"""What a file's header says of an adapter, before a tensor is read.

A `Sketch` names the tensors that make up each layer and each word; `bind` finds the layers in a base's table;
`load` reads them. Invariant: every tensor of the file is in an entry, in a word, or named in `leftovers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

RANK_LIMIT = 1024
ALPHA_LIMIT = 1e6
Shapes = Mapping[str, tuple[int, ...]]
HINTS = ("modelspec.architecture", "ss_base_model_version")
"""Metadata that says what a file was trained on."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer of a file. `spelling` is how the file names the module, `tensors` its tensors by role, `form`
    how they make the update `[d, k]` of rank `rank` (`compose.formats.forms`), `numbers` how many they hold.

    The update is times `scale`, or alpha / `dim` where there is an `alpha` tensor (0 means: `dim`). `rows`
    are those of the update that are a base layer's, in its order; () is all of them. `magnitude` is the
    shape of a DoRA layer's: `[d, 1]` over rows, `[1, n]` over columns or input channels.
    """

    spelling: str
    form: str
    tensors: Mapping[str, str]
    d: int
    k: int
    rank: int
    dim: int
    scale: float = 1.0
    rows: tuple[tuple[int, int], ...] = ()
    magnitude: tuple[int, int] | None = None
    numbers: int = 0


@dataclass(frozen=True, slots=True)
class Vectors:
    """Word vectors for one text encoder: rows `first` to `first + n` of a tensor `[…, width]`."""

    key: str
    n: int
    width: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class SketchedWord:
    """A word of a file: its text, "" where the file does not say, and its vectors by kind of text encoder
    (`clip_l`, `clip_g`, `t5`), "" where it does not say that.
    """

    token: str
    vectors: Mapping[str, Vectors]

    @property
    def n(self) -> int:
        """Vectors of the word, the same for every encoder."""
        return next(iter(self.vectors.values())).n


@dataclass(frozen=True, slots=True)
class Sketch:
    """An adapter as its header shows it: layers of a LoRA, words, or both."""

    layout: str
    entries: tuple[Entry, ...] = ()
    leftovers: tuple[str, ...] = ()
    words: tuple[SketchedWord, ...] = ()
    hints: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_words(self) -> bool:
        """Whether this is a textual inversion: words and no layers."""
        return bool(self.words) and not self.entries

    @property
    def token(self) -> str:
        """The word the file names, where it is a textual inversion of one."""
        return self.words[0].token if self.is_words and len(self.words) == 1 else ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The words that keep the file's names: those of a LoRA, and those of a file of several."""
        return tuple(word.token for word in self.words) if self.entries or len(self.words) > 1 else ()

    @property
    def rank(self) -> int:
        """Largest rank of the layers; the number of vectors of a textual inversion."""
        if self.is_words:
            return sum(word.n for word in self.words)
        return max(entry.rank for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a sketch's layers are in a base: canonical name -> entry; `unbound` are the file's other layers
    and tensors, `lacking` of them layers or words; `clashes` are two spellings of one base layer each.
    """

    family: str
    bound: Mapping[str, Entry]
    unbound: tuple[str, ...]
    clashes: tuple[tuple[str, str], ...] = ()
    lacking: int = 0

    @property
    def fits(self) -> bool:
        """Whether most of the file's layers or words are there, whatever else it holds (biases, norms)."""
        return bool(self.bound) and len(self.bound) >= self.lacking

    @property
    def total(self) -> int:
        """Layers (or words) of the file, found or not."""
        return len(self.bound) + self.lacking
