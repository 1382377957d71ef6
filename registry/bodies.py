"""Digests of what comes after the header: nobody who checks a file in waits for them.

The web knows them as AutoV3, and kohya's trainer writes the same into `sshs_model_hash`, when it is honest. A
version has one once the file has been read again in a quiet moment; until then it has "".
"""

import hashlib
from collections.abc import Callable

from registry.blobs import CHUNK, BlobStore
from registry.database import CatalogDatabase

MISSING = "body_digest = '' and kind <> 'stack' and purged_at is null"


class Bodies:
    """The body digests of a catalog."""

    def __init__(self, db: CatalogDatabase, blobs: BlobStore) -> None:
        self._db, self._blobs = db, blobs
        self._unreadable: set[str] = set()

    def missing(self) -> list[str]:
        """Digests of the files whose body was not read yet."""
        rows = self._db.query(f"select distinct digest from versions where {MISSING}")
        found = [row["digest"] for row in rows]
        return [d for d in found if d not in self._unreadable or self._blobs.path(d).exists()]

    def find(self, digest: str, between: Callable[[], object] = lambda: None) -> str:
        """Reads a file's body and keeps its `sha256:<hex>` with every version that holds it; `between` is
        called from time to time, and may raise to give up. "" for a file that cannot be read, which is
        `verify`'s business.
        """
        seen = hashlib.sha256()
        try:
            with self._blobs.path(digest).open("rb") as file:
                file.seek(int.from_bytes(file.read(8), "little"), 1)
                while data := file.read(CHUNK):
                    seen.update(data)
                    between()
        except (OSError, OverflowError):
            self._unreadable.add(digest)
            return ""
        found = f"sha256:{seen.hexdigest()}"
        with self._db.write():
            self._db.tables.execute(
                "update versions set body_digest = ? where digest = ? and body_digest = ''", found, digest
            )
        return found
