"""Requests that come again under the same id: what the first came to, for a while."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from google.protobuf.message import Message

from registry.errors import Conflict
from server.errors import BadRequest

T = TypeVar("T")
ID_LIMIT, REMEMBERED, BYTES_LIMIT = 64, 512, 256 << 20


def check_id(request_id: str) -> None:
    """Raises BadRequest."""
    if len(request_id) > ID_LIMIT or not request_id.isprintable():
        raise BadRequest(
            f"request_id {request_id[:80]!r} is not of up to {ID_LIMIT} printable characters; a UUID is good",
            field="request_id",
        )


def fingerprint(request: Message) -> str:
    """Equal for equal requests."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()


class Repeats(Generic[T]):
    """The last `REMEMBERED` requests with an id, of at most `BYTES_LIMIT` by what `weigh` says of each. Safe
    to use from several threads.
    """

    def __init__(self, weigh: Callable[[T], int] = lambda made: 0) -> None:
        self._weigh, self._mutex = weigh, threading.Lock()
        self._known: OrderedDict[tuple[str, str], tuple[str, T]] = OrderedDict()

    def first(self, client: str, request_id: str, request: Message, make: Callable[[], T]) -> T:
        """What the first such request of a client came to; `make` makes it of the first itself.

        Raises BadRequest, and Conflict when the id was another request's.
        """
        check_id(request_id)
        told = fingerprint(request)
        with self._mutex:
            known = self._known.get((client, request_id))
        if known is None:
            made = (told, make())
            with self._mutex:  # of two at once the first is right
                known = self._known.setdefault((client, request_id), made)
                while len(self._known) > REMEMBERED or self._bytes() > BYTES_LIMIT:
                    self._known.popitem(last=False)
        if known[0] != told:
            raise Conflict(
                f"request id {request_id!r} was used for another request; choose a new one for this",
                field="request_id",
            )
        return known[1]

    def _bytes(self) -> int:
        return sum(self._weigh(made) for _, made in self._known.values())
