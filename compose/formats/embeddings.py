"""Words: textual inversions, and the words a LoRA brings along.

    {"<word>": [n, width], …}                  learned_embeds; one word or several
    {"emb_params": [n, width]}                 A1111, also under `string_to_param.*`: a word without a name
    {"clip_l": …, "clip_g": …, "t5": …}        SDXL's and FLUX's: a word for several encoders
    {"text_encoders_0": [n, width], …_1}       pivotal tuning: n words <s0>, <s1>, …, a vector each
    bundle_emb.<word>.string_to_param.*        a LoRA's words (LyCORIS' pack_bundle); OneTrainer writes
    bundle_emb.<word>.clip_l, .clip_g, .t5     one tensor an encoder
    "<word>": [n, width], metadata "<embed>"   a LoRA's words (lora_diffusion)

A vector `[width]` is one vector `[1, width]`. OneTrainer's `clip_l_out` and its like are no word vectors but
change what the encoder puts out: they stay unread, and named. It calls every single encoder `clip_l`.
"""

import re
from collections.abc import Mapping

from compose.errors import UnsupportedLayout
from compose.formats.gather import is_layers
from compose.formats.sketch import Shapes, Sketch, SketchedWord, Vectors

VECTOR_LIMIT, WORD_LIMIT = 75, 64
"""A word may fill a whole prompt, and published ones do (`…_75t`)."""
_ENCODERS = ("clip_l", "clip_g", "clip_h", "t5", "t5xxl")
_UNNAMED = ("emb_params", "string_to_param.*", "*")
_BUNDLED = re.compile(r"bundle_emb\.(?P<token>.+?)\.(?P<kind>string_to_param\.\*|emb_params|clip_[lgh]|t5)")


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when it is no textual inversion. Raises UnsupportedLayout for too many vectors."""
    del metadata, adapter_config
    if (
        any(key.endswith((".weight", ".bias")) or is_layers(key) for key in shapes)
        or not 1 <= len(shapes) <= WORD_LIMIT
    ):
        return None
    if any("." in key for key in shapes) and len(shapes) > 1:
        return None
    found = tuple(SketchedWord(key, {"": _vectors(key, shape)}) for key, shape in shapes.items())
    if len({word.vectors[""].width for word in found}) > 1:
        return None
    return Sketch("learned_embeds", words=found)


def words_along(shapes: Shapes, metadata: Mapping[str, str]) -> tuple[tuple[SketchedWord, ...], Shapes]:
    """The words that a file says are such, and the other tensors. Raises UnsupportedLayout."""
    bundled: dict[str, dict[str, Vectors]] = {}
    named: dict[str, Vectors] = {}
    pivotal: dict[str, Vectors] = {}
    words, rest = [], {}
    for key, shape in shapes.items():
        if found := _BUNDLED.fullmatch(key):
            kind = found["kind"] if found["kind"] in _ENCODERS else ""
            bundled.setdefault(found["token"], {})[kind] = _vectors(key, shape)
        elif key in _ENCODERS:
            named[_kind(key)] = _vectors(key, shape)
        elif found := re.fullmatch(r"text_encoders_([01])", key):
            vectors = _vectors(key, shape)
            second = "t5" if vectors.width == 4096 else "clip_g"
            pivotal["clip_l" if found[1] == "0" else second] = vectors
        elif key in _UNNAMED:
            words.append(SketchedWord("", {"": _vectors(key, shape)}))
        elif metadata.get(key) == "<embed>":
            words.append(SketchedWord(key, {"": _vectors(key, shape)}))
        else:
            rest[key] = shape
    words += [_word(token, vectors) for token, vectors in bundled.items()]
    if named:
        words.append(_word("", named))
    if pivotal:
        whole = _word("", pivotal)
        words += [
            SketchedWord(f"<s{i}>", {kind: Vectors(v.key, 1, v.width, i) for kind, v in pivotal.items()})
            for i in range(whole.n)
        ]
    if len(words) > WORD_LIMIT:
        raise UnsupportedLayout(f"{len(words)} words in one file, the limit is {WORD_LIMIT}")
    return tuple(words), rest


def layout(shapes: Shapes) -> str:
    """How the words of a file without layers are laid out."""
    if any(key.startswith("bundle_emb.") for key in shapes):
        return "bundle"
    if any(key.startswith("text_encoders_") for key in shapes):
        return "pivotal"
    if any(key in _UNNAMED for key in shapes):
        return "emb_params"
    return "sdxl-embedding" if "clip_g" in shapes else "embedding"


def _kind(key: str) -> str:
    return "t5" if key == "t5xxl" else key


def _word(token: str, vectors: Mapping[str, Vectors]) -> SketchedWord:
    """Raises UnsupportedLayout unless every encoder has the same number of vectors."""
    told = " and ".join(f"{v.key} has {v.n} vectors" for v in vectors.values())
    if len({v.n for v in vectors.values()}) > 1:
        raise UnsupportedLayout(f"{told}; they must be for one word")
    return SketchedWord(token, {kind: vectors[kind] for kind in ("", *_ENCODERS) if kind in vectors})


def _vectors(key: str, shape: tuple[int, ...]) -> Vectors:
    """Raises UnsupportedLayout for a shape that is no word's."""
    if len(shape) not in {1, 2} or 0 in shape:
        raise UnsupportedLayout(
            f"{key!r} of shape {list(shape)} is no word: vectors are [n, width] or [width]"
        )
    n, width = shape if len(shape) == 2 else (1, shape[0])
    if n > VECTOR_LIMIT:
        raise UnsupportedLayout(f"{n} vectors for one word, the limit is {VECTOR_LIMIT}; train with fewer")
    return Vectors(key, n, width)
