"""A sketch's layers in a base: by name, and by shape, which no header can talk its way around."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from compose.errors import IncompatibleBase, UnsupportedLayout
from compose.families import Module, Table, families, table
from compose.formats.naming import Part, spellings
from compose.formats.sketch import Binding, Entry, Sketch, SketchedWord


def bind(sketch: Sketch, family: str) -> Binding:
    """Finds the sketch's layers in a family's table. Raises InvalidRequest, and UnsupportedLayout where two
    layers of the file are one of the base.
    """
    return _sound(_bind(sketch, family))


def _sound(binding: Binding) -> Binding:
    for one, other in binding.clashes:
        raise UnsupportedLayout(
            f"{one!r} and {other!r} are the same layer of {binding.family}: the file holds two adapters; "
            "save them apart"
        )
    return binding


def _bind(sketch: Sketch, family: str) -> Binding:
    layers = table(family)
    if sketch.is_words:
        return _bind_words(sketch, family)
    names = spellings(family)
    bound: dict[str, Entry] = {}
    clashes: list[tuple[str, str]] = []
    lacking = 0
    unbound = list(sketch.leftovers)
    unbound += [v.key for word in sketch.words if not _takes(word, family) for v in word.vectors.values()]
    for entry in sketch.entries:
        found = (names[spelled] for spelled in _spelled(entry, family) if spelled in names)
        fitting = next((pieces for parts in found if (pieces := _pieces(entry, parts, layers))), {})
        clashes += [(bound[name].spelling, entry.spelling) for name in fitting if name in bound]
        bound |= fitting
        if not fitting:
            unbound.append(entry.spelling)
            lacking += 1
    return Binding(family, bound, tuple(unbound), tuple(clashes), lacking)


_WITHIN = re.compile(r"\.processor\.|\.base_model\.model\.")
"""What old diffusers and early SimpleTuner left in names; some trainers of FLUX.1 end them in `_`."""


def _spelled(entry: Entry, family: str) -> Iterator[str]:
    """What to look up: the name, or, as PEFT saves one model alone and does not say which, that of a text
    encoder, whose width then decides.
    """
    spelling = _WITHIN.sub(".", entry.spelling).rstrip("_")
    yield spelling
    if spelling.startswith(("text_model.", "encoder.", "text_projection")):
        for component in families()[family].components:
            if component.name.startswith("text_encoder"):
                yield f"{component.name}.{spelling}"


def _pieces(entry: Entry, parts: tuple[Part, ...], layers: Table) -> dict[str, Entry]:
    """The entry as its base layers' entries; {} when the shapes do not fit."""
    pieces = {}
    for part in parts:
        rows = part.rows or ((0, entry.d),)
        d = sum(end - start for start, end in rows)
        module = layers[part.name]
        if (d, entry.k) != (module.d, module.k) or not _norms_fit(entry, part, module):
            return {}
        pieces[part.name] = replace(entry, d=d, rows=part.rows) if part.rows else entry
    covered = sum(piece.d for piece in pieces.values())
    return pieces if covered == entry.d else {}


def _norms_fit(entry: Entry, part: Part, module: Module) -> bool:
    """Whether a DoRA's norms are of this layer alone: columns go through all of a fused projection."""
    if not entry.magnitude or entry.magnitude[0] == entry.d:
        return True
    return not part.rows and entry.magnitude[1] * math.prod(module.kernel) == module.k


def _bind_words(sketch: Sketch, family: str) -> Binding:
    bound, unbound, lacking = {}, list(sketch.leftovers), 0
    for word in sketch.words:
        keys = [vectors.key for vectors in word.vectors.values()]
        name = f"words.{word.token or keys[0]}"
        if _takes(word, family):
            n, width = word.n, sum(vectors.width for vectors in word.vectors.values())
            bound[name] = Entry(keys[0], "words", {key: key for key in keys}, n, width, n, n)
        else:
            unbound += keys
            lacking += 1
    return Binding(family, bound, tuple(dict.fromkeys(unbound)), lacking=lacking)


def words_for(sketch: Sketch, family: str) -> Sketch:
    """The sketch with those of its words that a family's text encoders take; `bind` names the others."""
    return replace(sketch, words=tuple(word for word in sketch.words if _takes(word, family)))


def _takes(word: SketchedWord, family: str) -> bool:
    """Whether the family's encoders take the word: all of CLIP's, T5's where it is there."""
    takes = families()[family].words
    widths = {kind: vectors.width for kind, vectors in word.vectors.items()}
    if len(takes) == 1:
        return (
            len(widths) == 1
            and widths.keys() <= {"", "clip_l", "clip_h"}
            and [*widths.values()] == [*takes.values()]
        )
    needed = {kind for kind in takes if kind != "t5"}
    return needed <= widths.keys() <= takes.keys() and all(takes[k] == widths[k] for k in widths)


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
    ("sd3.5-medium", "sd35-medium"),
    ("sd3.5_medium", "sd35-medium"),
    ("stable-diffusion-3.5-medium", "sd35-medium"),
    ("sd3.5-large", "sd35-large"),
    ("sd3.5_large", "sd35-large"),
    ("stable-diffusion-3.5-large", "sd35-large"),
    ("stable-diffusion-3", "sd3"),
    ("sd3", "sd3"),
)


def infer(sketch: Sketch) -> Binding:
    """The family a file was made for, by what fits; names and metadata decide only between equals.

    The family is "" when nothing fits, whatever is told: headers lie (ComfyUI-Realtime-Lora #28), and
    FLUX.2's layers have the names of FLUX.1's. Raises UnsupportedLayout where two layers of the file are one
    of the base.
    """
    bindings = [_bind(sketch, family) for family in families()]
    best = min(len(b.unbound) for b in bindings)
    candidates = [b for b in bindings if len(b.unbound) == best and b.fits]
    if len(candidates) == 1:
        return _sound(candidates[0])
    hinted = _hint(sketch)
    if chosen := [b for b in candidates if b.family == hinted]:
        return _sound(chosen[0])
    if chosen := [b for b in candidates if sketch.is_words and b.family == "sdxl"]:
        return chosen[0]  # words for both CLIPs, which fit SD3s, too, are written for SDXL
    if candidates:  # self-attention alone fits sd1 and sd2 alike, sd3 and sd35-medium share most
        return replace(_sound(candidates[0]), family="")
    vectors = (v.key for word in sketch.words for v in word.vectors.values())
    unbound = (*(entry.spelling for entry in sketch.entries), *sketch.leftovers, *vectors)
    return Binding("", {}, unbound, lacking=len(sketch.entries or sketch.words))


def _hint(sketch: Sketch) -> str:
    told = " ".join(sketch.hints.values()).lower()
    metadata = next((family for part, family in _METADATA_TELLS if part in told), "")
    for part, family in _NAMES_TELL:
        if any(part in entry.spelling for entry in sketch.entries):
            of_its_kind = family == "sd3" and metadata.startswith("sd3")  # all SD3s have these names
            return metadata if of_its_kind else family
    return metadata


def require(sketch: Sketch, family: str, *, what: str) -> Binding:
    """The binding to a family. Raises IncompatibleBase, naming what the file seems to be for, when it does
    not fit.

    Layers the base lacks are no reason to refuse as long as most are there; they stay named in `unbound`.
    """
    binding = bind(sketch, family)
    if binding.fits:
        return binding
    if sketch.is_words:
        raise IncompatibleBase(
            f"{what} has word vectors of {_told(sketch)} numbers, {family} takes "
            f"{' and '.join(map(str, families()[family].words.values())) or 'none'}",
            field="base",
        )
    found = infer(sketch).family
    first, whole = sketch.entries[0].spelling, len(binding.bound) + binding.lacking
    seems = f"is for {found}, not for {family}" if found else f"fits no base we know (first layer: {first!r})"
    raise IncompatibleBase(
        f"{what} {seems}: {len(binding.bound)} of its {whole} layers fit {family}",
        field="base",
    )


def _told(sketch: Sketch) -> str:
    return " and ".join(str(vectors.width) for vectors in sketch.words[0].vectors.values())
