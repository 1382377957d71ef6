"""Whose turn it is: a queue without threads and clocks.

Between clients the one that was served least goes first, in seconds of service; who comes back after a while
starts level with the others and has saved up nothing:

    served[client] = max(served[client], clock)              when it claims again
    served[client] += seconds / share[client]                when it was served
    clock          += seconds / shares of clients that wait  what a share of 1 would have got

A client's share is 1 unless the operator says otherwise: who has 2 gets twice the seconds of who has 1, while
both wait.

Among one client's claims the higher priority goes first, then the earlier deadline, then who came first. A
claim whose `key` is that of what ran last (its stack is applied already) may be taken before its turn, but
nobody is overtaken like that more than `OVERTAKEN` times, nor once it waited `PATIENCE` seconds.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

OVERTAKEN, PATIENCE = 8, 20.0
T = TypeVar("T")


@dataclass(slots=True, eq=False, kw_only=True)
class Claim(Generic[T]):
    """What one client wants done; several may claim the same `item`. `cost` is what it will take, in seconds,
    `since` when it came, on the clock of whoever takes.
    """

    item: T
    client: str = ""
    priority: int = 0
    deadline: float | None = None
    key: object = None
    cost: float = 1.0
    since: float = 0.0
    overtaken: int = 0
    number: int = 0

    def rank(self) -> tuple[float, ...]:
        """Its place among the claims of its client."""
        return -self.priority, math.inf if self.deadline is None else self.deadline, self.number


@dataclass(slots=True)
class _Account:
    served: float = 0.0
    turn: int = 0


class FairQueue(Generic[T]):
    """Claims that wait. Not thread-safe."""

    def __init__(
        self,
        *,
        overtaken: int = OVERTAKEN,
        patience: float = PATIENCE,
        shares: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`shares` above 0, by client; of who is not named 1."""
        self._overtaken, self._patience, self._shares = overtaken, patience, shares
        self._claims: dict[str, list[Claim[T]]] = {}
        self._accounts: dict[str, _Account] = {}
        self._clock, self._serving = 0.0, False
        self._numbers = itertools.count(1)

    def add(self, claim: Claim[T]) -> None:
        """Lets a claim wait; one that waited before keeps its place among its client's."""
        claim.number = claim.number or next(self._numbers)
        if claim.client not in self._claims:
            account = self._accounts.setdefault(claim.client, _Account())
            account.served = max(account.served, self._clock)
        self._claims.setdefault(claim.client, []).append(claim)

    def remove(self, claim: Claim[T]) -> None:
        """Takes a claim back; harmless when it waits no more."""
        self._drop(claim)
        account = self._accounts.get(claim.client)
        if claim.client not in self._claims and account and account.served <= self._clock:
            del self._accounts[claim.client]
        if not self._claims and not self._serving:  # all rest
            self._accounts.clear()

    def _drop(self, claim: Claim[T]) -> None:
        mine = self._claims.get(claim.client, [])
        if claim in mine:
            mine.remove(claim)
            if not mine:
                del self._claims[claim.client]

    def order(self) -> list[Claim[T]]:
        """The first claim on each item, in the order in which they will be served if nothing changes."""
        waiting = {client: sorted(mine, key=Claim.rank) for client, mine in self._claims.items()}
        turns = [(self._accounts[c].served, self._accounts[c].turn, mine[0].number, c)
                 for c, mine in waiting.items()]  # fmt: skip
        heapq.heapify(turns)
        found: dict[int, Claim[T]] = {}
        later = itertools.count(1 << 62)
        while turns:
            served, turn, _, client = heapq.heappop(turns)
            mine = waiting[client]
            claim = mine.pop(0)
            if id(claim.item) not in found:
                found[id(claim.item)] = claim
                served, turn = served + claim.cost / self._share(client), next(later)
            if mine:
                heapq.heappush(turns, (served, turn, mine[0].number, client))
        return list(found.values())

    def take(
        self, *, now: float, key: object = None, ready: Callable[[T], bool] = lambda item: True
    ) -> T | None:
        """The item whose turn it is of those that are ready, with all claims on it; None when there is none.
        `key` is that of what ran last.
        """
        order = [claim for claim in self.order() if ready(claim.item)]
        if not order:
            return None
        chosen = self._favoured(order, key, now) if key is not None else 0
        for claim in order[:chosen]:
            claim.overtaken += 1
        item, self._serving = order[chosen].item, True
        self._accounts[order[chosen].client].turn = next(self._numbers)
        for claim in [c for mine in self._claims.values() for c in mine if c.item is item]:
            self._drop(claim)  # its account stays open until it is served
        return item

    def _favoured(self, order: list[Claim[T]], key: object, now: float) -> int:
        """The place of the first claim with this key, if everybody before it can bear that; else 0."""
        for place, claim in enumerate(order):
            if claim.key == key:
                return place
            if claim.overtaken >= self._overtaken or now - claim.since >= self._patience:
                return 0
        return 0

    def served(self, client: str, seconds: float) -> None:
        """Puts service down to a client's account: what was taken is done."""
        self._serving = False
        self._accounts.setdefault(client, _Account(self._clock)).served += seconds / self._share(client)
        self._clock += seconds / sum(map(self._share, self._claims.keys() | {client}))
        # Of those who want nothing, only who had more than its share is remembered; of nobody, when all rest.
        for name in self._accounts.keys() - self._claims.keys():
            if not self._claims or self._accounts[name].served <= self._clock:
                del self._accounts[name]

    def _share(self, client: str) -> float:
        return self._shares.get(client, 1.0)

    def __len__(self) -> int:
        """Claims that wait."""
        return sum(map(len, self._claims.values()))
