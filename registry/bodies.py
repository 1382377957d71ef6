"""Digests of what comes after the header: nobody who checks a file in waits for them.

The web knows them as AutoV3, and kohya's trainer writes the same into `sshs_model_hash`, when it is honest. A
version has one once the file has been read again in a quiet moment; until then it has "". So it is with the
digest of a large file's tensors, unless another version may hold the same: then it is found at once.
"""

import hashlib
from collections.abc import Callable

from registry.blobs import CHUNK, BlobStore
from registry.database import CatalogDatabase
from registry.digests import DigestStream
from registry.errors import InvalidFile
from registry.headers import HEADER_LIMIT, read_header
from registry.records import Version

MISSING = "body_digest = '' and kind <> 'stack' and purged_at is null"
MAY_HOLD_THE_SAME = """
    select o.digest from versions o join versions v on v.name = ? and v.number = ?
    where o.tensor_sample = v.tensor_sample and v.tensor_sample <> ''
    and o.digest <> v.digest and o.deleted_at is null
    union
    select o.digest from versions o join versions v on v.name = ? and v.number = ?
    where o.tensor_sample = '' and o.kind <> 'stack' and o.digest <> v.digest and o.deleted_at is null
    and o.size_bytes between v.size_bytes - ? and v.size_bytes + ?
"""
"""Other files with the sample of a version's tensors; those of releases that took none, when as large but for
the header.
"""


class Bodies:
    """The body digests of a catalog, and the tensors' where check-ins left them."""

    def __init__(self, db: CatalogDatabase, blobs: BlobStore) -> None:
        self._db, self._blobs = db, blobs
        self._unreadable: set[str] = set()

    def missing(self) -> list[str]:
        """Digests of the files whose body was not read yet."""
        rows = self._db.query(f"select distinct digest from versions where {MISSING}")
        found = [row["digest"] for row in rows]
        return [d for d in found if d not in self._unreadable or self._blobs.path(d).exists()]

    def find(self, digest: str, between: Callable[[], object] = lambda: None) -> str:
        """Reads a file and keeps its body's `sha256:<hex>`, and its tensors' if that is missing, with every
        version that holds it; the body's. `between` is called from time to time, and may raise to give up. ""
        for a file that cannot be read, which is `verify`'s business.
        """
        seen, stream = hashlib.sha256(), DigestStream(whole=self._untold(digest))
        path = self._blobs.path(digest)
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                file.seek(0)
                stream.update(file.read(8 + min(size, HEADER_LIMIT)))
                file.seek(8 + size)
                while data := file.read(CHUNK):
                    seen.update(data)
                    stream.update(data)
                    between()
            tensors = stream.finish(read_header(path)).tensors
        except (OSError, OverflowError):
            self._unreadable.add(digest)
            return ""
        except InvalidFile:
            tensors = ""
        found = f"sha256:{seen.hexdigest()}"
        with self._db.write():
            for column, value in (("body_digest", found), ("tensor_digest", tensors)):
                self._db.tables.execute(
                    f"update versions set {column} = ? where digest = ? and {column} = ''", value, digest
                )
        return found

    def compare(self, version: Version) -> str:
        """The digest of a version's tensors, known by now if another version may hold the same; the others'
        are, too. "" when nobody needs it before a quiet moment comes.
        """
        key = version.name, version.number
        span = HEADER_LIMIT + 8
        others = [row["digest"] for row in self._db.query(MAY_HOLD_THE_SAME, *key, *key, span, span)]
        if others:
            for digest in (version.digest, *others):
                if self._untold(digest):
                    self.find(digest)
        (row,) = self._db.query("select tensor_digest from versions where name = ? and number = ?", *key)
        return str(row["tensor_digest"])

    def _untold(self, digest: str) -> bool:
        return bool(self._db.query("select 1 from versions where digest = ? and tensor_digest = ''", digest))
