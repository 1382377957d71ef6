"""The weights of a diffusers directory, one tensor at a time, by the names of layers.

A component's weights are one file, or the shards that an index names; of several precisions the plainest name
is taken. Names with `text_model` in them and without are one.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compose.errors import IncompatibleBase


class Checkpoint:
    """The tensors of a directory's trained components, by `<component>.<name in its file>`, for as long as
    `opened` is. Raises IncompatibleBase.
    """

    def __init__(self, directory: Path, opened: ExitStack) -> None:
        self._directory = directory
        self._files: dict[str, tuple[safe_open, str]] = {}
        for component in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
            for file in _weights(directory / component):
                try:
                    reader = opened.enter_context(safe_open(file, framework="pt"))
                    for name in reader.keys():  # noqa: SIM118
                        self._files[f"{component}.{name}"] = (reader, name)
                except (SafetensorError, OSError) as error:
                    raise IncompatibleBase(f"{file} cannot be read: {error}", field="tuned") from None
        if not self._files:
            raise IncompatibleBase(
                f"{directory} is no diffusers directory with safetensors weights; a single-file checkpoint "
                "becomes one with diffusers: from_single_file(FILE).save_pretrained(DIRECTORY)",
                field="tuned",
            )

    def names(self) -> list[str]:
        """All of them."""
        return list(self._files)

    def key(self, layer: str) -> str:
        """Where a layer's weight is, with `text_model` in the path or without; "" for nowhere."""
        component, path = layer.split(".", 1)
        spelled = (f"{component}.{path}.weight", f"{component}.{path.removeprefix('text_model.')}.weight")
        return next((key for key in spelled if key in self._files), "")

    def golden(self, layer: str) -> Tensor:
        """A layer's weight `[d, k]`, float32. Raises IncompatibleBase where there is none."""
        found = self.read(self.key(layer)) if self.key(layer) else None
        if found is None:
            raise IncompatibleBase(f"{self._directory} has no weight for {layer!r}", field="base")
        return found.float().flatten(1)

    def read(self, key: str) -> Tensor | None:
        """A tensor; None where there is none of this name."""
        component, name = key.split(".", 1)
        for spelled in (name, name.removeprefix("text_model."), f"text_model.{name}"):
            if found := self._files.get(f"{component}.{spelled}"):
                reader, own = found
                tensor: Tensor = reader.get_tensor(own)  # type: ignore[no-untyped-call]
                return tensor
        return None


def _weights(component: Path) -> Iterator[Path]:
    """A component's weight files: the shards that an index names, or one; of several the plainest name.
    Variants are `model.fp16.safetensors`, `model.safetensors.index.fp16.json`.
    """
    files = sorted(component.glob("*.safetensors"))
    whole = [path for path in files if not re.search(r"-\d+-of-\d+", path.name)]
    found = [*component.glob("*.safetensors.index*.json"), *whole]
    if not found and files:
        raise IncompatibleBase(
            f"{component} holds shards without their index; download it again", field="tuned"
        )
    for path in sorted(found, key=lambda path: (_variants(path), path.suffix, path.name))[:1]:
        yield from [path] if path.suffix == ".safetensors" else _shards(path)


def _variants(path: Path) -> int:
    return len(set(path.name.split(".")) - {"safetensors", "index", "json"})


def _shards(index: Path) -> Iterator[Path]:
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompatibleBase(f"{index} cannot be read: {error}", field="tuned") from None
    yield from (index.parent / Path(str(name)).name for name in sorted(named))
