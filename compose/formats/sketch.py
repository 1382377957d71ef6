"""What a file's header says of an adapter, before a tensor is read.

A `Sketch` names the tensors that make up each layer; `bind` finds the layers in a base's table; `load` reads
them. Invariant: every tensor of the file is in an entry, in `vectors`, or named in `leftovers`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compose.bases import Module, Table, families, table
from compose.errors import IncompatibleBase, UnsupportedLayout

RANK_LIMIT = 1024
ALPHA_LIMIT = 1e6
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer of a file. `spelling` is how the file names the module; the update is `scale * up @ down`.

    With `alpha`, the name of a scalar tensor, the scale is alpha / rank (kohya; 0 means: rank).
    """

    spelling: str
    up: str
    down: str
    d: int
    k: int
    rank: int
    alpha: str = ""
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Sketch:
    """An adapter as its header shows it: layers of a LoRA, or the word vectors of a textual inversion."""

    layout: str
    entries: tuple[Entry, ...] = ()
    leftovers: tuple[str, ...] = ()
    vectors: str = ""
    vectors_shape: tuple[int, int] = (0, 0)
    token: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_words(self) -> bool:
        """Whether this is a textual inversion."""
        return bool(self.vectors_shape[0])

    @property
    def rank(self) -> int:
        """Largest rank of the layers; the number of vectors of a textual inversion."""
        return self.vectors_shape[0] or max(entry.rank for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a sketch's layers are in a base: canonical name -> entry; `unbound` are the file's other layers
    and tensors.
    """

    family: str
    bound: Mapping[str, Entry]
    unbound: tuple[str, ...]

    @property
    def total(self) -> int:
        """Layers of the file, found or not."""
        return len(self.bound) + len(self.unbound)


def pair(
    shapes: Shapes, patterns: Sequence[tuple[str, str]], *, alphas: str = r"(?P<module>.+)\.alpha"
) -> tuple[list[Entry], tuple[str, ...]]:
    """Entries for the pairs of (down, up) patterns, each a regular expression with a group `module`; and what
    is left.

    Raises UnsupportedLayout for half a pair, or an up and a down that do not fit.
    """
    downs: dict[str, str] = {}
    ups: dict[str, str] = {}
    scalars: dict[str, str] = {}
    leftovers = []
    compiled = [(re.compile(down), re.compile(up)) for down, up in patterns]
    for key in shapes:
        if found := next((m for down, _ in compiled if (m := down.fullmatch(key))), None):
            _once(downs, found["module"], key)
        elif found := next((m for _, up in compiled if (m := up.fullmatch(key))), None):
            _once(ups, found["module"], key)
        elif found := re.fullmatch(alphas, key):
            scalars[found["module"]] = key
        else:
            leftovers.append(key)
    for module in downs.keys() ^ ups.keys():
        have, lack = (downs[module], "up") if module in downs else (ups[module], "down")
        raise UnsupportedLayout(f"{have!r} has no matching {lack}; the file is incomplete, export it again")
    entries = [
        _entry(module, shapes, down=downs[module], up=ups[module], alpha=scalars.pop(module, ""))
        for module in downs
    ]
    return entries, (*leftovers, *scalars.values())


def _once(seen: dict[str, str], module: str, key: str) -> None:
    if module in seen:
        raise UnsupportedLayout(
            f"{seen[module]!r} and {key!r} are of one layer: the file holds two adapters; save them apart"
        )
    seen[module] = key


def _entry(module: str, shapes: Shapes, *, down: str, up: str, alpha: str) -> Entry:
    a, b = shapes[down], shapes[up]
    if (
        len(a) not in {2, 4}
        or len(b) not in {2, 4}
        or b[2:] not in {(), (1, 1)}
        or b[1] != a[0]
        or 0 in (*a, *b)
    ):
        raise UnsupportedLayout(
            f"the up {list(b)} and the down {list(a)} of {module!r} do not fit: "
            "up is [out, rank], down is [rank, in]"
        )
    if a[0] > RANK_LIMIT:
        raise UnsupportedLayout(
            f"rank {a[0]} of {module!r} exceeds the limit of {RANK_LIMIT}; resize the adapter first"
        )
    if alpha and shapes[alpha] not in {(), (1,)}:
        raise UnsupportedLayout(f"{alpha!r} must be one number, not {list(shapes[alpha])}")
    k = a[1] * (a[2] * a[3] if len(a) == 4 else 1)
    return Entry(spelling=module, up=up, down=down, d=b[0], k=k, rank=a[0], alpha=alpha)


@functools.cache
def spellings(family: str) -> Mapping[str, str]:
    """Every way files name the layers of a family -> the canonical name.

    Canonical; without `text_model`; without `to_out`'s index; kohya's flattened; lora_diffusion's numbers.
    """
    names: dict[str, str] = {}
    layers = table(family)
    many = "text_encoder_2" in {name.split(".")[0] for name in layers}
    for name in layers:
        component, path = name.split(".", 1)
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if many else "lora_te_"}.get(
            component, "lora_te2_"
        )
        for spelled in {path, path.removeprefix("text_model."), path.removesuffix(".0")}:
            names.setdefault(f"{component}.{spelled}", name)
        names[prefix + path.replace(".", "_")] = name
    return names | _numbered(layers)


def _numbered(layers: Table) -> dict[str, str]:
    """lora_diffusion counts the Linear layers of the modules it targets, in the order of registration of its
    time.

    In a transformer block that order was attn1, ff, attn2, and in the UNet: down, up, mid. Checked against a
    published file (cloneofsimo/lora, example_loras): 144 UNet layers, nine a block.
    """
    attention = [f"attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [*attention, "ff.net.0.proj", *(p.replace("attn1", "attn2") for p in attention)]
    blocks = dict.fromkeys(name.split(".attn1.")[0] for name in layers if ".attn1." in name)
    unet = [f"{prefix}.{part}" for prefix in blocks for part in block]
    text = [n for n in layers if n.startswith("text_encoder.") and ".self_attn." in n]
    return {f"unet:{i}": n for i, n in enumerate(unet)} | {f"text_encoder:{i}": n for i, n in enumerate(text)}


def bind(sketch: Sketch, family: str) -> Binding:
    """Finds the sketch's layers in a family's table, by name and by shape. Raises InvalidRequest."""
    layers = table(family)
    if sketch.is_words:
        fits = sketch.vectors_shape[1] == families()[family].word_width
        return Binding(
            family, {sketch.vectors: _word_entry(sketch)} if fits else {}, () if fits else (sketch.vectors,)
        )
    names = spellings(family)
    bound: dict[str, Entry] = {}
    unbound = list(sketch.leftovers)
    for entry in sketch.entries:
        name = names.get(entry.spelling, "")
        if name and name not in bound and _fits(entry, layers[name]):
            bound[name] = entry
        else:
            unbound.append(entry.spelling)
    return Binding(family, bound, tuple(unbound))


def _fits(entry: Entry, module: Module) -> bool:
    return (entry.d, entry.k) == (module.d, module.k)


def _word_entry(sketch: Sketch) -> Entry:
    n, width = sketch.vectors_shape
    return Entry(sketch.vectors, sketch.vectors, sketch.vectors, n, width, n)


_NAMES_TELL = (
    ("double_blocks", "flux"),
    ("single_transformer_blocks", "flux"),
    ("joint_blocks", "sd3"),
    ("lora_te2_", "sdxl"),
    ("text_encoder_2.", "sdxl"),
    ("input_blocks_7", "sdxl"),
    ("input_blocks_8", "sdxl"),
)
_METADATA_TELLS = (
    ("stable-diffusion-xl", "sdxl"),
    ("stable-diffusion-v2", "sd2"),
    ("stable-diffusion-v1", "sd1"),
    ("sdxl", "sdxl"),
    ("sd_v2", "sd2"),
    ("sd_v1", "sd1"),
    ("flux", "flux"),
    ("sd3", "sd3"),
)


def infer(sketch: Sketch) -> Binding:
    """The family a file was made for, by what fits; names and metadata decide only between equals.

    The family is "" when nothing tells: headers lie, so metadata never overrules shapes
    (ComfyUI-Realtime-Lora #28).
    """
    bindings = [bind(sketch, family) for family in families()]
    best = max(len(b.bound) for b in bindings)
    hinted = _hint(sketch)
    if best * 2 >= bindings[0].total and best:
        candidates = [b for b in bindings if len(b.bound) == best]
        if len(candidates) == 1:
            return candidates[0]
        if chosen := [b for b in candidates if b.family == hinted]:
            return chosen[0]
        return Binding(
            "", candidates[0].bound, candidates[0].unbound
        )  # self-attention alone fits sd1 and sd2 alike
    named = (*(entry.spelling for entry in sketch.entries), *sketch.leftovers)
    return Binding(hinted, {}, named or (sketch.vectors,))


def _hint(sketch: Sketch) -> str:
    for part, family in _NAMES_TELL:
        if any(part in entry.spelling for entry in sketch.entries):
            return family
    told = " ".join(sketch.hints.values()).lower()
    return next((family for part, family in _METADATA_TELLS if part in told), "")


def require(sketch: Sketch, family: str, *, what: str) -> Binding:
    """The binding to a family. Raises IncompatibleBase, naming what the file seems to be for, when it does
    not fit.

    Layers the base lacks are no reason to refuse as long as most are there; they stay named in `unbound`.
    """
    binding = bind(sketch, family)
    if len(binding.bound) * 2 >= binding.total:
        return binding
    if sketch.is_words:
        raise IncompatibleBase(
            f"{what} has word vectors of {sketch.vectors_shape[1]} numbers, "
            f"{family} takes {families()[family].word_width}",
            field="base",
        )
    found = infer(sketch).family
    seems = f"is for {found}" if found else f"fits no base we know (first layer: {binding.unbound[0]!r})"
    raise IncompatibleBase(
        f"{what} {seems}, not for {family}: {len(binding.bound)} of its {binding.total} layers fit {family}",
        field="base",
    )
