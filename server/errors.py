"""What can go wrong on the way, and the one place where any error becomes a gRPC status.

Every status but a fault's carries google.rpc.ErrorInfo (reason: the class's name in capitals; domain:
atelier); bad fields also BadRequest, unmet conditions PreconditionFailure, and what is worth repeating
RetryInfo (AIP-193).
"""

import errno
import logging
import re
import sqlite3
import uuid
from types import TracebackType

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from compose import errors as compose
from registry import errors as registry
from server.calls import current

log = logging.getLogger("atelier")
DETAIL_BYTES = 600
"""The message travels three times, percent-encoded once; gRPC allows 8 KB of trailers."""


class ServerError(Exception):
    """Anything the server refuses by itself."""

    field = ""


class QueueFull(ServerError):
    """Too many renders wait."""


class TooManyUploads(ServerError):
    """Too many check-ins are under way."""


class TooManyExchanges(ServerError):
    """Too many calls talk to a Hub."""


class Draining(ServerError):
    """The server is shutting down."""


class Cancelled(ServerError):
    """The caller does not want the answer any more."""


class DeadlineExceeded(ServerError):
    """The caller's deadline passed."""


class OutOfSpace(ServerError):
    """The disk or the device's memory is full."""


class StorageUnavailable(ServerError):
    """The disk does not do what it is asked, or not now."""


class Unauthenticated(ServerError):
    """No token, or one nobody knows."""


class PermissionDenied(ServerError):
    """A token whose role is not enough."""


class BadRequest(ServerError):
    """A request that is malformed in itself."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


_CODES: dict[type[Exception], grpc.StatusCode] = {
    registry.NotFound: grpc.StatusCode.NOT_FOUND,
    registry.Renamed: grpc.StatusCode.NOT_FOUND,
    registry.InvalidName: grpc.StatusCode.INVALID_ARGUMENT,
    registry.InvalidFile: grpc.StatusCode.INVALID_ARGUMENT,
    registry.Conflict: grpc.StatusCode.ABORTED,
    registry.Moved: grpc.StatusCode.ABORTED,
    registry.Damaged: grpc.StatusCode.DATA_LOSS,
    registry.Unavailable: grpc.StatusCode.UNAVAILABLE,
    registry.Denied: grpc.StatusCode.PERMISSION_DENIED,
    registry.Untrusted: grpc.StatusCode.FAILED_PRECONDITION,
    registry.Stopped: grpc.StatusCode.CANCELLED,
    compose.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    compose.UnsupportedLayout: grpc.StatusCode.INVALID_ARGUMENT,
    compose.NonFinite: grpc.StatusCode.INVALID_ARGUMENT,
    compose.NoRoom: grpc.StatusCode.RESOURCE_EXHAUSTED,
    compose.IncompatibleBase: grpc.StatusCode.FAILED_PRECONDITION,
    BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooManyUploads: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooManyExchanges: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OutOfSpace: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StorageUnavailable: grpc.StatusCode.UNAVAILABLE,
    Draining: grpc.StatusCode.UNAVAILABLE,
    Cancelled: grpc.StatusCode.CANCELLED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
}
_RETRY_SECONDS: dict[type[Exception], int] = {
    QueueFull: 5, TooManyUploads: 5, TooManyExchanges: 5, Draining: 30,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FAILING = {errno.EIO, errno.EROFS, errno.ESTALE}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_UNUSABLE = {
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
}
"""Of the operating system, then of SQLite."""


def status(error: Exception) -> tuple[grpc.StatusCode, str, bytes]:
    """Code, message and serialised google.rpc.Status of an error. One nobody foresaw is logged under a
    number.
    """
    error = _of_machine(error) or error
    code = _CODES.get(type(error))
    if code is None:
        number = current().request_id or uuid.uuid4().hex[:8]
        log.error("fault %s", number, exc_info=error)
        return (
            grpc.StatusCode.INTERNAL,
            f"a fault in the server, in its log as {number}; please report it",
            b"",
        )
    message = _line(str(error))
    rich = status_pb2.Status(code=code.value[0], message=message)
    for detail in _details(error, code, message):
        packed = any_pb2.Any()
        packed.Pack(detail)
        rich.details.append(packed)
    return code, message, rich.SerializeToString()


def _of_machine(error: Exception) -> Exception | None:
    """What the memory, the disk or the database of the server came to, in words of ours."""
    if compose.out_of_memory(error):
        return OutOfSpace("the server is out of memory; render a smaller picture, or fewer at once")
    number = error.errno if isinstance(error, OSError) else None
    result = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # the rest of it says where
    if number in _FULL or result == sqlite3.SQLITE_FULL:
        return OutOfSpace("the server's disk is full; nothing was stored")
    if result in _DAMAGED:
        log.error("the catalog's database is damaged: %s", error)
        return registry.Damaged(
            f"the catalog's database is damaged ({error}); whoever runs the server can see what is left with "
            "`atelier verify`, and has to restore a backup"
        )
    if number in _FAILING or result in _UNUSABLE:
        log.error("the data directory cannot be used now: %s", error)
        why = error.strerror if isinstance(error, OSError) else error
        return StorageUnavailable(
            f"the catalog cannot be read or written now ({why}); try again later, and if that goes on, let "
            "whoever runs the server see to its disk"
        )
    return None


def _line(text: str) -> str:
    """One printable line of at most DETAIL_BYTES bytes."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line.encode(errors="replace")[:DETAIL_BYTES].decode(errors="ignore")


def _details(error: Exception, code: grpc.StatusCode, message: str) -> list[Message]:
    reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).upper()
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain="atelier")]
    field = getattr(error, "field", "")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        unmet = error_details_pb2.PreconditionFailure.Violation(
            type=reason, subject=field, description=message
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[unmet]))
    if seconds := _RETRY_SECONDS.get(type(error)) or getattr(error, "seconds", 0):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(int(seconds))
        details.append(retry)
    return details


class answering:  # noqa: N801  # read as a word: `async with answering(context)`
    """Ends the call with the right status when the block raises."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
            code, message, rich = status(error)
            details = (("grpc-status-details-bin", rich),) if rich else ()
            told = (*details, *current().named())
            await self._context.abort(code, message, told)  # these replace what was set before
