"""The stand-in's routes: what huggingface_hub asks, in its own words."""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.hub.repos import Commit, File, Repo

if TYPE_CHECKING:
    from tests.hub.standin import Asked, StandIn

MOMENT = "2026-01-01T00:00:00.000Z"
ID = r"([^/]+/[^/]+)"


class Pace(Enum):
    """How an answer comes."""

    AT_ONCE = auto()
    HEADERS_DRIP = auto()
    """Its headers byte by byte."""
    BODY_DRIPS = auto()
    """Its body byte by byte."""
    ENDLESS = auto()
    """Its body again and again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: JSON, bytes, or a file."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    pace: Pace = Pace.AT_ONCE


class Refusal(Exception):
    """An answer that ends a route early."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


def found(hub: "StandIn", asked: "Asked", name: str, *, writing: bool = False) -> Repo:
    """The repository, if this caller may see it (or write to it)."""
    repo, trusted = hub.repos.get(name), hub.allowed(asked.authorization)
    if asked.authorization and not trusted:
        raise Refusal(401, "Invalid credentials in Authorization header")
    if repo is None or (repo.private and not trusted):
        raise Refusal(404 if trusted else 401, "Repository not found", "RepoNotFound")
    if writing and not trusted:
        raise Refusal(403, "You do not have write access")
    return repo


def commit_of(repo: Repo, revision: str) -> Commit:
    if commit := repo.at(revision):
        return commit
    raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def create(hub: "StandIn", asked: "Asked") -> Answer:
    told = asked.json
    name = f"{told['organization'] or 'me'}/{told['name']}"
    if not hub.allowed(asked.authorization):
        raise Refusal(401, "Invalid username or password.")
    url = f"{hub.url}/{name}"
    if name in hub.repos:
        return Answer(409, {"error": "You already created this model repo", "url": url})
    hub.repo(name, private=told.get("visibility") == "private")
    return Answer(200, {"url": url, "name": name})


def info(hub: "StandIn", asked: "Asked", name: str, revision: str = "main") -> Answer:
    if new := hub.renamed.get(name):
        return Answer(307, b"", {"Location": f"{hub.url}/api/models/{new}/revision/{revision}"})
    repo = found(hub, asked, name)
    commit = commit_of(repo, revision)
    told = {
        "id": repo.id,
        "sha": commit.oid,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "lastModified": MOMENT,
        "siblings": [{"rfilename": path} for path in commit.files],
        "tags": [],
    }
    return Answer(200, told)


def info_of_main(hub: "StandIn", asked: "Asked", name: str) -> Answer:
    return info(hub, asked, name)


def tree(hub: "StandIn", asked: "Asked", name: str, revision: str) -> Answer:
    repo = found(hub, asked, name)
    if repo.gated and not hub.allowed(asked.authorization):
        raise Refusal(403, "Access to this model is restricted", "GatedRepo")
    files = commit_of(repo, revision).files
    entries = [file.entry(path) for path, file in sorted(files.items())] + hub.extra
    start = int(asked.query.get("cursor", 0))
    headers = {}
    if start + hub.page < len(entries) or hub.endless:
        after = f"{hub.url}/api/models/{name}/tree/{revision}?recursive=True&cursor={start + hub.page}"
        headers["Link"] = f'<{after}>; rel="next"'
    return Answer(200, entries[start : start + hub.page], headers)


def commits(hub: "StandIn", asked: "Asked", name: str, revision: str) -> Answer:
    repo = found(hub, asked, name)
    end = repo.commits.index(commit_of(repo, revision))
    told = [
        {"id": c.oid, "title": c.title, "message": c.message, "date": MOMENT, "authors": [{"user": "ann"}]}
        for c in reversed(repo.commits[: end + 1])
    ]
    start = int(asked.query.get("cursor", 0))
    headers = {}
    if start + 50 < len(told) or hub.endless:
        after = f"{hub.url}/api/models/{name}/commits/{revision}?cursor={start + 50}"
        headers["Link"] = f'<{after}>; rel="next"'
    return Answer(200, told[start : start + 50], headers)


def refs(hub: "StandIn", asked: "Asked", name: str) -> Answer:
    repo = found(hub, asked, name)
    tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in repo.tags.items()]
    main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.oid}
    return Answer(200, {"branches": [main], "converts": [], "tags": tags})


def tag(hub: "StandIn", asked: "Asked", name: str, revision: str) -> Answer:
    repo, told = found(hub, asked, name, writing=True), asked.json["tag"]
    if asked.method == "DELETE":
        repo.tags.pop(revision, None)
        return Answer(200, {})
    if told in repo.tags:
        raise Refusal(409, "Tag reference exists already")
    repo.tags[told] = commit_of(repo, revision).oid
    return Answer(200, {})


def untag(hub: "StandIn", asked: "Asked", name: str, label: str) -> Answer:
    found(hub, asked, name, writing=True).tags.pop(label, None)
    return Answer(200, {})


def validate(hub: "StandIn", asked: "Asked") -> Answer:
    del hub, asked
    return Answer(200, {"errors": [], "warnings": []})


def preupload(hub: "StandIn", asked: "Asked", name: str, revision: str) -> Answer:
    files = commit_of(found(hub, asked, name, writing=True), revision).files
    told = []
    for wanted in asked.json["files"]:
        path, have = wanted["path"], files.get(wanted["path"])
        binary = b"\0" in base64.b64decode(wanted["sample"])
        large = path.endswith(".safetensors") or binary or wanted["size"] > 10 << 20
        oid = {"oid": have.sha256 or have.oid} if have else {}
        mode = "lfs" if large else "regular"
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return Answer(200, {"files": told})


def batch(hub: "StandIn", asked: "Asked", name: str) -> Answer:
    found(hub, asked, name, writing=True)
    told = []
    for wanted in asked.json["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if not hub.storage.path(wanted["oid"]).exists():
            entry["actions"] = {
                "upload": {"href": f"{hub.upload_to or hub.url}/storage/{wanted['oid']}"},
                "verify": {"href": f"{hub.verify_to or hub.url}/api/lfs/verify"},
            }
        told.append(entry)
    return Answer(200, {"transfer": "basic", "objects": told})


def put_object(hub: "StandIn", asked: "Asked", sha256: str) -> Answer:
    raise NotImplementedError  # the handler writes it to disk as it comes


def verify(hub: "StandIn", asked: "Asked") -> Answer:
    path = hub.storage.path(asked.json["oid"])
    good = path.exists() and path.stat().st_size == asked.json["size"]
    return Answer(200 if good else 404, {})


def write(hub: "StandIn", asked: "Asked", name: str, revision: str) -> Answer:
    repo, (header, *operations) = found(hub, asked, name, writing=True), asked.lines
    commit_of(repo, revision)
    parent = header["value"].get("parentCommit")
    if parent and parent != repo.head.oid:
        raise Refusal(412, "The branch was updated since you opened this page. Please refresh and try again.")
    files: dict[str, File | None] = {}
    for operation in operations:
        value = operation["value"]
        match operation["key"]:
            case "file":
                files[value["path"]] = File.regular(base64.b64decode(value["content"]))
            case "lfsFile":
                stored = hub.storage.path(value["oid"])
                if not stored.exists():
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
                with stored.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != value["oid"]:
                        raise Refusal(400, f"LFS object {value['oid']} has another sha256")
                files[value["path"]] = File.large(value["oid"], stored.stat().st_size)
            case "deletedFile":
                files[value["path"]] = None
    made = repo.write(files, header["value"]["summary"], header["value"].get("description", ""))
    return Answer(200, {"commitOid": made.oid, "commitUrl": f"{hub.url}/{name}/commit/{made.oid}"})


def resolve(hub: "StandIn", asked: "Asked", name: str, revision: str, path: str) -> Answer:
    repo = found(hub, asked, name)
    if repo.gated and not hub.allowed(asked.authorization):
        raise Refusal(403, "Access to this model is restricted", "GatedRepo")
    commit = commit_of(repo, revision)
    if target := hub.redirects.get(path):
        return Answer(302, b"", {"Location": target})
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.sha256 or file.oid}"'}
    if path in hub.corrupt:
        data = file.data if not file.sha256 else hub.storage.path(file.sha256).read_bytes()
        return Answer(200, bytes([*data[:-1], data[-1] ^ 1]), headers)
    if file.sha256:
        return Answer(200, b"", headers, hub.storage.path(file.sha256))
    return Answer(200, file.data, headers)


def stored(hub: "StandIn", asked: "Asked", sha256: str) -> Answer:
    del asked
    return Answer(200, b"", {}, hub.storage.path(sha256))


Route = Callable[..., Answer]
ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], Route]] = [
    (methods, re.compile(pattern), route)
    for methods, pattern, route in [
        (("POST",), r"/api/repos/create", create),
        (("POST",), r"/api/validate-yaml", validate),
        (("POST",), r"/api/lfs/verify", verify),
        (("GET",), rf"/api/models/{ID}", info_of_main),
        (("GET",), rf"/api/models/{ID}/revision/(.+)", info),
        (("GET",), rf"/api/models/{ID}/tree/([^/]+)", tree),
        (("GET",), rf"/api/models/{ID}/commits/([^/]+)", commits),
        (("GET",), rf"/api/models/{ID}/refs", refs),
        (("POST",), rf"/api/models/{ID}/tag/([^/]+)", tag),
        (("DELETE",), rf"/api/models/{ID}/tag/([^/]+)", untag),
        (("POST",), rf"/api/models/{ID}/preupload/([^/]+)", preupload),
        (("POST",), rf"/api/models/{ID}/commit/([^/]+)", write),
        (("POST",), rf"/{ID}\.git/info/lfs/objects/batch", batch),
        (("PUT",), r"/storage/([0-9a-f]{64})", put_object),
        (("GET",), r"/storage/([0-9a-f]{64})", stored),
        (("GET", "HEAD"), rf"/{ID}/resolve/([^/]+)/(.+)", resolve),
    ]
]
