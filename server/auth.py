"""Who may call what: tokens with roles, kept as hashes in `DIR/tokens`, a line each: `NAME ROLE SHA256`.

`reader` sees and renders, `writer` also changes the catalog, `admin` also collects garbage. Without the file
nobody needs a token, and the server listens to its own machine only.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import grpc

from registry.blobs import fsync_directory
from registry.errors import InvalidFile, InvalidName, NotFound
from server.errors import PermissionDenied, Unauthenticated, answering

ROLES = ("reader", "writer", "admin")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
READS = {
    "GetUpload", "GetVersion", "ListCards", "GetPreview", "ListAssets", "ListVersions", "Download",
    "WatchEvents", "CompareVersions", "FindSimilar", "ListMethods", "Render", "Replay", "Sweep", "ListBases",
    "GetStatus", "WatchStatus", "Status",
    "CreateJob", "GetJob", "ListJobs", "CancelJob", "DeleteJob", "WatchJob", "GetJobImage",
}  # fmt: skip
ADMINS = {"CollectGarbage"}
OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")
caller: ContextVar[str] = ContextVar("caller", default="")
"""The name of the token that the call came with; "" when none is needed."""
caller_role: ContextVar[str] = ContextVar("caller_role", default="admin")
"""The role of that token; whoever needs none may do everything."""


def check_owner(owner: str, what: str) -> None:
    """Raises PermissionDenied unless who calls owns it, or is an admin, or nobody needs a token."""
    if caller.get() != owner and caller_role.get() != "admin":
        raise PermissionDenied(f"{what} is {owner or 'nobody'}'s; only they, or an admin, can end it")


def check_role(role: str) -> str:
    """The role itself. Raises InvalidName."""
    if role not in ROLES:
        raise InvalidName(
            f"{role[:40]!r} is no role; choose --role {', '.join(ROLES[:-1])} or {ROLES[-1]}", field="role"
        )
    return role


class Tokens:
    """The tokens of a data directory, read again when the file changes. Raises InvalidFile when it is
    damaged.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "tokens"
        self._seen: tuple[int, int] | None = None
        self._known: dict[str, tuple[str, str]] = {}
        self._wanted = False
        self._load()

    def __bool__(self) -> bool:
        """Whether a token is needed: once there was one, until the server starts anew. Revoking the last one
        must not open the doors.
        """
        self._load()
        self._wanted = self._wanted or bool(self._known)
        return self._wanted

    def check(self, method: str, token: str) -> str:
        """The name of the token, which may call `/package.Service/Method`. Raises Unauthenticated,
        PermissionDenied.
        """
        found = [entry for known, entry in self._known.items() if hmac.compare_digest(known, _hash(token))]
        if not found:
            raise Unauthenticated(
                "this server wants a token: set ATELIER_TOKEN to one that `atelier token add` printed there"
                if not token
                else "this server does not know that token; ask its operator for another"
            )
        name, role = found[0]
        call = method.rsplit("/", 1)[-1]
        needed = "reader" if call in READS else "admin" if call in ADMINS else "writer"
        if ROLES.index(role) < ROLES.index(needed):
            raise PermissionDenied(f"{call} needs the role {needed}; the token of {name!r} is a {role}'s")
        return name

    def add(self, name: str, role: str) -> str:
        """A new token. Raises InvalidName (for a name that has one, too)."""
        check_role(role)
        token = f"atelier_{secrets.token_urlsafe(32)}"
        with self._alone():
            if not NAME.fullmatch(name) or name in [known for known, _ in self._known.values()]:
                raise InvalidName(
                    f"{name[:80]!r} is no new name: letters, digits, '.', '_', '@' or '-', not in use",
                    field="name",
                )
            self._save({**self._known, _hash(token): (name, role)})
        return token

    def revoke(self, name: str) -> None:
        """Takes a token away. Raises NotFound."""
        with self._alone():
            left = {known: entry for known, entry in self._known.items() if entry[0] != name}
            if len(left) == len(self._known):
                raise NotFound(
                    f"there is no token of {name!r}; `atelier token list` shows whose there are", field="name"
                )
            self._save(left)

    def entries(self) -> list[tuple[str, str]]:
        """Names and roles."""
        return sorted(self._known.values())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Of several who change the file at once, each sees what the one before did."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._load()
            yield

    def _load(self) -> None:
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_ino) == self._seen:
                return
            lines = self._path.read_text(errors="replace").split("\n")
        except FileNotFoundError:
            self._seen, self._known = None, {}
            return
        known = {}
        for line in filter(None, lines):
            fields = line.split(" ")
            if len(fields) != 3 or fields[1] not in ROLES or not re.fullmatch(r"[0-9a-f]{64}", fields[2]):
                raise InvalidFile(f"{self._path} is damaged; remove it and make the tokens again")
            known[fields[2]] = (fields[0], fields[1])
        self._seen, self._known = (stat.st_mtime_ns, stat.st_ino), known

    def _save(self, known: dict[str, tuple[str, str]]) -> None:
        fresh = self._path.with_suffix(".new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(f"{name} {role} {digest}\n" for digest, (name, role) in known.items())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        fsync_directory(self._path.parent)  # or a token that was revoked may be good again after a power cut
        self._load()


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Lets a call through when its token may make it."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Sets `caller`, or answers with the refusal in the method's place."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(OPEN):
            return handler
        try:
            if self._tokens:
                told = str(dict(details.invocation_metadata or ()).get("authorization", ""))
                name = self._tokens.check(details.method, told.removeprefix("Bearer "))
                caller.set(name)
                caller_role.set(dict(self._tokens.entries())[name])
        except (Unauthenticated, PermissionDenied, InvalidFile, OSError) as error:
            return _refusal(handler, error)
        return handler


def _refusal(handler: grpc.RpcMethodHandler, error: Exception) -> grpc.RpcMethodHandler:
    async def refuse(request: object, context: grpc.aio.ServicerContext) -> None:
        del request
        async with answering(context):
            raise error

    async def refuse_stream(request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        await refuse(request, context)
        yield  # an async generator, as the method is

    kind = f"{'stream' if handler.request_streaming else 'unary'}_"
    kind += "stream" if handler.response_streaming else "unary"
    return getattr(grpc, f"{kind}_rpc_method_handler")(
        refuse_stream if handler.response_streaming else refuse,
        handler.request_deserializer,
        handler.response_serializer,
    )


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
