"""Verify, back up, restore: what an operator does to a data directory, also while a server has it.

Everything here reads the database through a connection of its own that cannot write. Blobs never change and
rows are written after their blobs, so the order is: the database first, then the files it names.
"""

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from registry.blobs import BlobStore, fsync_directory
from registry.errors import Conflict, Damaged, NotFound

Progress = Callable[[int, int], None]
"""Called with files done, and all of them."""
DATABASE = "catalog.db"
TOKENS = "tokens"
"""Who may use it, hashes (`server.auth`)."""
UNSOUND = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found. `missing` and `corrupt` are versions that cannot be read (with their digest);
    `orphans` are files that no version names, which loses nobody anything.
    """

    versions: int
    files: int
    missing: tuple[str, ...]
    corrupt: tuple[str, ...]
    orphans: tuple[str, ...]
    database: tuple[str, ...]
    """What SQLite's own check complains of."""

    @property
    def sound(self) -> bool:
        """Whether every version can be read."""
        return not (self.missing or self.corrupt or self.database)


def verify(root: Path, progress: Progress = lambda done, total: None) -> Report:
    """Reads every file again and compares it with its digest. Raises NotFound, Damaged."""
    return _checked(root, progress)


def _checked(
    root: Path,
    progress: Progress = lambda done, total: None,
    *,
    notes: Mapping[str, str] = MappingProxyType({}),
    mended: Callable[[str], bool] = lambda digest: False,
) -> Report:
    """`notes` are by digest, on what is found missing; `mended` may make a corrupt file whole."""
    with _reading(root) as connection:
        complaints = [text for (text,) in connection.execute("pragma integrity_check") if text != "ok"]
        complaints += [f"foreign key: {row}" for row in connection.execute("pragma foreign_key_check")]
        refs = _named(connection)
    blobs = BlobStore.existing(root)
    files = {digest for digest, _ in blobs.files()}
    missing, corrupt = [], []
    for done, (digest, names) in enumerate(sorted(refs.items())):
        progress(done, len(refs))
        if digest not in files:
            missing += [(digest, f"{name} ({digest}){notes.get(digest, '')}") for name in names]
            continue
        try:
            blobs.verified(digest)
        except (Damaged, OSError):  # a bad sector hides no other damage
            if mended(digest):
                continue
            corrupt += [(digest, f"{name} ({digest})") for name in names]
    progress(len(refs), len(refs))
    with _reading(root) as connection:  # what a server did meanwhile is no damage
        now = _named(connection)
    return Report(
        versions=sum(" " not in ref for names in refs.values() for ref in names),
        files=len(files),
        missing=tuple(text for digest, text in missing if digest in now),
        corrupt=tuple(text for digest, text in corrupt if digest in now),
        orphans=tuple(sorted(files - refs.keys() - now.keys())),
        database=tuple(complaints),
    )


def backup(root: Path, target: Path, progress: Progress = lambda done, total: None) -> Report:
    """Copies a data directory to `target`, which is one itself afterwards; again, only what is new,
    and what has been damaged there. A file that cannot be read here, or is not its digest's, is left out, and
    is `missing` in what is told.

    The copy's database is put in place last: a backup cut short leaves the one before it. Raises NotFound,
    Damaged (the database; the backup before it stays), Conflict (`target` holds something else, another
    catalog too, is in use, or is this very directory), OSError.
    """
    if target.resolve() == root.resolve():
        raise Conflict(f"{target} is the catalog itself; choose another directory", field="target")
    if target.is_dir() and any(target.iterdir()) and not (target / "blobs").is_dir():
        raise Conflict(
            f"{target} holds something that is no backup; choose an empty directory", field="target"
        )
    with _reading(root) as connection:
        here = _versions(connection)
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        _check_earlier(target, here)
        copies = BlobStore(target, spare=0)
        while (left_out := _copied(root, target, copies, progress)) is None:
            pass
        _put_in_place(root, target)
        notes = {digest: f", {what} in {root}" for digest, what in left_out.items()}
        source = BlobStore.existing(root)
        return _checked(target, notes=notes, mended=lambda digest: _copy(source, copies, digest))


def _copied(root: Path, target: Path, copies: BlobStore, progress: Progress) -> dict[str, str] | None:
    """Brings the database and the files that it names to `target`. By digest what is wrong with those that
    are left out; None when a collection has taken some meanwhile, and all is to be done again.
    """
    fresh = target / f"{DATABASE}.new"
    fresh.unlink(missing_ok=True)
    with _reading(root) as connection, closing(sqlite3.connect(fresh)) as copy:
        connection.backup(copy)
        copy.execute("pragma journal_mode=delete")  # one file, whole by itself
        refs = _named(copy)
        if (target / DATABASE).exists():
            for (complaint,) in copy.execute("pragma integrity_check(1)"):
                if complaint != "ok":
                    raise Damaged(
                        f"{root / DATABASE} is damaged ({complaint}); the backup in {target} stays as "
                        "it was, so choose another directory for what can still be read"
                    )
    source, have = BlobStore.existing(root), {digest for digest, _ in copies.files()}
    left_out: dict[str, str] = {}
    for done, digest in enumerate(sorted(refs)):
        progress(done, len(refs))
        if digest in have:
            continue
        if not _copy(source, copies, digest):
            with _reading(root) as connection:
                if digest not in _named(connection):
                    return None
            left_out[digest] = "corrupt" if source.path(digest).exists() else "missing"
    progress(len(refs), len(refs))
    return left_out


def _copy(source: BlobStore, copies: BlobStore, digest: str) -> bool:
    """Whether the file is whole at the source, and now in the copy. Raises OSError where it cannot be
    written.
    """
    try:
        with copies.upload() as upload:
            for chunk in _read(source, digest):
                upload.write(chunk)
            upload.commit()
    except Damaged:
        return False
    return True


def _read(source: BlobStore, digest: str) -> Iterator[bytes]:
    """The file's bytes; Damaged also where the disk does not give them: what cannot be written is another
    matter.
    """
    try:
        yield from source.chunks(digest)
    except OSError as error:
        raise Damaged(f"the file {digest} cannot be read: {error.strerror}") from None


def _put_in_place(root: Path, target: Path) -> None:
    """The copied database, and before it who may use it: a catalog made of a copy is as closed as this."""
    fresh = target / f"{DATABASE}.new"
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    if (root / TOKENS).is_file():
        hashes = target / f"{TOKENS}.new"
        with os.fdopen(os.open(hashes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write((root / TOKENS).read_bytes())
            file.flush()
            os.fsync(file.fileno())
        hashes.replace(target / TOKENS)
        fsync_directory(target)
    for left_over in ("-wal", "-shm", "-journal"):  # of the database that is replaced
        (target / f"{DATABASE}{left_over}").unlink(missing_ok=True)
    fresh.replace(target / DATABASE)
    fsync_directory(target)


def restore(source: Path, root: Path, progress: Progress = lambda done, total: None) -> Report:
    """Makes a data directory from a backup; what a backup lacks, it lacks too, and is told. Raises what
    `backup` raises, and Conflict when `root` holds a catalog already.
    """
    if (root / DATABASE).exists():
        raise Conflict(f"{root} holds a catalog already; restore into an empty directory", field="data")
    existed = root.exists()
    try:
        return backup(source, root, progress)
    except BaseException:
        if not existed:
            shutil.rmtree(root, ignore_errors=True)
        raise


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Nobody else serves a directory, or copies to it. Raises Conflict."""
    with (target / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"{target} is in use by another process; choose another directory", field="target"
            ) from None
        yield


def _check_earlier(target: Path, here: set[tuple[str, int, str]]) -> None:
    """Raises Conflict when `target` holds a version that is not among `here`: it is somebody's catalog, not
    an earlier backup of this one.
    """
    if (target / DATABASE).exists():
        with _reading(target) as connection:
            foreign = sorted(_versions(connection) - here)
        if foreign:
            name, number, _ = foreign[0]
            raise Conflict(
                f"{target} holds {name}:{number}, which is not in this catalog, so it is no backup of it; "
                "choose another directory",
                field="target",
            )


def _versions(connection: sqlite3.Connection) -> set[tuple[str, int, str]]:
    return set(connection.execute("select name, number, digest from versions"))


@contextmanager
def _reading(root: Path) -> Iterator[sqlite3.Connection]:
    database = root / DATABASE
    if not database.is_file():
        raise NotFound(f"there is no catalog in {root}", field="data")
    try:
        with closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
        ) as opened:
            yield opened
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in UNSOUND:  # a full disk, a lock: that is no damage
            raise OSError(str(error)) from None
        raise Damaged(f"{database} is damaged ({error}); restore it from a backup") from None


def _named(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """By digest, the versions (and previews, and pictures of jobs: words before their names) whose bytes must
    be there.
    """
    tables = {name for (name,) in connection.execute("select name from sqlite_master")}
    columns = {name for (name,) in connection.execute("select name from pragma_table_info('versions')")}
    if "stored" in tables:
        rows = "select digest, what || name, number from stored where purged_at is null"
    else:  # a directory that an earlier release wrote, and none has opened since
        rows = "select digest, name, number from versions"
        rows += " where purged_at is null" if "purged_at" in columns else ""
    found: dict[str, list[str]] = {}
    for digest, name, number in connection.execute(f"{rows} order by 2, 3"):
        found.setdefault(digest, []).append(f"{name}:{number}")
    return found
