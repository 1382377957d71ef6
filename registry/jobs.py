"""Jobs: work that was asked for and outlives who asked and the process that does it.

A row of `jobs` each, `order_json` says what to do and is nobody's business here; files that it needs
(`image`, `mask`, `control0`, …) are `job_inputs`. What happens is a row of
`job_events`, numbered from 1 for each job without a gap, in the transaction that makes it so; pictures are
files of the store, named by `job_images` once they are durable. States: queued, running (which after a crash
is queued again), and over for good: done, failed, cancelled. What is over is forgotten after a while.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from registry.blobs import BlobStore
from registry.database import CatalogDatabase
from registry.errors import Conflict, NotFound
from registry.records import now

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
OVER = (DONE, FAILED, CANCELLED)
FRESH = timedelta(hours=1)
"""A file younger than this may be about to be named by somebody else."""


@dataclass(frozen=True, slots=True)
class JobImage:
    """A finished picture: which, and its file."""

    image: int
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What happened: `detail` has a `state`, or the fields of an image."""

    sequence: int
    at: datetime
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands; `number` grows with its age, `told` is what was said at its end."""

    number: int
    name: str
    state: str
    creator: str
    priority: int
    order: Mapping[str, Any]
    created_at: datetime
    ended_at: datetime | None
    expires_at: datetime | None
    sequence: int
    told: Mapping[str, Any]
    images: tuple[JobImage, ...]

    @property
    def over(self) -> bool:
        """Whether nothing happens to it any more."""
        return self.state in OVER


class Jobs:
    """The jobs of a catalog. Safe to use from several threads."""

    def __init__(self, database: CatalogDatabase, blobs: BlobStore) -> None:
        self._db, self._blobs = database, blobs

    def create(
        self,
        order: Mapping[str, Any],
        *,
        creator: str,
        priority: int = 0,
        request_id: str = "",
        fingerprint: str = "",
        inputs: Mapping[str, bytes] | None = None,
    ) -> Job:
        """A new job; the same `request_id` of the same creator is the job that it made. Raises Conflict when
        that was of another request, OSError when there is no room for its pictures.
        """
        self._blobs.check_room()
        files = {what: self._store(data) for what, data in (inputs or {}).items() if data}
        with self._db.write():
            if known := self.repeated(creator, request_id, fingerprint):
                return known
            name = secrets.token_hex(6)
            row = {
                "name": name,
                "state": QUEUED,
                "creator": creator,
                "priority": priority,
                "order_json": json.dumps(order, sort_keys=True, ensure_ascii=False),
                "request_id": request_id or None,
                "fingerprint": fingerprint,
                "created_at": now(),
                "told": "{}",
            }
            self._db.tables.insert("jobs", row)
            for what, digest in files.items():
                self._keep(digest, (inputs or {})[what])
                self._db.tables.insert("job_inputs", {"job": name, "what": what, "digest": digest})
            self._event(name, {"state": QUEUED})
            return self.get(name)

    def repeated(self, creator: str, request_id: str, fingerprint: str) -> Job | None:
        """The job that this request made before. Raises Conflict when the id was another request's."""
        sql = "select name, fingerprint from jobs where creator = ? and request_id = ?"
        for row in self._db.query(sql, creator, request_id or None):
            if row["fingerprint"] != fingerprint:
                raise Conflict(
                    f"request id {request_id!r} was used for another job, {row['name']}; choose a new one",
                    field="request_id",
                )
            return self.get(row["name"])
        return None

    def get(self, name: str) -> Job:
        """Raises NotFound."""
        rows = self._db.query("select * from jobs where name = ?", name)
        if not rows:
            raise NotFound(
                f"there is no job {name[:80]!r}; `atelier job list` shows what there is", field="name"
            )
        return self._job(rows[0])

    def newest(
        self, *, below: int | None = None, limit: int = 100, state: str = "", creator: str = ""
    ) -> list[Job]:
        """Jobs with a number below `below`, the newest first."""
        sql, parameters = "select * from jobs where number < ?", [1 << 62 if below is None else below]
        rows = self._db.query(
            f"{sql} and (? = '' or state = ?) and (? = '' or creator = ?) order by number desc limit ?",
            *(*parameters, state, state, creator, creator, limit),
        )
        return [self._job(row) for row in rows]

    def unfinished(self) -> list[Job]:
        """What is to be done, oldest first; what ran when the server ended is queued again."""
        for row in self._db.query("select name from jobs where state = ?", RUNNING):
            self.change(row["name"], QUEUED)
        rows = self._db.query("select * from jobs where state = ? order by number", QUEUED)
        return [self._job(row) for row in rows]

    def events(self, name: str, after: int = 0) -> list[JobEvent]:
        """What happened to a job after the event of that number. Raises NotFound."""
        self.get(name)
        sql = "select * from job_events where job = ? and sequence > ? order by sequence"
        return [
            JobEvent(row["sequence"], datetime.fromisoformat(row["at"]), json.loads(row["detail"]))
            for row in self._db.query(sql, name, after)
        ]

    def change(
        self,
        name: str,
        state: str,
        *,
        told: Mapping[str, Any] | None = None,
        keep: timedelta | None = None,
    ) -> Job:
        """Another state, unless the job is over; at its end what there is to tell, and how long it is kept.
        Raises NotFound.
        """
        with self._db.write():
            job = self.get(name)
            if job.over or job.state == state:
                return job
            moment = datetime.now(UTC)
            values: dict[str, str] = {"state": state}
            if state in OVER:
                values |= {
                    "ended_at": moment.isoformat(),
                    "expires_at": (moment + (keep or timedelta(0))).isoformat(),
                    "told": json.dumps(told or {}, sort_keys=True, ensure_ascii=False),
                }
            sets = ", ".join(f"{column} = ?" for column in values)
            self._db.tables.execute(f"update jobs set {sets} where name = ?", *values.values(), name)
            self._event(name, {"state": state})
            return self.get(name)

    def add_image(self, name: str, image: int, png: bytes) -> JobImage:
        """Keeps a finished picture; one that is there already stays. Raises NotFound, Conflict (the job is
        over), OSError.
        """
        digest = self._store(png)
        with self._db.write():
            job = self.get(name)
            if known := next((kept for kept in job.images if kept.image == image), None):
                return known
            if job.over:
                raise Conflict(f"the job {name} is {job.state}", field="name")
            self._keep(digest, png)
            found = JobImage(image, digest, len(png))
            row = {"job": name, "image": image, "digest": digest, "size_bytes": len(png)}
            self._db.tables.insert("job_images", row)
            self._event(name, {"image": image, "digest": digest, "size_bytes": len(png)})
            return found

    def has_room(self) -> bool:
        """Whether the disk has room for pictures."""
        return self._blobs.room() >= 0

    def _store(self, data: bytes) -> str:
        with self._blobs.upload() as upload:
            upload.write(data)
            return upload.commit()

    def _keep(self, digest: str, data: bytes) -> None:
        """Within `write`: a collection without grace may have taken what was stored before."""
        if not self._blobs.path(digest).exists():
            self._store(data)

    def inputs(self, name: str) -> dict[str, bytes]:
        """The files that a job needs, by what they are. Raises Damaged."""
        rows = self._db.query("select what, digest from job_inputs where job = ?", name)
        return {row["what"]: b"".join(self._blobs.chunks(row["digest"])) for row in rows}

    def image(self, name: str, image: int) -> JobImage:
        """A finished picture. Raises NotFound."""
        job = self.get(name)
        found = next((kept for kept in job.images if kept.image == image), None)
        if found is None:
            raise NotFound(
                f"the job {name} is {job.state} and has {len(job.images)} pictures; none is {image}",
                field="image",
            )
        return found

    def delete(self, name: str) -> None:
        """Forgets a job and its pictures. Raises NotFound."""
        with self._db.write():
            self.get(name)
            digests = self._forget(name)
        self._remove(digests)

    def expire(self) -> list[str]:
        """Forgets the jobs whose time has come; their names."""
        with self._db.write():
            rows = self._db.query("select name from jobs where expires_at < ?", now())
            gone = [row["name"] for row in rows]
            digests = [digest for name in gone for digest in self._forget(name)]
        self._remove(digests)
        return gone

    def _forget(self, name: str) -> list[str]:
        """Removes a job's rows; its files, which somebody else may name."""
        named = (
            "select digest from job_images where job = ? union select digest from job_inputs where job = ?"
        )
        digests = [row["digest"] for row in self._db.query(named, name, name)]
        for table in ("job_images", "job_inputs", "job_events"):
            self._db.tables.execute(f"delete from {table} where job = ?", name)
        self._db.tables.execute("delete from jobs where name = ?", name)
        return digests

    def _remove(self, digests: list[str]) -> None:
        """Takes files away that nobody names any more; a garbage collection takes what is too fresh."""
        with self._db.write():  # nobody begins to name one meanwhile
            for digest in digests:
                path = self._blobs.path(digest)
                if self._db.query("select 1 from stored where digest = ? limit 1", digest):
                    continue
                if (
                    path.exists()
                    and datetime.now(UTC).timestamp() - path.stat().st_mtime > FRESH.total_seconds()
                ):
                    self._blobs.remove(digest)

    def _event(self, name: str, detail: Mapping[str, Any]) -> None:
        (row,) = self._db.query("select coalesce(max(sequence), 0) as n from job_events where job = ?", name)
        event = {"job": name, "sequence": row["n"] + 1, "at": now(), "detail": json.dumps(detail)}
        self._db.tables.insert("job_events", event)

    def _job(self, row: Mapping[str, Any]) -> Job:
        images = self._db.query(
            "select image, digest, size_bytes from job_images where job = ? order by image", row["name"]
        )
        (last,) = self._db.query(
            "select coalesce(max(sequence), 0) as n from job_events where job = ?", row["name"]
        )
        return Job(
            number=row["number"],
            name=row["name"],
            state=row["state"],
            creator=row["creator"],
            priority=row["priority"],
            order=json.loads(row["order_json"]),
            created_at=datetime.fromisoformat(row["created_at"]),
            ended_at=_moment(row["ended_at"]),
            expires_at=_moment(row["expires_at"]),
            sequence=last["n"],
            told=json.loads(row["told"]),
            images=tuple(JobImage(**image) for image in images),
        )


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
