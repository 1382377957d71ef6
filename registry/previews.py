"""Pictures shown with versions: PNGs in the store, a row each; a garbage collection takes the bytes of those
that are shown no more.
"""

from collections.abc import Callable
from dataclasses import asdict

from registry.blobs import BlobStore, Upload
from registry.database import CatalogDatabase
from registry.errors import Conflict, NotFound
from registry.records import Preview, Version

PREVIEWS_LIMIT = 8


class Previews:
    """The previews of a catalog; `resolve` finds its versions."""

    def __init__(self, db: CatalogDatabase, blobs: BlobStore, resolve: Callable[[str], Version]) -> None:
        self._db, self._blobs, self._resolve = db, blobs, resolve

    def of(self, version: Version) -> list[Preview]:
        """The pictures shown with a version, oldest first."""
        rows = self._db.query(
            "select digest, width, height, caption from previews where name = ? and number = ?"
            " order by rowid",
            version.name,
            version.number,
        )
        return [Preview(**row) for row in rows]

    def add(
        self, ref: str, upload: Upload, *, width: int, height: int, caption: str = "", actor: str = ""
    ) -> tuple[Version, Preview]:
        """Shows the uploaded picture with a version; one it has already only gets the caption. Raises
        InvalidName, NotFound, and Conflict when it has `PREVIEWS_LIMIT` already.
        """
        digest = upload.commit()
        with self._db.write():
            self._blobs.check_kept(digest)
            found = self._resolve(ref)
            have = {preview.digest: preview for preview in self.of(found)}
            fresh = Preview(digest, width, height, caption)
            if have.get(digest) == fresh:
                return found, fresh
            if digest not in have and len(have) >= PREVIEWS_LIMIT:
                raise Conflict(
                    f"{found.ref} has {PREVIEWS_LIMIT} previews already; take one away first", field="ref"
                )
            row = {"name": found.name, "number": found.number} | asdict(fresh)
            self._db.tables.upsert("previews", row, key=["name", "number", "digest"])
            self._db.event(actor, "preview", found.name, found.number, {"digest": digest})
        return found, fresh

    def remove(self, ref: str, digest: str, *, actor: str = "") -> Version:
        """Shows a picture no more; `collect_garbage` takes its bytes. Raises InvalidName, NotFound."""
        with self._db.write():
            found = self._resolve(ref)
            if digest not in [preview.digest for preview in self.of(found)]:
                raise NotFound(f"{found.ref} has no preview {digest!r}", field="digest")
            self._db.tables.execute(
                "delete from previews where name = ? and number = ? and digest = ?",
                *(found.name, found.number, digest),
            )
            self._db.event(actor, "preview", found.name, found.number, {"digest": digest, "removed": True})
        return found
