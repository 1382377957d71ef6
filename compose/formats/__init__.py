"""Any adapter file in the wild -> canonical factors, one module per family of layouts.

    sketch = recognise(shapes, metadata)     # from the header alone: which layout, which layers
    binding = require(sketch, "sd1")         # layer names of the file -> layers of the base
    factors = load(path, binding)            # float32, the scale inside `up`
    words = load_words(path, sketch)         # of a textual inversion, or of a LoRA that brings words along

Adding a layout is adding one module with a `recognise` and its line in `LAYOUTS`; `gather` knows what tensors
are called, `forms` what they make, `naming` what modules are called.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compose.errors import NonFinite, UnsupportedLayout
from compose.factors import Factors
from compose.formats import diffusers, embeddings, kohya, lora_diffusion, peft
from compose.formats.binding import bind, infer, require, words_for
from compose.formats.forms import FORMS
from compose.formats.gather import refuse_unread
from compose.formats.products import Product, is_smaller
from compose.formats.sketch import ALPHA_LIMIT, HINTS, Binding, Entry, Shapes, Sketch

LAYOUTS: tuple[Callable[[Shapes, Mapping[str, str], str], Sketch | None], ...] = (
    lora_diffusion.recognise,
    kohya.recognise,
    peft.recognise,
    diffusers.recognise,
)

VALUE_LIMIT = 1e12
"""No weight of a sound adapter is larger; below it no sum or product of a stack overflows float32."""

MAPPED_BYTES = 32 << 20
"""Of float32, read from one mapping of a file before the next: mapped pages count as the process's memory."""


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str = "") -> Sketch:
    """The layout of a file, from its tensors' names and shapes. Raises UnsupportedLayout."""
    words, rest = embeddings.words_along(shapes, metadata)
    if words and all(key.endswith("_out") for key in rest):  # OneTrainer's, for an encoder's output
        hints = {key: metadata[key] for key in HINTS if key in metadata}
        return Sketch(embeddings.layout(shapes), leftovers=tuple(rest), words=words, hints=hints)
    for layout in LAYOUTS:
        sketch = layout(rest, metadata, adapter_config)
        if sketch and sketch.entries:
            return replace(sketch, words=words)
    refuse_unread(rest)
    if not words and (sketch := embeddings.recognise(shapes, metadata, adapter_config)):
        return sketch
    shown = ", ".join(repr(key[:80]) for key in list(rest)[:3])
    raise UnsupportedLayout(f"no LoRA or textual inversion layout has tensors such as {shown}")


class Tensors(Protocol):
    """Where tensors are, by name."""

    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, key: str, /) -> Tensor: ...


class Layers(Mapping[str, Factors]):
    """The bound layers of a file, each read, and looked at for NaN, when it is asked for. What was read is
    unmapped again, a few layers later: `opened` opens the file, and does so again. Several threads may ask.
    """

    def __init__(self, opened: Callable[[], Tensors], binding: Binding) -> None:
        self._opened, self._binding = opened, binding
        self._open()

        self._last: tuple[str, Factors] | None = None

    def _open(self) -> None:
        self._file, self._read_bytes = self._opened(), 0

    def __getitem__(self, name: str) -> Factors:
        entry = self._binding.bound[name]
        if entry.rows:  # the next layer is probably of the same projection
            last = self._last
            if last is None or last[0] != entry.spelling:
                self._last = last = entry.spelling, _factors(self._file, entry)
            found = last[1].of_rows(entry.rows)
        else:
            found, self._last = _factors(self._file, entry), None
        self._read_bytes += sum(tensor.nbytes for tensor in found.held)
        if self._read_bytes > MAPPED_BYTES:
            self._open()
        return found

    def shape(self, name: str) -> tuple[int, int, int]:
        """d, r and k of a layer, without reading it."""
        entry = self._binding.bound[name]
        return sum(end - start for start, end in entry.rows) or entry.d, entry.rank, entry.k

    def nbytes(self, name: str) -> int:
        """Of a layer as it is kept, float32, without reading it."""
        entry = self._binding.bound[name]
        if self.is_product(name):
            return 4 * entry.numbers
        d, rank, k = self.shape(name)
        return 4 * (rank * (d + k) + math.prod(entry.magnitude or (0,)))

    def is_product(self, name: str) -> bool:
        """Whether a layer is kept as the product it is, without reading it."""
        return _is_product(self._binding.bound[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._binding.bound)

    def __len__(self) -> int:
        return len(self._binding.bound)

    def check_others(self) -> None:
        """Reads every tensor that is no part of these, one in memory at a time. Raises NonFinite."""
        known = {key for entry in self._binding.bound.values() for key in entry.tensors.values()}
        for key in self._file.keys():  # noqa: SIM118
            if key not in known:
                self.check(key)

    def check(self, key: str) -> None:
        """Reads a tensor. Raises NonFinite."""
        _read(self._file, key)


@contextmanager
def layers(path: Path, binding: Binding) -> Iterator[Layers]:
    """A file's layers, one in memory at a time. Raises NonFinite, UnsupportedLayout."""
    try:
        yield Layers(lambda: safe_open(path, framework="pt"), binding)
    except SafetensorError as error:
        raise _unreadable(error) from None


def load(path: Path, binding: Binding) -> dict[str, Factors]:
    """Canonical factors of the bound layers. Raises NonFinite, UnsupportedLayout."""
    with layers(path, binding) as found:
        return dict(found)


@dataclass(frozen=True, slots=True)
class LoadedWord:
    """A word of a file: its text, "" where the file does not say, and its vectors `[n, width]` by kind of
    text encoder, float32.
    """

    token: str
    vectors: Mapping[str, Tensor]


def load_words(path: Path, sketch: Sketch) -> tuple[LoadedWord, ...]:
    """The words of a file, for every encoder it has vectors for. Raises NonFinite, UnsupportedLayout."""
    with _opened(path) as file:
        return tuple(
            LoadedWord(
                word.token,
                {
                    kind: _read(file, v.key).reshape(-1, v.width)[v.first : v.first + v.n]
                    for kind, v in word.vectors.items()
                },
            )
            for word in sketch.words
        )


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise _unreadable(error) from None


def _unreadable(error: SafetensorError) -> UnsupportedLayout:
    """safetensors is stricter than our gate in a few odd places."""
    return UnsupportedLayout(f"safetensors cannot read this file: {error}")


def _factors(file: Tensors, entry: Entry) -> Factors:
    """The update of an entry, all rows of it."""
    tensors = {role: _read(file, key) for role, key in entry.tensors.items() if role != "alpha"}
    magnitude = tensors.pop("magnitude", tensors.pop("dora_scale", None))
    if magnitude is not None and entry.magnitude:
        magnitude = magnitude.reshape(entry.magnitude)
    scale = _scale(file, entry)
    if _is_product(entry):
        shape = entry.d, entry.k
        return Product.scaled(entry.form, tensors, magnitude, scale=scale, rank=entry.rank, shape=shape)
    up, down = FORMS[entry.form].rebuild(tensors)
    return Factors(up if scale == 1 else up * scale, down.contiguous(), magnitude)


def _is_product(entry: Entry) -> bool:
    return is_smaller(entry.form, entry.d, entry.k, entry.rank)


def _scale(file: Tensors, entry: Entry) -> float:
    if "alpha" not in entry.tensors or not entry.dim:
        return entry.scale
    alpha = float(_read(file, entry.tensors["alpha"]))
    if not abs(alpha) < ALPHA_LIMIT:
        raise NonFinite(f"the alpha {alpha:g} of {entry.spelling!r} is not below {ALPHA_LIMIT:g}; correct it")
    return (alpha or entry.dim) / entry.dim  # kohya: 0 means the rank


def _read(file: Tensors, key: str) -> Tensor:
    tensor = file.get_tensor(key).to(torch.float32)
    if not _sound(tensor):
        raise NonFinite(
            f"the tensor {key!r} holds NaN, infinity or a number beyond {VALUE_LIMIT:g}; "
            "the training went wrong, use an earlier checkpoint"
        )
    return tensor


def _sound(values: Tensor) -> bool:
    """Whether none is NaN or beyond VALUE_LIMIT. Their norm, one fast pass, nearly always tells; for a dot
    product torch would wake all its threads.
    """
    if float(torch.linalg.vector_norm(values)) < VALUE_LIMIT / 10:  # a tenth: the norm is rounded
        return True
    low, high = torch.aminmax(values)
    return float(low) > -VALUE_LIMIT and float(high) < VALUE_LIMIT  # false for NaN too


__all__ = [
    "Binding", "Entry", "Layers", "LoadedWord", "Sketch", "bind", "infer", "layers", "load", "load_words",
    "recognise", "require", "words_for",
]  # fmt: skip
