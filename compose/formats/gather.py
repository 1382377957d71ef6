"""A header's tensors -> the layers they make up.

    <module>.lora_down.weight   .lora_up.weight   .lora_mid.weight   .alpha     kohya, LoCon
    <module>.hada_w1_a …  .lokr_w2 …  .dora_scale                               LyCORIS
    <module>.lora_A.weight      .lora_B.weight    .lora_magnitude_vector        PEFT, diffusers
    <module>.lora_A.weight      .lora_B.weight    .magnitude                    ai-toolkit
    <module>_lora.down.weight   .lora.down.weight   .lora_linear_layer.down…    old diffusers
    <module>lora1.down.weight                                                   XLabs
    unet:0:down                                                                 lora_diffusion

What a tensor does (its role) and how its module is named are told apart here: any suffix may come with any
naming, and files that mix them exist. The naming is left to `compose.formats.naming`; what torch wraps a
model in while it is trained (`_orig_mod.`, `module.`) is no part of a name.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from compose.errors import UnsupportedLayout
from compose.formats.forms import FORMS, Misfit, form
from compose.formats.sketch import RANK_LIMIT, Entry, Shapes

_SIDES = {"down": "down", "up": "up", "A": "down", "B": "up", "mid": "mid"}
_ROLES = tuple(
    re.compile(rf"(?P<module>.+?){suffix}")
    for suffix in (
        r"\.lora_(?P<side>down|up|mid)\.weight",
        r"\.lora_(?P<side>A|B)(\.[\w-]+)?\.weight",
        r"(\.lora_linear_layer|\.lora|_lora)\.(?P<side>down|up)\.weight",
        r"(?<=_lora\d)\.(?P<side>down|up)\.weight",
        r"(?<=\d):(?P<side>down|up)",
        r"\.(?P<role>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12])|dora_scale|magnitude)",
        r"\.lora_(?P<role>magnitude)_vector(\.[\w-]+)?(\.weight)?",
        r"(\.lora_linear_layer|\.lora|_lora)?\.(?P<role>alpha)",
    )
)
_WRAPPED = re.compile(
    r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # dotted
    r"|(?<=_)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)_"  # flattened, as kohya does
)
_PLAIN = {"lora_A", "lora_B", "lora_up", "lora_down", "lora_mid", "lora_linear_layer", "lora_dropout"}
_PLAIN |= {"lora_monteclora_sampler"}  # of its training alone

_UNREAD = (
    (r"\.oft_(blocks|diag|R)|\.boft_", "an OFT"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.on_input$|\.ia3_l", "an IA3"),
    (r"^lora_controlnet$", "a Control-LoRA"),
    (r"\.(diff|diff_b|[wb]_norm)$", "a LyCORIS full difference (diff)"),
    (r"^lllite_", "a ControlNet-LLLite"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"_custom_diffusion\.weight$", "a Custom Diffusion"),
)
_WHOLE = re.compile(r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.")


def gather(shapes: Shapes) -> tuple[list[Entry], tuple[str, ...]]:
    """The layers whose tensors are all there, and the names of the tensors that are no layer's.

    Raises UnsupportedLayout for half a layer, tensors that do not fit, and a rank over the limit.
    """
    modules: dict[str, dict[str, str]] = {}
    leftovers = []
    for key in shapes:
        found = _role(key)
        if not found:
            leftovers.append(key)
            continue
        groups = found.groupdict()
        role = groups.get("role") or _SIDES[groups["side"]]
        tensors = modules.setdefault(unwrapped(found["module"]), {})
        if role in tensors:
            raise UnsupportedLayout(
                f"{tensors[role]!r} and {key!r} are of one layer: the file holds two adapters; "
                "save them apart"
            )
        tensors[role] = key
    alone = [tensors["alpha"] for tensors in modules.values() if tensors.keys() == {"alpha"}]
    layers = {name: tensors for name, tensors in modules.items() if tensors.keys() != {"alpha"}}
    for key in leftovers:
        if unwrapped(_varied(key)) in layers:
            raise UnsupportedLayout(
                f"{key!r} is a part of its layer's update that plain LoRA does not have; train a LoRA"
            )
    return [_entry(name, tensors, shapes) for name, tensors in layers.items()], (*leftovers, *alone)


def _varied(key: str) -> str:
    """The module of a tensor that variants of LoRA have: `lora_diag` (KaSA), `default_lora_latent_mapping`
    (LoRA-XS); "" for others.
    """
    parts = key.split(".")
    found = (i for i, part in enumerate(parts) if i and "lora_" in part and part not in _PLAIN)
    return ".".join(parts[: next(found, 0)])


def unwrapped(name: str) -> str:
    """A name without what torch.compile, DDP, FSDP and checkpointing wrap models in."""
    if "module" not in name and "_orig_mod" not in name:  # nearly all, and a search costs more
        return name
    return _WRAPPED.sub("", name)


def is_layers(key: str) -> bool:
    """Whether a tensor's name says that it is of a layer."""
    return _role(key) is not None


def _role(key: str) -> re.Match[str] | None:
    return next((match for role in _ROLES if (match := role.fullmatch(key))), None)


def _entry(module: str, tensors: Mapping[str, str], shapes: Shapes) -> Entry:
    try:
        name = form(tensors)
    except Misfit as error:
        raise UnsupportedLayout(f"{next(iter(tensors.values()))!r} {error}") from None
    try:
        size = FORMS[name].size({role: shapes[key] for role, key in tensors.items()})
    except Misfit as error:
        parts = sorted(tensors.keys() - {"alpha", "magnitude", "dora_scale"}, reverse=True)
        told = " and the ".join(f"{role} {list(shapes[tensors[role]])}" for role in parts)
        raise UnsupportedLayout(f"the {told} of {module!r} do not fit: {error}") from None
    if size.rank > RANK_LIMIT and name in {"lora", "tucker"}:  # products have at most the layer's full rank
        raise UnsupportedLayout(
            f"rank {size.rank} of {module!r} exceeds the limit of {RANK_LIMIT}; resize the adapter first"
        )
    if (alpha := tensors.get("alpha")) and shapes[alpha] not in {(), (1,)}:
        raise UnsupportedLayout(f"{alpha!r} must be one number, not {list(shapes[alpha])}")
    numbers = sum(math.prod(shapes[key]) for key in tensors.values())
    entry = Entry(module, name, tensors, size.d, size.k, size.rank, size.dim, numbers=numbers)
    for role in tensors.keys() & {"magnitude", "dora_scale"}:
        entry = replace(entry, magnitude=_magnitude_size(entry, role, shapes[tensors[role]]))
    return entry


def _magnitude_size(entry: Entry, role: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """A DoRA magnitude as `[d, 1]`, one number a row, or `[1, n]`, one a column or, where n divides k, one an
    input channel. Raises UnsupportedLayout.

    PEFT keeps rows (a convolution's as `[1, d, 1, 1]`), ai-toolkit too; LyCORIS rows, as `[d, 1]`, or with
    wd_on_out=False columns, as `[1, in]` or `[1, in, 1, 1]`; OneTrainer columns unless told otherwise: the
    shape decides.
    """
    long = [n for n in shape if n != 1]
    n = long[0] if long else 1
    if len(long) <= 1 and shape:
        if n == entry.d and (role == "magnitude" or shape[0] == n):
            return n, 1
        if role == "dora_scale" and shape[0] == 1 and len(shape) > 1 and entry.k % n == 0:
            return 1, n
    raise UnsupportedLayout(
        f"the DoRA magnitude {list(shape)} of {entry.spelling!r} fits neither its {entry.d} rows nor its "
        f"{entry.k} columns"
    )


def refuse_unread(keys: Iterable[str]) -> None:
    """Raises UnsupportedLayout, by name, for a file of a kind that is known and not read."""
    for key in keys:
        for pattern, name in _UNREAD:
            if re.search(pattern, key):
                raise UnsupportedLayout(
                    f"this is {name} file ({key[:120]!r}), which is no low-rank update of the base alone; "
                    "train or convert it to a LoRA"
                )
        if _WHOLE.match(key):
            raise UnsupportedLayout(
                f"this is a whole checkpoint ({key[:120]!r}); atelier extract makes a LoRA of it and its base"
            )
