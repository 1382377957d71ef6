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
        return _sketch("sdxl-embedding", "clip_l", shapes["clip_l"], leftovers=("clip_g",))
    if len(shapes) != 1:
        return None
    ((key, shape),) = shapes.items()
    if len(shape) not in {1, 2} or key.endswith((".weight", ".bias")) or 0 in shape:
        return None
    if key == "emb_params":
        return _sketch("emb_params", key, shape)
    return _sketch("learned_embeds", key, shape, token=key)


def _sketch(
    layout: str, key: str, shape: tuple[int, ...], *, token: str = "", leftovers: tuple[str, ...] = ()
) -> Sketch:
    n, width = shape if len(shape) == 2 else (1, shape[0])
    if n > VECTOR_LIMIT:
        raise UnsupportedLayout(f"{n} vectors for one word, the limit is {VECTOR_LIMIT}; train with fewer")
    hints = {"layout": "sdxl"} if leftovers else {}
    return Sketch(layout, (), leftovers, vectors=key, vectors_shape=(n, width), token=token, hints=hints)
