"""What a Hub keeps: repositories of commits, each a whole tree of files; large files by their sha256."""

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path

_numbers = itertools.count(1)


def git_oid(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True, slots=True)
class File:
    """A file of a tree: `data` for a regular one, `sha256` for one in large file storage."""

    size: int
    oid: str
    data: bytes = b""
    sha256: str = ""

    @classmethod
    def regular(cls, data: bytes) -> "File":
        return cls(len(data), git_oid(data), data)

    @classmethod
    def large(cls, sha256: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(size, git_oid(pointer.encode()), sha256=sha256)

    def entry(self, path: str) -> dict[str, object]:
        """As trees list it."""
        told: dict[str, object] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            told["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return told


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit, with all files as they are after it."""

    oid: str
    files: dict[str, File]
    title: str
    message: str = ""


@dataclass(slots=True)
class Repo:
    """A repository with one branch, `main`."""

    id: str
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or an id names."""
        if revision == "main":
            return self.head
        oid = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def write(self, files: dict[str, File | None], title: str, message: str = "") -> Commit:
        """A commit on top; None takes a file away."""
        tree = dict(self.head.files) if self.commits else {}
        for path, file in files.items():
            if file is None:
                tree.pop(path, None)
            else:
                tree[path] = file
        oid = hashlib.sha1(f"{self.id} {next(_numbers)}".encode()).hexdigest()
        self.commits.append(Commit(oid, tree, title, message))
        return self.commits[-1]


class Storage:
    """Large files, on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, sha256: str) -> Path:
        return self._directory / sha256

    def put(self, data: bytes) -> File:
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        return File.large(sha256, len(data))
