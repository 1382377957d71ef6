"""Scores by a CLIP or SigLIP model of the operator's (a directory that transformers wrote), for bases that no
judge of ours knows. Let e(x) be the unit embedding of picture x, t(p) of text p.

    concept(x)   how far x is on the way from the picture without adapters to that with this one alone, same
                 prompt and seed, in what the model sees:   <e(x) - e_0, e_1 - e_0> / max(||e_1 - e_0||^2, m),
                 m = a tenth of that length's mean over the pictures, at least 1e-4
    prompt(x)    how much of the prompt is still seen:      g(x) / g_1,  g(x) = <e(x), t(p) - t("")>,
                 g_1 = the least g of the same picture with each adapter alone; 1 where g_1 is under 0.01:
                 what is not seen there cannot be lost

Both are cut to [0, 1]: 0 is absent, 1 as it is alone. The floor m keeps a picture that the adapter alone
hardly changes from being scored by noise: its scores are all near 0, alone as well.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from compose.bases import read_config
from compose.errors import ComposeError, InvalidRequest, first_line
from compose.render import Picture
from compose.scoring import Scores

MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
MOVED, SEEN = 1e-4, 0.01
BATCH = 16
Embeddings = NDArray[np.float64]
"""`[n, width]`, of length 1."""


class Clip:
    """A model with its tokenizer and its picture processor. Safe to use from several threads."""

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        """Raises InvalidRequest for a directory that holds none, or a damaged one."""
        try:
            kind = read_config(path / "config.json").get("model_type")
        except ComposeError as error:
            raise _refused(path, str(error)) from None
        if kind not in MODELS:
            raise _refused(path, f"its config.json names a {str(kind)[:80]!r}, not {' or '.join(MODELS)}")
        try:
            transformers.utils.logging.disable_progress_bar()
            load: dict[str, Any] = {"local_files_only": True}
            model = getattr(transformers, MODELS[kind]).from_pretrained(path, use_safetensors=True, **load)
            self._processor: Any = transformers.AutoImageProcessor.from_pretrained(path, **load)
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **load)
        except Exception as error:  # whatever the loaders stumble over is wrong with the directory
            raise _refused(path, first_line(error)) from error
        self._model: Any = model.to(device).requires_grad_(False).eval()
        self._padding = "max_length" if kind == "siglip" else True  # as SigLIP was trained
        self._side = int(model.config.vision_config.image_size)
        self._window = int(model.config.text_config.max_position_embeddings)
        self.device, self._one = device, threading.Lock()
        try:
            self.pictures([np.zeros((64, 64, 3), np.uint8)])
            one, other = self.texts(["a star", "the moon"])
        except Exception as error:  # what was saved together does not fit together
            raise _refused(path, f"it does not work: {first_line(error)}") from error
        if np.allclose(one, other, atol=1e-9):
            raise _refused(path, "it reads two texts as one: its tokenizer is not there, or not its own")

    def nbytes(self) -> int:
        """Of its weights."""
        return sum(int(p.nbytes) for p in self._model.parameters())

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Picture]) -> Embeddings:
        """Of pictures in their order."""
        found = []
        for start in range(0, len(pictures), BATCH):
            part = list(pictures[start : start + BATCH])
            with self._one:
                told = self._processor(images=part, return_tensors="pt")["pixel_values"]
                if tuple(told.shape[-2:]) != (self._side, self._side):
                    raise InvalidRequest(f"it sees {self._side} pixels a side and is shown {told.shape[-1]}")
                found.append(_unit(self._model.get_image_features(pixel_values=told.to(self.device))))
        return np.concatenate(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Of texts in their order; what is longer than the model's window is cut."""
        how = {"padding": self._padding, "truncation": True, "max_length": self._window}
        with self._one:
            told = self._tokenizer(list(texts), return_tensors="pt", **how)
            takes = {"input_ids", "attention_mask"} & set(told)
            found = self._model.get_text_features(**{name: told[name].to(self.device) for name in takes})
            return _unit(found)


def concept(pictures: Embeddings, without: Embeddings, alone: Embeddings) -> Scores:
    """`[n]`: of each picture, given the same without any adapter and with the one alone."""
    way = alone - without
    lengths = (way**2).sum(1)
    least = max(float(lengths.mean()) / 10, MOVED)
    shares: Scores = np.clip(((pictures - without) * way).sum(1) / np.maximum(lengths, least), 0.0, 1.0)
    return shares


def prompt_kept(
    pictures: Embeddings, alone: Sequence[Embeddings], prompts: Embeddings, nothing: Embeddings
) -> Scores:
    """`[n]`: of each picture, given the same with each adapter alone, its prompt, and the empty text
    (`[1, width]`).
    """
    way = prompts - nothing
    seen = (pictures * way).sum(1)
    before = np.min([(each * way).sum(1) for each in alone], axis=0)
    shares: Scores = np.where(before < SEEN, 1.0, np.clip(seen / np.maximum(before, SEEN), 0.0, 1.0))
    return shares


def _unit(output: Any) -> Embeddings:
    embedding: torch.Tensor = getattr(output, "pooler_output", output)
    found: Embeddings = torch.nn.functional.normalize(embedding.double(), dim=-1).cpu().numpy()
    return found


def _refused(path: Path, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{path} is no scorer: {why}; give a directory with a CLIP or SigLIP model of transformers, its "
        "tokenizer and its preprocessor_config.json",
        field="scorer",
    )
