"""Words that adapters bring: textual-inversion vectors in spare rows of the embedding tables, for one job at
a time.

The tokenizers never learn the words, so nothing leaks between jobs, no other word is split by them, and two
assets may claim one word in different jobs. A prompt is cut at the words, the text between them tokenised as
ever, and the words' row numbers put in. Invariant: outside `teach` the spare rows are zero and no prompt can
reach them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compose.errors import IncompatibleBase, InvalidRequest

SPARE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Word:
    """A word with its vectors `[n, width]` for each kind of text encoder. The weight blends from the table's
    mean word (0) to the word as trained (1). `digest` names what it was read from; "" is never cached.
    """

    text: str
    vectors: Mapping[str, Tensor] = field(hash=False)
    weight: float = 1.0
    digest: str = ""


class Rows:
    """The word table of a text encoder, with room for the words of one job."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, text_encoder
        self.first = int(text_encoder.get_input_embeddings().num_embeddings)
        text_encoder.resize_token_embeddings(self.first + SPARE_ROWS, mean_resizing=False)
        text_encoder.requires_grad_(False)
        self.table: Tensor = text_encoder.get_input_embeddings().weight.data
        self.table[self.first :] = 0
        self.mean = self.table[: self.first].float().mean(0)
        self._taught: dict[str, range] = {}

    def claim(self, words: Sequence[tuple[str, Tensor]]) -> dict[str, range]:
        """The rows of each word. Raises InvalidRequest for too many, IncompatibleBase for another width."""
        claimed: dict[str, range] = {}
        row = self.first
        for text, vectors in words:
            n, width = vectors.shape
            if width != self.table.shape[1]:
                raise IncompatibleBase(
                    f"{text!r} has vectors of {width} numbers, this base's have {self.table.shape[1]}",
                    field="stack",
                )
            claimed[text] = range(row, row + n)
            row += n
        if row > len(self.table):
            raise InvalidRequest(
                f"the stack's words have more than {SPARE_ROWS} vectors together", field="stack"
            )
        return claimed

    def teach(self, claimed: dict[str, range], words: Sequence[tuple[str, Tensor, float]]) -> None:
        """Writes the words into their rows."""
        for text, vectors, weight in words:
            rows = claimed[text]
            meant = vectors.to(self.mean.device, torch.float32)
            self.table[rows.start : rows.stop] = self.mean + weight * (meant - self.mean)
        self._taught = claimed

    def forget(self) -> None:
        """Nobody can reach a word any more."""
        self._taught = {}
        self.table[self.first :] = 0

    def ids(self, piece: str) -> list[int]:
        """Token ids of a taught word, or of text."""
        if piece in self._taught:
            return list(self._taught[piece])
        found: list[int] = self.tokenizer(piece, add_special_tokens=False).input_ids
        return found


class Words:
    """The words of all text encoders of a pipeline, by the encoder's kind."""

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        self._rows = rows
        self.taught: tuple[Word, ...] = ()

    @contextmanager
    def teach(self, words: Sequence[Word]) -> Iterator[None]:
        """For the length of the block the words mean their vectors.

        Raises InvalidRequest for one word claimed twice or too many vectors, IncompatibleBase for another
        width or another text encoder's word.
        """
        seen: set[str] = set()
        for word in words:
            if word.text in seen:
                raise InvalidRequest(
                    f"two adapters of the stack claim the word {word.text!r}; leave one out", field="stack"
                )
            seen.add(word.text)
            if not any(kind in self._rows for kind in word.vectors):
                raise IncompatibleBase(
                    f"{word.text!r} is for {' and '.join(word.vectors)}, and this base has none of them",
                    field="stack",
                )
        claims = {
            kind: rows.claim([(w.text, w.vectors[kind]) for w in words if kind in w.vectors])
            for kind, rows in self._rows.items()
        }
        try:
            for kind, rows in self._rows.items():
                known = [(w.text, w.vectors[kind], w.weight) for w in words if kind in w.vectors]
                rows.teach(claims[kind], known)
            self.taught = tuple(words)
            yield
        finally:
            self.taught = ()
            with ExitStack() as every:  # though one fails
                for rows in self._rows.values():
                    every.callback(rows.forget)

    def cut(self, text: str) -> list[str]:
        """The text in pieces: taught words, and what is between them. Where a word begins or ends with a
        letter or a digit, none may adjoin.
        """
        if not self.taught:
            return [text]
        longest_first = sorted((word.text for word in self.taught), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(_alone, longest_first))})", text)
        return [piece for piece in pieces if piece.strip()]


def called(word: str, text: str) -> bool:
    """Whether a text has this word, as `Words.cut` finds it."""
    return re.search(_alone(word), text) is not None


def _alone(word: str) -> str:
    before, after = (edge.isalnum() or edge == "_" for edge in (word[0], word[-1]))
    return r"(?<!\w)" * before + re.escape(word) + r"(?!\w)" * after
