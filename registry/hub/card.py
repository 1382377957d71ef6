"""A version's card as the Hub shows it: what the artist wrote, and what is missing of what pages, pipelines
and web UIs look for.

`published` adds and never rewords: front matter keys that are not there, entries of `tags` and `widget`,
sections whose heading is not there. A card that has everything stays byte for byte, so that publishing twice
changes nothing; what comes out is the version's card from then on, here as there. The licence alone is set
whatever the card says, for a merge inherits it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from registry import cards
from registry.about import REVIEW
from registry.cards import front_matter
from registry.errors import InvalidFile
from registry.hub import files
from registry.records import Version

BASES = {
    "pocket": "atelier/pocket",
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "flux": "black-forest-labs/FLUX.1-dev",
}
"""By family, the base on the Hub that most adapters of it were trained on; a card that names one is right."""
_TAGS = {
    "sd1": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sd2": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sdxl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "sd3": ("sd3", "sd3-diffusers"),
    "sd35-medium": ("sd3", "sd3-diffusers"),
    "sd35-large": ("sd3", "sd3-diffusers"),
    "flux": ("flux", "flux-diffusers"),
}


_NOTHING: tuple[object, ...] = ("", "~", "null", [], {})
"""What a card says nothing with."""
_DTYPES = {
    "pocket": "float32",
    "sd3": "bfloat16",
    "sd35-medium": "bfloat16",
    "sd35-large": "bfloat16",
    "flux": "bfloat16",
}
LICENCES = {
    "apache-2.0", "mit", "openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0",
    "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0",
    "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl",
    "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr",
    "deepfloyd-if-license", "unknown", "other",
}  # fmt: skip
"""Identifiers that Hubs know; any other licence is `other`, with its name."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture in the repository."""

    path: str
    caption: str = ""


def published(
    card: bytes,
    version: Version,
    *,
    repo: str,
    weights: str,
    pictures: Sequence[Shown] = (),
    parents: Mapping[str, str] | None = None,
) -> bytes:
    """The card of a version for `repo`, whose weights lie in the file `weights`. `parents` are repositories
    by the digest that they hold. Raises InvalidFile: a card that cannot be read, or not by Hubs, or a merge
    whose licence nobody has settled.
    """
    front, text = front_matter(card), _text(card)
    said = {key: value for key, value in front.items() if value not in _NOTHING}
    changes = _front(said, version, pictures, parents or {})
    whole = _with_sections(_with(text, front, changes), version, repo, weights, pictures, parents or {})
    _check(whole)
    front_matter(whole.encode())  # with what was added it may be too long to be a card here
    return whole.encode()


def _check(text: str) -> None:
    """Raises InvalidFile for a card that Hubs do not read: their YAML has types, and some keys have rules."""
    _, block, _ = _parts(text)
    try:
        ModelCardData(**yaml.safe_load(block))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        told = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
        told = told.partition(". Pass `ignore")[0][:300]
        raise InvalidFile(
            f"no Hub reads the card's front matter: {told}; put the value in quotes, or correct it",
            field="card",
        ) from None


def gallery(card: bytes) -> dict[str, str]:
    """The captions of a card's widget, by the picture's path. {} for a card that cannot be read."""
    try:
        widget = front_matter(card).get("widget")
    except InvalidFile:
        return {}
    found = {}
    for item in widget if isinstance(widget, list) else ():
        output, text = (item.get("output"), item.get("text")) if isinstance(item, dict) else (None, None)
        url = output.get("url") if isinstance(output, dict) else None
        if isinstance(url, str):
            found[url.removeprefix("./")] = text.strip() if isinstance(text, str) else ""
    return found


def _text(card: bytes) -> str:
    """Without what makes the Hub see no front matter: a byte order mark, blank lines before it, blanks after
    its dashes.
    """
    text = card.decode("utf-8-sig")
    text = text.lstrip() if text.lstrip().startswith("---") else text
    start, block, rest = _parts(text)
    closing, *_ = [*rest.splitlines(keepends=True), ""]
    return f"{_bare(start)}{block}{_bare(closing)}{rest[len(closing) :]}" if start else text


def _bare(line: str) -> str:
    """A line without the blanks at its end, and with an end that every reader takes for one."""
    bare, ending = line.rstrip(), line[len(line.rstrip("\r\n")) :]
    return line if line in {bare, f"{bare}\n", f"{bare}\r\n"} else bare + (ending.strip("\r") or "\n")


def _parts(text: str) -> tuple[str, str, str]:
    """The line that opens the front matter, its lines, and what follows, the closing line included; the first
    two are "" for none. As `registry.cards` sees them.
    """
    lines = text.splitlines(keepends=True)
    closing = [line.rstrip() for line in lines[1:]]
    if not lines or lines[0].rstrip() != "---" or "---" not in closing:
        return "", "", text
    end = 1 + closing.index("---")
    return lines[0], "".join(lines[1:end]), "".join(lines[end:])


def _front(
    front: Mapping[str, Any], version: Version, pictures: Sequence[Shown], parents: Mapping[str, str]
) -> dict[str, Any]:
    """What the front matter lacks."""
    facts = version.facts
    wanted: dict[str, Any] = {"base_model": BASES.get(facts.get("family", ""), "")}
    sources = [parents.get(parent["digest"], "") for parent in (version.recipe or {}).get("parents", ())]
    merged = bool(sources) and all(sources)
    if merged:
        wanted["base_model"] = list(dict.fromkeys(sources))
    if "base_model" in front or wanted["base_model"]:
        wanted["base_model_relation"] = "merge" if merged and "base_model" not in front else "adapter"
    wanted["library_name"] = "diffusers"
    wanted["pipeline_tag"] = "text-to-image"
    wanted |= _calling(version)
    changes = {key: value for key, value in wanted.items() if value and key not in front}
    return changes | _licence(front, version) | _tags(front, version) | _widget(front, pictures)


def _calling(version: Version) -> dict[str, Any]:
    """The trigger words that the card does not say yet: the first calls it, groups are opt-in."""
    known = [t for t in version.facts.get("triggers", ()) if t["source"] != "asset name"]
    words = [t for t in known if t["source"] != "card"]
    first = next((t["word"] for t in known if not t.get("group")), "")
    groups: dict[str, list[str]] = {}
    for trigger in words:
        if version.kind != "lora" or trigger["word"] != first:
            groups.setdefault(trigger.get("group", ""), []).append(trigger["word"])
    told: Any = groups if set(groups) - {""} else groups.get("", [])
    return {"instance_prompt": first if version.kind == "lora" else "", "trigger_words": told}


def _licence(front: Mapping[str, Any], version: Version) -> dict[str, str]:
    known = str(version.facts.get("about", {}).get("licence", {}).get("value", ""))
    if version.facts.get("inherited_licence") or version.recipe:
        if known in {"", REVIEW}:
            raise InvalidFile(
                f"the licence of {version.ref} needs review, since it is a merge; settle it in its card "
                "(license: …, with `atelier card`), then publish it",
                field="card",
            )
        said = front.get("license_name") or front.get("license")
        return {} if said == known else _named(known)
    if known and not (front.get("license_name") or front.get("license")):
        return _named(known)
    return {}


def _named(licence: str) -> dict[str, str]:
    """A licence as Hubs want it: one that has no identifier there by its name."""
    if licence.lower() in LICENCES:
        return {"license": licence.lower()}
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-") or "own",
    }


def _tags(front: Mapping[str, Any], version: Version) -> dict[str, list[str]]:
    told = front.get("tags", [])
    have = [told] if isinstance(told, str) else [tag for tag in told if isinstance(tag, str)]
    have = [tag for tag in have if tag.strip()]
    kind = ("lora", "template:sd-lora") if version.kind == "lora" else ("textual_inversion",)
    wanted = ("text-to-image", "diffusers", *kind, *_TAGS.get(version.facts.get("family", ""), ()))
    missing = [tag for tag in wanted if tag not in have]
    return {"tags": [*have, *missing]} if missing else {}


def _widget(front: Mapping[str, Any], pictures: Sequence[Shown]) -> dict[str, list[Any]]:
    told = front.get("widget")
    items = [item for item in told if isinstance(item, dict)] if isinstance(told, list) else []
    outputs = [item["output"] for item in items if isinstance(item.get("output"), dict)]
    shown = {str(output.get("url", "")).removeprefix("./") for output in outputs}
    fresh = [picture for picture in pictures if picture.path not in shown]
    for picture in fresh:
        output = {"output": {"url": picture.path}}
        waits = (  # a prompt without a picture
            place
            for place, item in enumerate(items)
            if "output" not in item and picture.caption in {"", item.get("text")}
        )
        if (place := next(waits, None)) is None:
            items.append({"text": picture.caption or " ", **output})
        else:
            items[place] = {**items[place], **output}
    return {"widget": items} if fresh else {}


def _with(text: str, front: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The text with these keys set, everything else as it was."""
    if not changes:
        return text
    start, block, rest = _parts(text)
    end = "" if start else "---\n\n"
    edited = block
    for key, value in changes.items():
        edited = _put(edited, key, value)
    wanted = {**front, **changes}
    if _read(edited) != wanted:  # written in a way that lines cannot be put into
        edited = _dump(wanted)
    opening = start or "---\n"
    return f"{opening}{edited}{end}{rest}"


def _put(block: str, key: str, value: object) -> str:
    """The lines of a front matter with one key set: in its place, or at the end."""
    lines, fresh = block.splitlines(keepends=True), _dump({key: value})
    start = next((i for i, line in enumerate(lines) if re.match(rf"{re.escape(key)}[ \t]*:", line)), None)
    if start is None:
        ending = "" if not lines or lines[-1].endswith("\n") else "\n"
        return f"{block}{ending}{fresh}"
    end = start + 1
    while end < len(lines) and (lines[end][:1] in " \t-" or not lines[end].strip()):
        end += 1
    return "".join([*lines[:start], fresh, *lines[end:]])


def _read(block: str) -> object:
    try:
        return front_matter(f"---\n{block}---\n".encode())
    except InvalidFile:
        return None


def _dump(front: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1 << 20)


def _with_sections(
    text: str,
    version: Version,
    repo: str,
    weights: str,
    pictures: Sequence[Shown],
    parents: Mapping[str, str],
) -> str:
    """The text with the sections it lacks, in the order of diffusers' own trainers."""
    body = cards.body(text.encode())
    sections = _sections(version, repo, weights, parents)
    name = "LoRA" if version.kind == "lora" else "Textual inversion"
    start = "" if body.strip() else f"# {name} - {repo}\n"
    if pictures and version.kind == "lora" and "<gallery" not in body.lower():
        start += "\n<Gallery />\n"
    if version.kind != "lora":  # whose page has no gallery
        fresh = [picture for picture in pictures if picture.path not in body]
        start += "".join(f"\n![{_alternative(p.caption)}](./{p.path})\n" for p in fresh)
    missing = [
        f"## {heading}\n\n{content}"
        for heading, content in sections.items()
        if content and not re.search(rf"^#+ {re.escape(heading[:11])}", body, flags=re.M | re.I)
    ]
    added = "\n\n".join(part.strip("\n") for part in (start, *missing) if part.strip())
    if not added:
        return text
    apart = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
    return f"{text}{apart}{added}\n"


def _sections(version: Version, repo: str, weights: str, parents: Mapping[str, str]) -> dict[str, str]:
    facts, lora = version.facts, version.kind == "lora"
    words = [t["word"] for t in facts.get("triggers", ()) if not t.get("group")]
    base = BASES.get(facts.get("family", ""), "")
    called = " or ".join(f"`{word.replace('`', chr(39))}`" for word in words)
    folder, call = ("models/Lora", f"`<lora:{repo.split('/')[1]}:1>`") if lora else ("embeddings", "its word")
    return {
        "Model description": "\n\n".join(filter(None, [_described(version, base), _weight(version)])),
        "How it was merged": _recipe(version, parents),
        "Trigger words": f"You should use {called} to trigger the image generation." if called else "",
        "Download model": f"[Download](/{repo}/tree/main) `{weights}`. In a web UI, put it into `{folder}`, "
        f"named as you like to call it, and write {call} into the prompt.",
        "Use it with the 🧨 diffusers library": _code(version, repo, weights, base, words),
    }


def _code(version: Version, repo: str, weights: str, base: str, words: Sequence[str]) -> str:
    """How diffusers makes a picture with it."""
    layout, components = version.facts.get("layout", ""), version.facts.get("components") or ["unet"]
    folder, _, name = weights.rpartition("/")
    load, more = f'pipeline.load_lora_weights("{repo}", weight_name="{weights}")', list[str]()
    if version.kind != "lora":
        load = f'pipeline.load_textual_inversion("{repo}", weight_name="{weights}")'
    elif layout == "peft" and name == files.PEFT:
        part, more = f"pipeline.{components[0]}", ["from peft import PeftModel"]
        inside = f', subfolder="{folder}"' if folder else ""
        load = f'{part} = PeftModel.from_pretrained({part}, "{repo}"{inside})'
    elif layout in files.FOREIGN:
        return f"diffusers does not load its layout, {layout}, by itself; web UIs do."
    # Said, since otherwise text encoders come as they are stored and the denoiser in float32.
    dtype = _DTYPES.get(version.facts.get("family", ""), "float16")
    code = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        *more,
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.{dtype})'
        if base
        else "pipeline = ...  # its base",
        load,
        f"image = pipeline({_quoted(', '.join(words) or 'a picture')}).images[0]",
    ]
    return "\n".join(["```py", *code, "```"])


def _alternative(text: str) -> str:
    """A caption as the text of a Markdown picture."""
    return re.sub(r"([\\\[\]`*_<>!])", r"\\\1", text) or "picture"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _described(version: Version, base: str) -> str:
    fits = f" for {base}" if base else ""
    if version.kind == "lora":
        return f"These are LoRA weights{fits}, rank {version.facts.get('rank', 0)}."
    return f"These are learned word vectors{fits}."


def _weight(version: Version) -> str:
    told = version.facts.get("about", {}).get("weight")
    if not told or told["source"] == "card text":  # which says so itself
        return "" if told else "A weight of 1 is as trained."
    span = f" (useful between {told['low']:g} and {told['high']:g})" if told["low"] < told["high"] else ""
    return f"Recommended weight: {told['value']:g}{span}."


def _recipe(version: Version, parents: Mapping[str, str]) -> str:
    recipe = version.recipe
    if not recipe:
        return ""
    told = ", ".join(f"{name} {value}" for name, value in sorted(recipe.get("parameters", {}).items()))
    lines = [f"With the method `{recipe['method']}`{f' ({told})' if told else ''} of Atelier, from:", ""]
    for parent in recipe["parents"]:
        repo = parents.get(parent["digest"])
        where = f"[{repo}](/{repo})" if repo else f"`{parent['ref']}`"
        lines.append(f"- {where} at weight {parent['weight']:g}, `{parent['digest']}`")
    return "\n".join(lines)
