"""What a published file's header says when it shall not tell of the training: only keys that a loader needs,
or that say in plain words what the adapter is.

A list of what is allowed, not of what is forbidden: trainers invent keys, and write folders, names of
pictures, whole configurations into them. Even an allowed value goes when it looks like a path, a file's name
or a folder; of PEFT's configurations, in the header or beside the file, the entries that loading reads stay.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.headers import Header, read_header
from registry.hub.card import BASES

ADAPTER = "lora_adapter_metadata"
TEXT_LIMIT = 20_000
"""Characters of a text that is plain words still."""
SHOWN = 200
"""Keys that are named; a header may have a hundred thousand."""
CHUNK = 1 << 20
_WORD, _NUMBER, _HEX = r"[\w .,:+-]{1,120}", r"[\w.+-]{1,32}", r"(?:0x)?[0-9a-f]{8,64}"
_PLAIN = {
    re.compile(key): re.compile(value)
    for key, value in {
        "format": _WORD,
        "sshs_(?:model|legacy)_hash": _HEX,
        "ss_(?:network_dim|network_alpha|v2|clip_skip)": _NUMBER,
        "ss_network_module": r"[\w.]{1,120}",
        "ss_base_model_version": _WORD,
        "modelspec\\.architecture": r"[\w.-]{1,120}(?:/[\w-]{1,120})?",
        "modelspec\\.hash_sha256": _HEX,
        "modelspec\\.(?:sai_model_spec|prediction_type|timestep_range|encoder_layer|resolution|date)": _WORD,
        "unet|text_encoder": r'\[(?:"\w{1,120}"(?:, ?)?){0,64}\]',  # lora_diffusion's: classes it is in
        r"(?:unet|text_encoder):\d{1,6}:rank": r"\d{1,6}",
    }.items()
}
"""Keys whose value is no free text, and what it may be."""
_TEXTS = {"ss_network_args"} | {
    f"modelspec.{key}"
    for key in (
        *("title", "description", "author", "license", "tags", "trigger_phrase", "usage_hint"),
        "implementation",
    )
}
_LINK = re.compile(r"https://[\w.-]+(?![\w.@:-])[^\s@\"'<>?]*+(?!\?)")
"""A plain link: what follows a `?` may be anything."""
_SECRET = re.compile(
    r"\w@\w[\w-]*+\.\w"  # ann@example.org
    r"|\b(?:hf_|api_org_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA)[\w-]{16}"  # tokens of services
)
_FOLDER = (
    "home|users?|mnt|media|root|workspace|content|drive|desktop|documents|downloads|tmp|data|datasets?"
    "|train(?:ing)?|reg|img|imgs|images?|pictures?|photos?|models?|loras?|checkpoints?|outputs?|logs?"
)
_PATH = re.compile(
    rf"(?:^|[\s\"'=(\[{{,;:<|])(?:~\w*|\.{{1,2}})?/(?=[^\s/])"  # /home/ann, ~/x, ../x
    rf"|://|(?<![A-Za-z])[A-Za-z]:[\\/](?!/)|\\\\|[\w:.]\\[A-Za-z0-9]"  # C:\x, C:/x, \\host, a\b
    rf"|(?<![\w.-])[\w.-]++/[\w.-]++/|[\w.-]/(?=$|[\s\"',;)\]}}])"  # a/b/c, a/
    rf"|\b(?:{_FOLDER})/\S|%\w+%|\$\{{?[A-Z_]{{3,}}"  # data/x, %USERPROFILE%, $HOME
    rf"|\w\.(?:safetensors|ckpt|pth?|bin|npz|onnx|png|jpe?g|webp|json|toml|ya?ml|csv|zip"
    rf"|tiff?|hei[cf]|bmp|gif|avif|jxl|mp4|mov|webm|txt|pkl|gguf|log|tar|gz)\b",
    re.IGNORECASE,
)
_CONFIG = {
    "peft_type", "peft_version", "task_type", "inference_mode", "r", "alpha", "lora_alpha", "lora_dropout",
    "rank_dropout", "module_dropout", "rank_dropout_scale", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "layer_replication", "fan_in_fan_out", "bias", "lora_bias", "use_rslora", "use_dora", "use_qalora",
    "qalora_group_size", "trainable_token_indices", "init_lora_weights", "init_weights", "decompose_both",
    "decompose_factor", "use_effective_conv2d", "ensure_weight_tying",
}  # fmt: skip
"""Entries of PEFT's configurations that make the adapter what it is."""
_SCALAR = re.compile(r"\w{0,64}|\d[\w.+-]{0,63}")
"""A text of theirs that is no list's: a kind, a way of beginning, a release."""
_DRIVE = re.compile(r"(?<![A-Za-z?])[A-Za-z]:\\")
"""C:\\, which `(?:\\.` of an expression is not."""
_MODULES = {"target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"}
_COMPONENT = re.compile(r"(?:unet|text_encoder(?:_[23])?|transformer|controlnet)\.")


def kept(header: Header) -> tuple[dict[str, str], list[str]]:
    """What stays of a header's metadata, and the names of what goes, in order."""
    stays, gone = dict[str, str](), list[str]()
    for key, value in header.metadata.items():
        if key == ADAPTER:
            stays[key], inner = configuration(value)
            if not stays[key]:
                del stays[key]
            gone += [f"{ADAPTER}: {name}" for name in inner] or ([] if key in stays else [ADAPTER])
        elif _harmless(key, value, header):
            stays[key] = value
        else:
            gone.append(key)
    return stays, sorted(gone)


def configuration(text: str) -> tuple[str, list[str]]:
    """What stays of PEFT's configuration, of one model or of several with a prefix each, and the names of
    what goes; "" for one that is no JSON object.
    """
    twice = list[str]()

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # a reader takes the last; the others would go along unseen
            counted = Counter(name for name, _ in pairs)
            twice.extend(f"{name} (but the last)" for name, times in counted.items() if times > 1)
        return found

    try:
        told = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return "", []
    if not isinstance(told, dict):
        return "", []
    stays = {key: v for key, v in told.items() if _needed(_COMPONENT.sub("", key, count=1), v)}
    gone = [key for key in told if key not in stays] + twice
    return (json.dumps(stays, sort_keys=True) if gone else text), gone


def telling(path: Path) -> list[str]:
    """What `write` leaves out of a file's header. Raises InvalidFile."""
    return kept(read_header(path))[1]


def named(keys: list[str]) -> str:
    """The keys as they are told of, at most `SHOWN`."""
    plain = ["".join(c if c.isprintable() else "?" for c in key)[:120] for key in keys[:SHOWN]]
    return ", ".join(plain) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def write(path: Path, target: Path) -> None:
    """Writes a safetensors file with nothing but `kept` in its header; the tensors stay as they are, byte for
    byte. Raises InvalidFile, OSError.
    """
    checked = read_header(path)
    metadata, _ = kept(checked)
    with path.open("rb") as source, target.open("wb") as out:
        header = json.loads(source.read(checked.data_offset)[8:])
        header.pop("__metadata__", None)
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)
        while data := source.read(CHUNK):
            out.write(data)


def _harmless(key: str, value: str, header: Header) -> bool:
    if key in header.tensors:
        return value == "<embed>"  # a word that lora_diffusion trained along
    if key in _TEXTS:
        return not _path_in(value)
    fits = any(name.fullmatch(key) and told.fullmatch(value) for name, told in _PLAIN.items())
    return fits and not _SECRET.search(value)


def _path_in(text: str) -> bool:
    return len(text) > TEXT_LIMIT or bool(_SECRET.search(text) or _PATH.search(_LINK.sub("", text)))


def _needed(key: str, value: object) -> bool:
    if not re.fullmatch(r"\w{1,64}", key):
        return False
    if value in (None, False, "", [], {}):  # as good as not said
        return True
    if key == "base_model_name_or_path":
        return value is None or value in BASES.values()
    if key in {"auto_mapping", "megatron_core"}:  # Python's names
        return all(re.fullmatch(r"[\w.]*", text) for text in _strings(value))
    if key in _MODULES:  # expressions have backslashes, modules' names no slash
        return not any(
            "/" in text or "~" in text or _DRIVE.search(text) or _SECRET.search(text)
            for text in _strings(value)
        )
    if isinstance(value, str) and not _SCALAR.fullmatch(value):
        return False
    return key in _CONFIG and not any(_path_in(text) for text in _strings(value))


def _strings(value: object) -> list[str]:
    """Every text of a JSON value, keys included."""
    found, waiting = list[str](), list[Any]([value])
    while waiting:
        match waiting.pop():
            case str() as text:
                found.append(text)
            case Mapping() as inner:
                waiting += [*inner.keys(), *inner.values()]
            case list() as inner:
                waiting += inner
    return found
