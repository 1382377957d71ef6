"""Bundles: versions with everything that is known of them in one file, to carry to another catalog.

A plain tar, nothing compressed (weights do not compress, and what is not compressed cannot explode):

    atelier-bundle.json     {"format": 1, "versions": [{"name", "number", "kind", "digest", "size_bytes",
                             "card", "aliases", "previews", "base", "triggers", "adapter_config",
                             "file_name", "recipe", "stack", "origin"}…]}
    sha256/<64 hex digits>  weights, cards and pictures, each once, named by what it contains

Reading trusts nothing: regular files of these names only, so many at most, each hashed before any is used
(and none larger than the bundle itself); then the ordinary check-in. Recipes of another catalog become the
version's origin.
"""

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import grpc

from atelier.client import AtelierError, Client
from atelier.messages import CHUNK, Progress, StackWeight
from atelier.v1 import catalog_pb2

INDEX, INDEX_LIMIT = "atelier-bundle.json", 16 << 20
VERSIONS_LIMIT, FILES_LIMIT = 10_000, 100_000
_FILE = re.compile(r"sha256/([0-9a-f]{64})")
_FIELDS: dict[str, type] = {
    "name": str, "number": int, "kind": str, "digest": str, "card": str, "aliases": list, "previews": list,
    "base": str, "triggers": list, "adapter_config": str, "file_name": str,
}  # fmt: skip


class BundleError(Exception):
    """A bundle that cannot be read; the message says what is wrong and where."""


def export(client: Client, refs: Sequence[str], out: BinaryIO, progress: Progress | None = None) -> list[str]:
    """Writes the versions (of a bare name, all) that `refs` name into a bundle; `hero:3` of each.

    The members of a saved stack come with it. Raises AtelierError, OSError.
    """
    versions = _chosen(client, refs)
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=out, mode="w|") as tar:
        small: dict[str, bytes] = {}
        for version in versions:
            ref = f"{version.name}:{version.number}"
            answer = client.get(ref)
            pictures = [client.preview(ref, preview.digest) for preview in answer.previews]
            small |= {hashlib.sha256(data).hexdigest(): data for data in (answer.card, *pictures) if data}
            entries.append(_entry(answer))
        text = json.dumps({"format": 1, "versions": entries}, indent=1, ensure_ascii=False).encode()
        _add(tar, INDEX, io.BytesIO(text), len(text))
        for digest, data in small.items():
            _add(tar, f"sha256/{digest}", io.BytesIO(data), len(data))
        written = set(small)
        total, done = sum({v.digest: v.size_bytes for v in versions}.values()), 0
        for version in versions:
            if (digest := version.digest.removeprefix("sha256:")) in written:
                continue
            written.add(digest)
            path = Path(folder) / digest
            client.download(f"{version.name}:{version.number}", path)
            with path.open("rb") as file:
                _add(tar, f"sha256/{digest}", file, version.size_bytes)
            path.unlink()
            done += version.size_bytes
            if progress:
                progress(done, total)
    return [f"{version.name}:{version.number}" for version in versions]


def _chosen(client: Client, refs: Sequence[str]) -> list[catalog_pb2.Version]:
    """The versions with the members of their stacks, members first, oldest first, each once."""
    found: dict[tuple[str, int], catalog_pb2.Version] = {}
    for ref in refs:
        whole = not set(ref) & set(":@")
        for version in reversed(client.history(ref)) if whole else [client.get(ref).version]:
            if version.HasField("delete_time"):
                continue
            for member in json.loads(version.stack_json or "{}").get("members", ()):
                needed = _member(client, member)
                found.setdefault((needed.name, needed.number), needed)
            found.setdefault((version.name, version.number), version)
    return sorted(found.values(), key=lambda v: (v.kind == catalog_pb2.KIND_STACK, v.name, v.number))


def _member(client: Client, member: dict[str, Any]) -> catalog_pb2.Version:
    """A stack's member, or a twin of its content when that was deleted."""
    try:
        return client.get(member["ref"]).version
    except AtelierError as error:
        if error.code is not grpc.StatusCode.NOT_FOUND:
            raise
        return client.get(member["digest"]).version


def _entry(answer: catalog_pb2.GetVersionResponse) -> dict[str, Any]:
    version, said = answer.version, answer.declared
    return {
        "name": version.name,
        "number": version.number,
        "kind": catalog_pb2.Kind.Name(version.kind).removeprefix("KIND_").lower(),
        "digest": version.digest,
        "size_bytes": version.size_bytes,
        "card": f"sha256:{hashlib.sha256(answer.card).hexdigest()}" if answer.card else "",
        "aliases": list(version.aliases),
        "previews": [{"digest": preview.digest, "caption": preview.caption} for preview in answer.previews],
        "base": said.base,
        "triggers": list(said.triggers) or _words(version),
        "adapter_config": said.adapter_config.decode(errors="replace"),
        "file_name": said.file_name,
        **{
            key: json.loads(text)
            for key in ("recipe", "stack", "origin")
            if (text := getattr(version, f"{key}_json"))
        },
        **({"licence": version.about.licence.value} if version.recipe_json else {}),
    }


def _words(version: catalog_pb2.Version) -> list[str]:
    """The words of a merge, which come from its recipe; those of other versions come from their card or
    file.
    """
    told = version.triggers if version.recipe_json else ()
    return [f"{t.group}={t.word}" if t.group else t.word for t in told]


def _add(tar: tarfile.TarFile, name: str, data: io.BufferedIOBase | BinaryIO, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    tar.addfile(info, data)


def bring_in(client: Client, path: Path, progress: Progress | None = None) -> Iterator[tuple[str, str, bool]]:
    """Checks everything in a bundle in, in its order: (`hero:3` there, `hero:5` here, whether it is new).

    Aliases are set where the asset has none of that name. Raises BundleError before anything is checked in
    when the archive is not what it should be, AtelierError, OSError.
    """
    with (
        tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder,
        unpacked(path, Path(folder)) as entries,
    ):
        brought: dict[tuple[str, str], str] = {}
        for place, entry in enumerate(entries):
            if progress:
                progress(place, len(entries))
            there = f"{entry['name']}:{entry['number']}"
            if entry["kind"] == "stack":
                version, created = _bring_stack(client, entry, brought)
            else:
                version, created = _bring_file(client, entry, Path(folder), path.name)
            here = brought[there, entry["digest"]] = f"{version.name}:{version.number}"
            for preview in entry["previews"]:
                image = _at(Path(folder), str(preview["digest"])).read_bytes()
                client.add_preview(here, image, caption=str(preview.get("caption", "")))
            for alias in entry["aliases"]:
                _alias(client, version, str(alias))
            yield there, here, created


def _bring_file(
    client: Client, entry: dict[str, Any], folder: Path, bundle: str
) -> tuple[catalog_pb2.Version, bool]:
    answer = client.check_in(
        _at(folder, entry["digest"]),
        name=entry["name"],
        base=entry["base"],
        card=_at(folder, entry["card"]).read_bytes() if entry["card"] else b"",
        triggers=[str(word) for word in entry["triggers"]],
        adapter_config=entry["adapter_config"].encode(),
        file_name=entry["file_name"],
        origin=_origin(entry, bundle),
    )
    return answer.version, answer.created


def _origin(entry: dict[str, Any], bundle: str) -> dict[str, Any]:
    """Where a version comes from: this bundle, the merge that it is there or was before, and what it was
    brought there from first.
    """
    earlier = entry["origin"] if isinstance(entry.get("origin"), dict) else {}
    merge = {key: told[key] for told in (earlier, entry) for key in ("recipe", "licence") if key in told}
    first = earlier["origin"] if isinstance(earlier.get("origin"), dict) else earlier
    first = {key: value for key, value in first.items() if key not in merge}
    ref = f"{entry['name']}:{entry['number']}"
    return {"bundle": bundle, "ref": ref, **merge, **({"origin": first} if first else {})}


def _bring_stack(
    client: Client, entry: dict[str, Any], brought: Mapping[tuple[str, str], str]
) -> tuple[catalog_pb2.Version, bool]:
    """`brought` are references here, by those there and their digests."""
    try:
        document = entry["stack"]
        members: list[tuple[str, StackWeight]] = [
            (
                brought.get((str(member["ref"]), str(member["digest"])), str(member["digest"])),
                (
                    float(member["weight"]),
                    {str(part): float(factor) for part, factor in member.get("parts", {}).items()},
                ),
            )
            for member in document["members"]
        ]
        settings = {
            key: document[key]
            for key in ("prompt", "negative_prompt", "steps", "guidance")
            if key in document
        }
        answer = client.save_stack(members, name=entry["name"], **settings)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BundleError(f"the stack {entry['name']}:{entry['number']} is damaged: {error!r}") from None
    return answer.version, answer.created


def _alias(client: Client, version: catalog_pb2.Version, alias: str) -> None:
    try:
        client.set_alias(version.name, alias, version.number, expected=0)
    except AtelierError as error:
        if error.code is not grpc.StatusCode.ABORTED:  # it names something here already: that stays
            raise


@contextmanager
def unpacked(path: Path, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The index of a bundle whose files lie in `folder`, every one of them hashed. Raises BundleError."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            entries = _index(tar)
            _extract(tar, folder)
    except (tarfile.TarError, EOFError, OverflowError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is no bundle (a plain tar that `atelier export` writes): {error}"
        ) from None
    for entry in entries:
        pictures = [str(preview.get("digest", "")) for preview in entry["previews"]]
        weights = [] if entry["kind"] == "stack" else [entry["digest"]]
        for digest in (*weights, *([entry["card"]] if entry["card"] else []), *pictures):
            if not _at(folder, digest).is_file():
                raise BundleError(f"{entry['name']}:{entry['number']} needs {digest}, which is not in {path}")
    yield entries


def _index(tar: tarfile.TarFile) -> list[dict[str, Any]]:
    first = tar.next()
    if first is None or first.name != INDEX or not first.isreg() or first.size > INDEX_LIMIT:
        raise BundleError(f"the first file is not {INDEX}, or larger than {INDEX_LIMIT} bytes")
    file = tar.extractfile(first)
    try:
        index = json.loads(file.read(INDEX_LIMIT)) if file else None
        json.dumps(index, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{INDEX} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") != 1:
        raise BundleError(f"{INDEX} is of a format that this version of Atelier does not read")
    entries = index.get("versions")
    if not isinstance(entries, list) or len(entries) > VERSIONS_LIMIT:
        raise BundleError(f"{INDEX} holds no list of at most {VERSIONS_LIMIT} versions")
    for entry in entries:
        wrong = [
            name
            for name, kind in _FIELDS.items()
            if not isinstance(entry, dict) or type(entry.get(name)) is not kind
        ]
        if wrong or not all(isinstance(preview, dict) for preview in entry["previews"]):
            raise BundleError(f"a version in {INDEX} has a wrong {(wrong or ['previews'])[0]!r}")
    return entries


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    files = 0
    while member := tar.next():
        files += 1
        found = _FILE.fullmatch(member.name)
        if not found or not member.isreg() or member.issparse():
            raise BundleError(f"{member.name[:80]!r} does not belong into a bundle")
        if files > FILES_LIMIT:
            raise BundleError(f"it holds more than {FILES_LIMIT} files")
        source, seen = tar.extractfile(member), hashlib.sha256()
        with (folder / found[1]).open("wb") as out:
            while data := source.read(CHUNK) if source else b"":
                out.write(data)
                seen.update(data)
        if seen.hexdigest() != found[1]:
            raise BundleError(f"{member.name} does not contain what its name says; get the bundle again")


def _at(folder: Path, digest: str) -> Path:
    """Where a file lies. Raises BundleError for what is no digest."""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise BundleError(f"{digest[:80]!r} is no digest")
    return folder / digest.removeprefix("sha256:")
