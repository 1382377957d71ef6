"""A full checkpoint against its base -> a LoRA: what was trained, in as many directions as it needs.

    W_tuned - W_base ~ up down        by layer; the smallest rank that holds a share of its energy

Both are diffusers directories; every layer is read, factored and let go before the next, so memory is that of
the largest layer. What no LoRA can hold (biases, norms, embeddings) is told, with how much of the change it
was.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compose.errors import IncompatibleBase, InvalidRequest, NonFinite
from compose.factors import Factors
from compose.families import families, table
from compose.methods.elementwise import factored

RANK, ENERGY, FLOOR = 64, 0.99, 1e-6
RANK_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class Extracted:
    """The layers; the relative error of what they hold; and what no LoRA can hold: tensors that changed, and
    their share of the squared change of the whole checkpoint.
    """

    layers: dict[str, Factors]
    error: float
    left_behind: tuple[str, ...]
    left_share: float


def extract(
    tuned: Path,
    base: Path,
    family: str,
    *,
    rank: int = RANK,
    energy: float = ENERGY,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extracted:
    """The LoRA by which `tuned` differs from `base`, at most `rank` and at least the share `energy` of every
    layer.

    Layers that changed by less than a millionth of their norm (rounding) are left out. Raises
    IncompatibleBase, InvalidRequest.
    """
    if not 1 <= rank <= RANK_LIMIT:
        raise InvalidRequest(f"rank {rank} is not within 1 and {RANK_LIMIT}", field="rank")
    if not 0 < energy <= 1:
        raise InvalidRequest(f"energy {energy} is not within (0, 1]", field="energy")
    if family not in families():
        raise InvalidRequest(f"unknown family {family!r}; known: {', '.join(families())}", field="family")
    layers: dict[str, Factors] = {}
    lost = total = left = 0.0
    behind = []
    with ExitStack() as opened:
        ours, theirs = _Checkpoint(tuned, opened), _Checkpoint(base, opened)
        known = {key: name for name in table(family) if (key := ours.key(name))}
        if not known:
            raise IncompatibleBase(f"{tuned} has no layer of {family}", field="tuned")
        names = ours.names()
        for done, key in enumerate(names):
            progress(done, len(names))
            after, before = ours.read(key), theirs.read(key)
            if after is None or before is None or before.shape != after.shape:
                raise IncompatibleBase(
                    f"{base} has no {key!r} of that shape: it is not its base", field="base"
                )
            change = after.float() - before.float()
            square = float(change.double().square().sum())
            if not math.isfinite(square):
                raise NonFinite(f"{key!r} holds NaN or infinity in one of the checkpoints")
            if square <= FLOOR**2 * float(before.double().square().sum()):
                continue
            if name := known.get(key):
                layers[name], error = _factored(change.flatten(1), rank, energy)
                lost, total = lost + error, total + square
            else:
                behind.append(key)
                left += square
        progress(len(names), len(names))
    if not layers:
        raise InvalidRequest(
            f"{tuned} does not differ from {base}: there is nothing to extract", field="tuned"
        )
    return Extracted(layers, (lost / total) ** 0.5, tuple(behind), left / (left + total) if left else 0.0)


def _factored(change: Tensor, rank: int, energy: float) -> tuple[Factors, float]:
    """The smallest rank up to `rank` that holds the share `energy`, and the squared error."""
    up, down, _ = factored(change, rank, seed=0)
    values = up.double().square().sum(0)  # the singular values: each side carries their roots
    total = float(change.double().square().sum())
    held = values.square().cumsum(0)
    enough = int((held < energy * total * (1 - 1e-12)).sum()) + 1
    kept = min(enough, up.shape[1])
    error = max(0.0, total - float(held[kept - 1]))
    return Factors(up[:, :kept].contiguous(), down[:kept].contiguous()), error


class _Checkpoint:
    """The tensors of a diffusers directory's trained components, by `<component>.<name in its file>`."""

    def __init__(self, directory: Path, opened: ExitStack) -> None:
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
        return list(self._files)

    def key(self, layer: str) -> str:
        """Where a layer's weight is, with `text_model` in the path or without; "" for nowhere."""
        component, path = layer.split(".", 1)
        spelled = (f"{component}.{path}.weight", f"{component}.{path.removeprefix('text_model.')}.weight")
        return next((key for key in spelled if key in self._files), "")

    def read(self, key: str) -> Tensor | None:
        component, name = key.split(".", 1)
        for spelled in (name, name.removeprefix("text_model."), f"text_model.{name}"):
            if found := self._files.get(f"{component}.{spelled}"):
                reader, own = found
                tensor: Tensor = reader.get_tensor(own)  # type: ignore[no-untyped-call]
                return tensor
        return None


def _weights(component: Path) -> Iterator[Path]:
    """A component's weight files: the shards that its index names, or one; of several the plainest name."""
    if index := next(iter(sorted(component.glob("*.safetensors.index.json"))), None):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IncompatibleBase(f"{index} cannot be read: {error}", field="tuned") from None
        yield from (component / Path(str(name)).name for name in sorted(named))
        return
    found = sorted(component.glob("*.safetensors"), key=lambda path: (path.name.count("."), path.name))
    yield from found[:1]
