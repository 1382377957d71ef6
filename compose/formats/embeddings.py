"""Textual inversions: `{"<word>": [n, width]}` (learned_embeds), `{"emb_params": [n, width]}` (A1111), and
SDXL's pair.

A vector `[width]` is one vector `[1, width]`. SDXL files hold `clip_l` `[n, 768]` and `clip_g` `[n, 1280]`:
known for what they are, kept in the catalog, and no base of ours takes them yet.
"""

from collections.abc import Mapping

from compose.errors import UnsupportedLayout
from compose.formats.sketch import Shapes, Sketch

VECTOR_LIMIT = 64
_SDXL = {"clip_l", "clip_g"}


def recognise(shapes: Shapes, metadata: Mapping[str, str], adapter_config: str) -> Sketch | None:
    """The sketch, or None when it is no textual inversion. Raises UnsupportedLayout for too many vectors."""
    del metadata, adapter_config
    if set(shapes) == _SDXL:
        (n, small), (m, large) = (_vectors(key, shapes[key]) for key in sorted(_SDXL, reverse=True))
        if n != m:
            raise UnsupportedLayout(f"clip_l has {n} vectors and clip_g {m}; both must be for one word")
        return Sketch("sdxl-embedding", vectors="clip_l", vectors_shape=(n, small + large))
    if len(shapes) != 1:
        return None
    ((key, shape),) = shapes.items()
    if key.endswith((".weight", ".bias")):
        return None
    token = "" if key == "emb_params" else key
    layout = "learned_embeds" if token else "emb_params"
    return Sketch(layout, vectors=key, vectors_shape=_vectors(key, shape), token=token)


def _vectors(key: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Number and width of a word's vectors. Raises UnsupportedLayout."""
    if len(shape) not in {1, 2} or 0 in shape:
        raise UnsupportedLayout(
            f"{key!r} of shape {list(shape)} is no word: vectors are [n, width] or [width]"
        )
    n, width = shape if len(shape) == 2 else (1, shape[0])
    if n > VECTOR_LIMIT:
        raise UnsupportedLayout(f"{n} vectors for one word, the limit is {VECTOR_LIMIT}; train with fewer")
    return n, width
