"""What a push makes of a repository: which files, with which bytes, and what is to be told. Working that out
refuses whatever a push would refuse, and changes nothing.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry.errors import Conflict
from registry.hub import alphas, files, stripping
from registry.hub import card as cards
from registry.hub.client import Entry, Source, oid
from registry.hub.exchange import Exchange
from registry.hub.state import Link
from registry.hub.tags import tag_of
from registry.previews import PREVIEWS_LIMIT
from registry.records import Version


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture that becomes a preview as it is published: as it is kept, and its caption."""

    png: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Planned:
    """A file of the repository after the push; `fresh` when it is not there yet as it is."""

    path: str
    size: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push makes of a repository. `card` is the one published, which becomes the version's."""

    version: Version
    repo: str
    tag: str
    card: bytes
    files: tuple[Planned, ...]
    delete: tuple[str, ...]
    notes: tuple[str, ...]
    pictures: Mapping[str, str]
    sources: Mapping[str, Source]

    @property
    def add(self) -> dict[str, Source]:
        """What has to be sent."""
        return {planned.path: self.sources[planned.path] for planned in self.files if planned.fresh}

    @property
    def total(self) -> int:
        """The bytes of that."""
        return sum(planned.size for planned in self.files if planned.fresh)


@contextmanager
def planned(
    exchange: Exchange,
    version: Version,
    link: Link,
    tree: Mapping[str, Entry],
    *,
    delete: bool = False,
    shot: Shot | None = None,
) -> Iterator[Plan]:
    """What a push would make of a repository that has `tree`, with one more preview if there is a `shot`.
    With `delete` pictures that were taken away here go there, too. Raises RegistryError.
    """
    catalog, notes = exchange.catalog, list[str]()
    previews = {p.digest: p.caption for p in catalog.previews(version)}
    added = f"sha256:{hashlib.sha256(shot.png).hexdigest()}" if shot else ""
    if shot:
        if added not in previews and len(previews) >= PREVIEWS_LIMIT:
            raise Conflict(
                f"{version.ref} has {PREVIEWS_LIMIT} previews already; take one away first", field="ref"
            )
        previews[added] = shot.caption
    previews = {digest: told for digest, told in previews.items() if link.pictures.get(digest) != ""}
    pictures = dict(link.pictures) | {d: link.pictures.get(d) or _path(d) for d in previews}
    # Of the version that is there, what its card does not show was left out of it by somebody.
    fresh = [d for d in previews if version.number != link.here.number or pictures[d] not in tree]
    shown = [cards.Shown(pictures[d], previews[d]) for d in fresh]
    parents = {parent["digest"]: "" for parent in (version.recipe or {}).get("parents", ())}
    text = cards.published(
        catalog.card(version),
        version,
        repo=link.repo,
        weights=link.file,
        pictures=shown,
        parents=exchange.links.repos(parents),
    )
    sources: dict[str, Source] = {files.CARD: text}
    # What came from there is another file than the picture it became here; it stays as it is.
    left = [path for d in previews if (path := link.pictures.get(d)) and path in tree]
    for digest in previews:
        if pictures[digest] in left:
            continue
        own = shot is not None and digest == added
        sources[pictures[digest]] = shot.png if shot and own else catalog.blobs.verified(digest)
    away = gone(exchange, version, link) if delete else []
    taken = tuple(path for digest in away if (path := pictures.pop(digest)) in tree)
    beside, config = files.beside(link.file), _config(version, link)
    if config.text:
        sources[beside] = config.text.encode()
    elif beside in tree:  # it belongs to weights that are replaced now
        taken = (*taken, beside)
        notes.append(f"{beside} there goes: it belongs to the weights before these")
    with tempfile.TemporaryDirectory(dir=catalog.blobs.incoming) as folder:
        sources[link.file], telling = _weights(exchange, version, link, Path(folder))
        notes += _stripped(link, telling, config.telling)
        if (layout := version.facts.get("layout", "")) in files.FOREIGN:
            notes.append(
                f"its layout is {layout}, which diffusers does not load by itself; `atelier save-as` makes "
                "another file of it"
            )
        elif version.kind == "lora" and alphas.mixed(catalog.blobs.path(version.digest)):
            notes.append(
                "its layers have different alphas, which diffusers mixes up; `atelier save-as` makes a file "
                "of it that loads right there"
            )
        if not version.facts.get("about", {}).get("licence"):
            notes.append("nobody says its licence; `license: …` in the card does")
        yield Plan(
            version,
            link.repo,
            tag_of(version.number),
            text,
            (
                *(_planned(path, source, tree.get(path)) for path, source in sources.items()),
                *(Planned(path, tree[path].size, fresh=False) for path in left),
            ),
            taken,
            tuple(notes),
            pictures,
            sources,
        )


def gone(exchange: Exchange, version: Version, link: Link) -> list[str]:
    """Pictures that are there, and were taken away here: no version shows them any more."""
    live = (v for v in exchange.catalog.history(version.name) if not v.deleted_at)
    shown = {preview.digest for v in live for preview in exchange.catalog.previews(v)}
    return [digest for digest, path in link.pictures.items() if path and digest not in shown]


@dataclass(frozen=True, slots=True)
class _Config:
    """PEFT's configuration as it is published, "" for none, and the names of what tells of the training."""

    text: str
    telling: list[str]


def _config(version: Version, link: Link) -> _Config:
    whole = str(version.facts.get("declared", {}).get("adapter_config", ""))
    if not whole:
        return _Config("", [])
    stays, telling = stripping.configuration(whole)
    if link.strip and not stays:  # it is no JSON object, so nobody can say what it tells
        return _Config("", ["all of it"])
    return _Config(stays if link.strip and telling else whole, telling)


def _weights(exchange: Exchange, version: Version, link: Link, folder: Path) -> tuple[Path, list[str]]:
    """The file that is published, and the keys of its header that tell of the training."""
    path = exchange.catalog.blobs.verified(version.digest)
    telling = stripping.telling(path)
    if not telling or not link.strip:
        return path, telling
    stripping.write(path, folder / link.file.split("/")[-1])
    return folder / link.file.split("/")[-1], telling


def _stripped(link: Link, header: list[str], config: list[str]) -> list[str]:
    """What to tell of what tells of the training."""
    notes = []
    for where, keys in (("the file's header", header), (files.CONFIG, config)):
        if keys and link.strip:
            notes.append(f"left out of {where}: {stripping.named(keys)}")
        elif keys:
            listed = stripping.named(keys[:6]) + (", …" if len(keys) > 6 else "")
            notes.append(f"{where} tells of its training ({listed}); --strip leaves that out")
    return notes


def _planned(path: str, source: Source, there: Entry | None) -> Planned:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    large = there is not None and there.oid.startswith("sha256:")
    same = there is not None and there.size == size and there.oid == oid(source, large=large)
    return Planned(path, size, fresh=not same)


def _path(digest: str) -> str:
    return f"images/{digest.removeprefix('sha256:')[:16]}.png"
