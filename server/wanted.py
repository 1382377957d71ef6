"""Whether somebody still waits for what a thread works on."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import Cancelled
from server.shelf import Check


@contextmanager
def wanted() -> Iterator[Check]:
    """What raises Cancelled once nobody waits in this block any more: the thread that works for it asks now
    and then, between two batches of layers for example.
    """
    gone = threading.Event()

    def check() -> None:
        if gone.is_set():
            raise Cancelled("nobody waits for this any more")

    try:
        yield check
    except asyncio.CancelledError:
        gone.set()
        raise
