"""The calls to one Hub. Each ends, and none believes what it has not checked.

What was measured on huggingface_hub and is met here: a commit whose answer is lost has been made, so after
any failure the history is read instead of trying blindly again; a commit without a change succeeds whatever
its parent; a branch is answered from a cache when the Hub is down, so a revision becomes a commit first, and
there is no cache; downloads are compared by size only, so every byte is hashed here; errors carry the request
with its token, so none of them gets out.
"""

import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    paginate,
    validate_repo_id,
)

from registry.errors import (
    Conflict,
    Damaged,
    RegistryError,
    Renamed,
    Unavailable,
    Untrusted,
)
from registry.hub.answers import MOVED, Busy, HeadMoved, translated
from registry.hub.endpoint import Endpoint, check_repo, check_revision
from registry.hub.guard import calling
from registry.hub.wire import ANSWER_SECONDS, SILENT_SECONDS, SLOWEST, WHOLE_SECONDS, Call

T = TypeVar("T")
TREE_LIMIT, PATH_LIMIT, DEPTH_LIMIT, SIZE_LIMIT = 20_000, 4096, 64, 1 << 50
PAUSES = (0.5, 2.0)
"""Seconds between the attempts of what can be done again; a Hub that asks for up to `PATIENCE` gets them."""
PATIENCE = 30.0
ATTEMPTS = 4
"""To make a commit while others are making theirs."""
HISTORY_LIMIT = 1000
"""Commits that are looked through for one of ours; more were made since only where nobody asked for long."""
REGULAR_LIMIT = 10 << 20
"""Bytes of the files that a commit holds in itself; larger ones go to the Hub's storage of large files."""
CHUNK = 1 << 20
_MARK = "atelier-push: "


@dataclass(frozen=True, slots=True)
class Head:
    """What a revision is: `repo` is the repository's name there."""

    repo: str
    commit: str
    private: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a tree. `oid` is what its bytes must have: `sha256:…` where the Hub keeps large files,
    `git:…` (sha1) elsewhere.
    """

    path: str
    size: int
    oid: str


Source = bytes | Path
"""A file's bytes, or where they are."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """The commit that a push made, or that has everything already; `tree` is the Hub's after it."""

    commit: str
    tree: Mapping[str, Entry]


_COMMIT = re.compile(r"[0-9a-f]{40}")
_OID = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")


class Hub:
    """A Hub. Safe to use from several threads. `silent`, `answer` and `whole` are the seconds that it may say
    nothing, may take for a request, and for all that one call asks; files move at `slowest` bytes a second.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        silent: float = SILENT_SECONDS,
        answer: float = ANSWER_SECONDS,
        whole: float = WHOLE_SECONDS,
        slowest: float = SLOWEST,
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        self.endpoint = endpoint
        self._pauses = tuple(pauses)
        self._call, self._rest = Call(endpoint, silent, answer, whole, slowest), _Rest()
        # token=False, not None: None would send whatever token the machine's user has.
        self._api = HfApi(endpoint=endpoint.url, token=endpoint.token or False, library_name="atelier")

    def watched(self, moved: Callable[[int], None], stopped: Callable[[], bool]) -> "Hub":
        """The same Hub, whose calls tell of bytes that moved, and end with Stopped when nobody wants them."""
        other = copy(self)
        other._call = replace(self._call, moved=moved, stopped=stopped)
        return other

    def head(self, repo: str, revision: str = "main") -> Head:
        """What a revision is now. Raises NotFound (also for a repository that was renamed, with its new
        name), Denied, Unavailable, Untrusted, InvalidName.
        """
        check_repo(repo)
        check_revision(revision)
        info = self._ask(repo, lambda: self._api.model_info(repo, revision=revision))
        commit = str(info.sha)
        if len(commit) != 40 or set(commit) - set("0123456789abcdef"):
            raise Untrusted(f"{self.endpoint.url} says that {repo} is at {commit[:60]!r}, which is no commit")
        if len(revision) == 40 and not set(revision) - set("0123456789abcdef") and revision != commit:
            raise Untrusted(f"{self.endpoint.url} answered for {revision} of {repo} with {commit}")
        if info.id != repo:
            with translated(self.endpoint, repo):
                validate_repo_id(info.id)
            raise Renamed(f"{repo} has been renamed; it is {info.id} now", field="repo", new=info.id)
        return Head(repo, commit, bool(info.private))

    def tree(self, repo: str, commit: str) -> dict[str, Entry]:
        """Every file of a commit, by path. Raises what `head` raises."""

        def listed() -> dict[str, Entry]:
            found, folders = dict[str, Entry](), set[str]()
            for item in self._api.list_repo_tree(repo, recursive=True, revision=commit):
                path = _path(repo, item.path)
                if path in found or path in folders:
                    raise Untrusted(f"{repo} lists {path!r} twice")
                if isinstance(item, RepoFile):
                    found[path] = _entry(repo, path, item)
                else:
                    folders.add(path)
                if len(found) + len(folders) > TREE_LIMIT:
                    raise Untrusted(f"{repo} has more than {TREE_LIMIT} files and folders")
            for path in found:
                if both := next((part for part in _above(path) if part in found), ""):
                    raise Untrusted(f"{repo} lists {both!r} as a file and as a folder")
            return found

        return self._ask(repo, listed)

    def chunks(self, repo: str, commit: str, entry: Entry) -> Iterator[bytes]:
        """A file's bytes in pieces; Damaged at the end unless they are what the tree says. Raises what `head`
        raises.
        """
        hashed = _hash(entry.size, large=entry.oid.startswith("sha256:"))
        size, url = 0, hf_hub_url(repo, entry.path, revision=commit, endpoint=self.endpoint.url)
        with (
            self._calling(repo, transfer=True) as call,
            get_session().stream("GET", url, headers=self._headers()) as response,
        ):
            hf_raise_for_status(response)
            for piece in response.iter_raw(CHUNK):
                size += len(piece)
                if size > entry.size:
                    break
                hashed.update(piece)
                call.moved(len(piece))
                yield piece
        if size != entry.size or hashed.hexdigest() != entry.oid.partition(":")[2]:
            raise Damaged(
                f"{entry.path} of {repo} is not what the Hub lists: it should have {entry.size} bytes and "
                f"{entry.oid}; nothing was kept"
            )

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(token=self.endpoint.token or False, library_name="atelier")

    def read(self, repo: str, commit: str, entry: Entry) -> bytes:
        """A small file, whole. Raises what `chunks` raises."""
        return self.patiently(lambda: b"".join(self.chunks(repo, commit, entry)))

    def create(self, repo: str, *, private: bool) -> None:
        """Makes a repository, unless it is there. Raises Denied, Unavailable, Untrusted, InvalidName."""
        check_repo(repo)
        self._ask(repo, lambda: self._api.create_repo(repo, private=private, exist_ok=True))

    def commit(
        self,
        repo: str,
        *,
        add: Mapping[str, Source],
        delete: Iterable[str] = (),
        title: str,
        parent: str,
        push_id: str = "",
    ) -> Pushed:
        """Makes one commit on top of `parent`, or finds that it was made: `push_id` (one of `push_id()`) is
        in its description, and is looked for whenever it is not clear what happened. Raises Conflict when
        others have changed the branch, and what `head` raises.
        """
        push_id, gone = push_id or new_push_id(), list(delete)
        why: RegistryError | None = None
        for attempt in range(ATTEMPTS):
            if why:
                self._wait(attempt - 1, why)
                if made := self._made(repo, push_id, parent):
                    return Pushed(made, self.tree(repo, made))
            try:
                with self._calling(repo):
                    oid, sent = self._send(repo, add, gone, title, parent, push_id)
            except (Unavailable, Busy) as error:
                why = error
                continue
            except HeadMoved:
                if made := self._made(repo, push_id, parent):
                    return Pushed(made, self.tree(repo, made))
                raise Conflict(MOVED.format(repo=repo), field="repo") from None
            tree = self.tree(repo, oid)
            if not all(path in tree and _is(tree[path], addition) for path, addition in sent.items()):
                # A commit that changes nothing succeeds on any parent: this one is somebody else's.
                raise Conflict(MOVED.format(repo=repo), field="repo")
            return Pushed(oid, tree)
        if made := self._made(repo, push_id, parent):
            return Pushed(made, self.tree(repo, made))
        raise Unavailable(str(why)) from None

    def made(self, repo: str, push_id: str, since: str = "") -> str:
        """The commit that a push with this id made on top of `since`, or of what came after it; "" for none,
        and for one below `HISTORY_LIMIT` others. Raises what `head` raises.
        """
        url, commit = f"{self.endpoint.url}/api/models/{repo}/commits/main", re.compile(r"[0-9a-f]{40}")

        def found() -> str:
            # One page after the other, where `list_repo_commits` reads the whole history.
            for place, told in enumerate(paginate(url, params={}, headers=self._headers())):
                if place == HISTORY_LIMIT or told["id"] == since:
                    break
                if f"{_MARK}{push_id}" in f"{told['title']}\n{told['message']}":
                    if not commit.fullmatch(told["id"]):
                        raise Untrusted(f"{repo} has a commit whose id is none: {told['id'][:60]!r}")
                    return str(told["id"])
            return ""

        return self._ask(repo, found)

    def _made(self, repo: str, push_id: str, parent: str) -> str:
        return "" if self.head(repo).commit == parent else self.made(repo, push_id, parent)

    def _send(
        self, repo: str, add: Mapping[str, Source], delete: list[str], title: str, parent: str, push_id: str
    ) -> tuple[str, dict[str, CommitOperationAdd]]:
        additions = [
            CommitOperationAdd(path, source if isinstance(source, bytes) else str(source))
            for path, source in add.items()
        ]
        for addition in additions:  # one by one: several at once would run on threads that nobody guards
            self._api.preupload_lfs_files(repo, [addition], num_threads=1, free_memory=False)
        self._check_modes(repo, additions)
        made = self._api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(path) for path in delete)],
            commit_message=title,
            commit_description=f"{_MARK}{push_id}",
            parent_commit=parent,
            num_threads=1,
        )
        return made.oid, dict(zip(add, additions, strict=True))

    def _check_modes(self, repo: str, additions: Sequence[CommitOperationAdd]) -> None:
        """Raises Untrusted for a file that the repository ignores, and for large ones within the commit,
        which is put together in memory.
        """
        if ignored := next((one.path_in_repo for one in additions if one._should_ignore), ""):
            raise Untrusted(
                f"the .gitignore of {repo} leaves {ignored} out; take that line away", field="repo"
            )
        regular = [one for one in additions if one._upload_mode == "regular"]  # what preupload was answered
        if sum(one.upload_info.size for one in regular) <= REGULAR_LIMIT:
            return
        large = max(regular, key=lambda one: one.upload_info.size)
        raise Untrusted(
            f"{self.endpoint.url} wants {large.path_in_repo} ({large.upload_info.size} bytes) within the "
            f"commit to {repo}, where {REGULAR_LIMIT >> 20} MiB have room; have its .gitattributes say "
            f"`*.{large.path_in_repo.rpartition('.')[2]} filter=lfs diff=lfs merge=lfs -text`",
            field="repo",
        )

    def tag(self, repo: str, name: str, commit: str) -> bool:
        """Names a commit; False when the tag names another one already, and stays there. Raises what `head`
        raises.
        """

        def named() -> bool:
            try:
                self._api.create_tag(repo, tag=name, revision=commit)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                # `exist_ok` would not say that the tag is somewhere else.
                return self._tags(repo).get(name) == commit
            return True

        return self._ask(repo, named)

    def untag(self, repo: str, name: str) -> None:
        """Takes a tag away, if it is there. Raises what `head` raises."""

        def taken() -> None:
            try:
                self._api.delete_tag(repo, tag=name)
            except RevisionNotFoundError:
                return

        self._ask(repo, taken)

    def tags(self, repo: str) -> dict[str, str]:
        """The commits that tags name. Raises what `head` raises."""
        return self._ask(repo, lambda: self._tags(repo))

    def _tags(self, repo: str) -> dict[str, str]:
        """Those that are names of commits."""
        listed = [(tag.name, tag.target_commit) for tag in self._api.list_repo_refs(repo).tags]
        return {
            name: commit
            for name, commit in listed
            if isinstance(name, str) and isinstance(commit, str) and _COMMIT.fullmatch(commit)
        }

    def patiently(self, work: Callable[[], T]) -> T:
        """What `work` returns, tried again while the Hub is not there: for what can be done twice."""
        for attempt in range(len(self._pauses) + 1):
            try:
                return work()
            except Unavailable as error:
                if attempt == len(self._pauses):
                    raise
                self._wait(attempt, error)
        raise AssertionError  # the last attempt returned or raised

    def _ask(self, repo: str, work: Callable[[], T]) -> T:
        def asked() -> T:
            with self._calling(repo):
                return work()

        return self.patiently(asked)

    def _wait(self, attempt: int, why: RegistryError) -> None:
        """Pauses, as long as a Hub that is too busy asks for, if that is bearable. Raises its error."""
        pauses = self._pauses or (0.0,)
        pause = getattr(why, "seconds", 0.0) or pauses[min(attempt, len(pauses) - 1)]
        if pause > PATIENCE:
            raise why
        end = time.monotonic() + pause
        while (left := end - time.monotonic()) > 0:
            self._call.check()
            time.sleep(min(left, 0.1))

    @contextmanager
    def _calling(self, repo: str, *, transfer: bool = False) -> Iterator[Call]:
        call = replace(self._call, transfer=transfer)
        if (left := self._rest.until - time.monotonic()) > PATIENCE:  # nobody asks it for that long
            raise Unavailable(f"{self.endpoint.url} asks to wait {left:.0f} s; try again later", seconds=left)
        try:
            with calling(call), translated(self.endpoint, repo):
                yield call
        except Unavailable as error:
            self._rest.until = max(self._rest.until, time.monotonic() + error.seconds)
            raise


@dataclass(slots=True)
class _Rest:
    """Until when the Hub wants to be left alone."""

    until: float = 0.0


def new_push_id() -> str:
    """Names a push, so that its commit is found again."""
    return uuid.uuid4().hex


def _is(entry: Entry, sent: CommitOperationAdd) -> bool:
    if entry.oid.startswith("sha256:"):  # hashed on its way there
        return entry.oid == f"sha256:{sent.upload_info.sha256.hex()}"
    source = sent.path_or_fileobj
    return entry.oid == oid(source if isinstance(source, bytes) else Path(str(source)), large=False)


def _path(repo: str, path: object) -> str:
    """A path that git could hold. Raises Untrusted."""
    parts = path.split("/") if isinstance(path, str) and len(path) <= PATH_LIMIT else [""]
    if not {"", ".", "..", ".git"}.isdisjoint(parts) or "\0" in str(path):
        raise Untrusted(f"{repo} lists {str(path)[:120]!r}, which is no path within a repository")
    if len(parts) > DEPTH_LIMIT:
        raise Untrusted(f"{repo} lists {str(path)[:120]!r}, which is more than {DEPTH_LIMIT} folders deep")
    return str(path)


def _above(path: str) -> Iterator[str]:
    """The folders that a path is in."""
    for place, letter in enumerate(path):
        if letter == "/":
            yield path[:place]


def _entry(repo: str, path: str, item: RepoFile) -> Entry:
    """A file of a tree, whose size is one and whose digest is one. Raises Untrusted."""
    sizes = {item.size, item.lfs.size} if item.lfs else {item.size}
    if len(sizes) > 1 or type(item.size) is not int or not 0 <= item.size <= SIZE_LIMIT:
        told = " and ".join(sorted(str(size)[:40] for size in sizes))
        raise Untrusted(f"{repo} lists {path[:120]!r} with {told} bytes, which is no size")
    oid = f"sha256:{item.lfs.sha256}" if item.lfs else f"git:{item.blob_id}"
    if not _OID.fullmatch(oid):
        raise Untrusted(f"{repo} has a file whose digest is none: {oid[:90]!r}")
    return Entry(path, item.size, oid)


def _hash(size: int, *, large: bool) -> "hashlib._Hash":
    """Where the Hub keeps large files, sha256; elsewhere what git calls `size` bytes."""
    return hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size)


def oid(source: Source, *, large: bool) -> str:
    """What a tree calls these bytes."""
    hashed = _hash(len(source) if isinstance(source, bytes) else source.stat().st_size, large=large)
    if isinstance(source, bytes):
        hashed.update(source)
    else:
        with source.open("rb") as file:
            while data := file.read(CHUNK):
                hashed.update(data)
    return f"{'sha256' if large else 'git'}:{hashed.hexdigest()}"
