"""The files of an adapter's repository, and which of any repository's files are looked at.

    pytorch_lora_weights.safetensors | learned_embeds.safetensors    the version's exact bytes
    adapter_model.safetensors                                        those of PEFT's layout
    adapter_config.json                                              PEFT's, beside the weights it belongs to
    README.md                                                        its card
    images/<16 hex digits>.png                                       its previews

A repository may hold anything; what is not a file of these kinds in a plain place is never fetched, and no
path of it becomes one here.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from registry.errors import NotFound
from registry.hub.client import Entry
from registry.records import Version

WEIGHTS = {"lora": "pytorch_lora_weights.safetensors", "textual_inversion": "learned_embeds.safetensors"}
PEFT = "adapter_model.safetensors"
"""Where PEFT looks for weights, and nowhere else."""
FOREIGN = {"peft", "lora_diffusion", "lycoris"}
"""Layouts that `load_lora_weights` does not take."""
CARD, CONFIG = "README.md", "adapter_config.json"
WEIGHTS_LIMIT, PICTURE_LIMIT, CONFIG_LIMIT = 8 << 30, 20 << 20, 1 << 20
_PLAIN = re.compile(r"(?!\.)[^/\\\0-\x1f\x7f]{1,128}(?:/(?!\.)[^/\\\0-\x1f\x7f]{1,128}){0,3}")
_PICTURE = re.compile(r".+\.(?:png|jpe?g|webp)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Files:
    """What a tree holds of what is looked at."""

    weights: Mapping[str, Entry]
    card: Entry | None
    configs: Mapping[str, Entry]
    pictures: Mapping[str, Entry]

    def config(self, file: str) -> Entry | None:
        """PEFT's configuration beside a file."""
        return self.configs.get(beside(file))

    def content(self, file: str) -> dict[str, str]:
        """What the card and the weights in `file`, with what belongs to them, hold: oids by path."""
        found = filter(None, [self.weights.get(file), self.card, self.config(file)])
        return {entry.path: entry.oid for entry in found}

    def oids(self, file: str) -> dict[str, str]:
        """Those and the pictures'."""
        return self.content(file) | {entry.path: entry.oid for entry in self.pictures.values()}


def name(version: Version) -> str:
    """What a version's weights are called in a repository of its own."""
    return PEFT if version.facts.get("layout") == "peft" else WEIGHTS[version.kind]


def beside(file: str) -> str:
    """Where PEFT looks for the configuration of the weights in `file`."""
    return f"{file.rpartition('/')[0]}/{CONFIG}".removeprefix("/")


def sort(tree: Mapping[str, Entry]) -> Files:
    """The files that are looked at; of two whose names differ in case or in how letters are put together
    only, neither. The card is: a Hub shows the README.md of exactly that name.
    """
    names = Counter(map(_folded, tree))
    plain = {
        path: entry
        for path, entry in tree.items()
        if _PLAIN.fullmatch(path)
        and (names[_folded(path)] == 1 or path == CARD)
        and path.isprintable()
        and ".." not in path
    }
    return Files(
        weights={p: e for p, e in plain.items() if p.endswith(".safetensors") and e.size <= WEIGHTS_LIMIT},
        card=plain.get(CARD),
        configs={p: e for p, e in plain.items() if p.split("/")[-1] == CONFIG and e.size <= CONFIG_LIMIT},
        pictures={p: e for p, e in plain.items() if _PICTURE.fullmatch(p) and e.size <= PICTURE_LIMIT},
    )


def _folded(path: str) -> str:
    return unicodedata.normalize("NFKC", path).casefold()


def left_out(tree: Mapping[str, Entry], files: Files) -> str:
    """Why the weights of a tree are not among its files, if there are any; else ""."""
    for path, entry in tree.items():
        if path.endswith(".safetensors") and path not in files.weights:
            if entry.size > WEIGHTS_LIMIT:
                return f"{path[:120]!r} has {entry.size} bytes, the limit is {WEIGHTS_LIMIT}"
            return f"{path[:120]!r} is no plain path, or another is the same but for its case"
    return ""


def choose(files: Files, repo: str, wanted: str = "", why_none: str = "") -> Entry:
    """The file with the weights: the one wanted, else the one of a conventional name, else the only one.
    Raises NotFound, which lists what there is, or says why it has none.
    """
    if wanted in files.weights:
        return files.weights[wanted]
    usual = [files.weights[name] for name in WEIGHTS.values() if name in files.weights]
    if not wanted and len(usual or files.weights) == 1:
        return (usual or list(files.weights.values()))[0]
    if not files.weights and why_none:
        raise NotFound(f"{repo} has no weights that are taken: {why_none}", field="file")
    if not files.weights:
        raise NotFound(
            f"{repo} has no safetensors file that could be an adapter; pickles are not taken from a Hub: "
            "download it, then `atelier convert`",
            field="file",
        )
    listed = ", ".join(sorted(files.weights)[:12]) + (", …" if len(files.weights) > 12 else "")
    why = f"has no {wanted[:120]!r}" if wanted else "has several weight files"
    raise NotFound(f"{repo} {why}; choose one with --file: {listed}", field="file")
