"""Words that adapters bring: textual-inversion vectors in spare rows of the embedding table, for one job at a
time.

The tokenizer never learns the words, so nothing leaks between jobs, no other word is split by them, and two
assets may claim one word in different jobs. A prompt is cut at the words, the text between them tokenised as
ever, and the words' row numbers put in. Invariant: outside `teach` the spare rows are zero and no prompt can
reach them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from compose.errors import IncompatibleBase, InvalidRequest

SPARE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Word:
    """A word with its vectors `[n, width]`. The weight blends from the table's mean word (0) to the word as
    trained (1).
    """

    text: str
    vectors: Tensor
    weight: float = 1.0


class Words:
    """The word table of a text encoder, with room for the words of one job."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        self._tokenizer = tokenizer
        self._encoder = text_encoder
        self._first = int(text_encoder.get_input_embeddings().num_embeddings)
        text_encoder.resize_token_embeddings(self._first + SPARE_ROWS, mean_resizing=False)
        text_encoder.requires_grad_(False)
        self._rows: Tensor = text_encoder.get_input_embeddings().weight.data
        self._rows[self._first :] = 0
        self._mean = self._rows[: self._first].float().mean(0)
        self._taught: dict[str, range] = {}

    @contextmanager
    def teach(self, words: Sequence[Word]) -> Iterator[None]:
        """For the length of the block the words mean their vectors.

        Raises InvalidRequest for one word claimed twice or too many vectors, IncompatibleBase for another
        width.
        """
        claimed: dict[str, range] = {}
        row = self._first
        for word in words:
            n, width = word.vectors.shape
            if word.text in claimed:
                raise InvalidRequest(
                    f"two adapters of the stack claim the word {word.text!r}; leave one out", field="stack"
                )
            if width != self._rows.shape[1]:
                raise IncompatibleBase(
                    f"{word.text!r} has vectors of {width} numbers, this base's have {self._rows.shape[1]}",
                    field="stack",
                )
            claimed[word.text] = range(row, row + n)
            row += n
        if row > len(self._rows):
            raise InvalidRequest(
                f"the stack's words have more than {SPARE_ROWS} vectors together", field="stack"
            )
        try:
            for word in words:
                rows = claimed[word.text]
                vectors = word.vectors.to(self._mean.device, torch.float32)
                self._rows[rows.start : rows.stop] = self._mean + word.weight * (vectors - self._mean)
            self._taught = claimed
            yield
        finally:
            self._taught = {}
            self._rows[self._first :] = 0

    def encode(self, prompt: str) -> tuple[Tensor, int]:
        """The prompt's embedding `[1, length, width]`, and how many of its tokens did not fit into the
        window.
        """
        tokenizer = self._tokenizer
        ids = [token for piece in _cut(prompt, self._taught) for token in self._ids(piece)]
        room = tokenizer.model_max_length - 2
        window = [tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id]
        window += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(window))
        tokens = torch.tensor([window], device=self._rows.device)
        with torch.no_grad():
            embedding: Tensor = self._encoder(tokens).last_hidden_state
        return embedding, max(0, len(ids) - room)

    def _ids(self, piece: str) -> list[int]:
        if piece in self._taught:
            return list(self._taught[piece])
        ids: list[int] = self._tokenizer(piece, add_special_tokens=False).input_ids
        return ids


def _cut(prompt: str, words: Mapping[str, range]) -> list[str]:
    """The prompt in pieces: taught words, and the text between them. A word counts only where it stands
    alone.
    """
    if not words:
        return [prompt]
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    pieces = re.split(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)", prompt)
    return [piece for piece in pieces if piece.strip()]
