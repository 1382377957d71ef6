"""Whose turn it is, without threads and clocks: nobody is overtaken beyond the bound, everybody gets a turn,
nothing is lost.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.fairness import Claim, FairQueue

W, T = 3, 50.0
CLIENTS = st.sampled_from("abcd")
SHARES = {"b": 3.0, "d": 0.25}


@dataclass(eq=False)
class Item:
    """Something to be done."""

    name: int
    loaded: bool = True


class Taking(RuleBasedStateMachine):
    """Clients come and go, items load, cancel and are served; the clock only goes on."""

    shares: Mapping[str, float] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Item] = FairQueue(overtaken=W, patience=T, shares=self.shares)
        self.claims: list[Claim[Item]] = []
        self.overtaken: Counter[Claim[Item]] = Counter()
        self.added, self.taken, self.left = 0, 0, 0
        self.now, self.key = 0.0, ""

    @rule(
        client=CLIENTS,
        priority=st.integers(-10, 10),
        deadline=st.none() | st.floats(0, 100),
        key=st.sampled_from("xyz"),
        cost=st.floats(0.01, 10),
        loaded=st.booleans(),
    )
    def add(
        self, client: str, priority: int, deadline: float | None, key: str, cost: float, loaded: bool
    ) -> None:
        self.added += 1
        claim = Claim(
            item=Item(self.added, loaded), client=client, priority=priority, deadline=deadline, key=key,
            cost=cost, since=self.now,
        )  # fmt: skip
        self.claims.append(claim)
        self.queue.add(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), client=CLIENTS)
    def share(self, data: st.DataObject, client: str) -> None:
        same = data.draw(st.sampled_from(self.claims))
        claim = Claim(item=same.item, client=client, key=same.key, since=self.now)
        self.claims.append(claim)
        self.queue.add(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        self.queue.remove(claim)
        self.queue.remove(claim)
        self.claims.remove(claim)
        if not any(other.item is claim.item for other in self.claims):
            self.left += 1

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.claims)).item.loaded = True

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.floats(0.01, 10))
    def take(self, seconds: float) -> None:
        order = [claim for claim in self.queue.order() if claim.item.loaded]
        item = self.queue.take(now=self.now, key=self.key, ready=lambda item: item.loaded)
        if item is None:
            assert not order
            return
        place = next(i for i, claim in enumerate(order) if claim.item is item)
        for passed in order[:place]:
            assert order[place].key == self.key != passed.key
            assert self.now - passed.since < T
            self.overtaken[passed] += 1
        for claim in [c for c in self.claims if c.item is item]:
            self.claims.remove(claim)
        self.key, self.taken, self.now = order[place].key, self.taken + 1, self.now + seconds
        self.queue.served(order[place].client, seconds)

    @invariant()
    def nobody_is_overtaken_beyond_the_bound(self) -> None:
        assert all(times <= W for times in self.overtaken.values())

    @invariant()
    def nothing_is_lost(self) -> None:
        waiting = {claim.item.name for claim in self.claims}
        assert {claim.item.name for claim in self.queue.order()} == waiting
        assert len(self.queue) == len(self.claims)
        assert self.added == self.taken + self.left + len(waiting)

    @invariant()
    def within_a_client_priority_then_deadline_then_age_decides(self) -> None:
        if len({claim.item for claim in self.claims}) < len(self.claims):
            return  # a shared item goes with the first of its claims
        for client in "abcd":
            mine = [claim for claim in self.queue.order() if claim.client == client]
            assert mine == sorted(mine, key=Claim.rank)

    def teardown(self) -> None:
        for claim in self.claims:
            claim.item.loaded = True
        for _ in range(len({claim.item for claim in self.claims})):
            self.take(1.0)
        assert not self.claims
        assert self.queue.take(now=self.now) is None


class TakingByShares(Taking):
    """The same bounds hold when clients have unlike shares."""

    shares = SHARES


TestTaking = Taking.TestCase
TestTakingByShares = TakingByShares.TestCase


def queue_of(*claims: Claim[str], **bounds: float) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue(**bounds)  # type: ignore[arg-type]
    for claim in claims:
        queue.add(claim)
    return queue


def taken(queue: FairQueue[str], *, seconds: float = 1.0, key: object = None) -> list[str]:
    found = []
    while order := queue.order():
        item = queue.take(now=0.0, key=key)
        assert item is not None
        found.append(item)
        queue.served(next(claim.client for claim in order if claim.item == item), seconds)
    return found


def test_one_who_sends_one_is_not_behind_all_of_one_who_sends_many() -> None:
    many = [Claim(item=f"many {i}", client="many") for i in range(5)]
    queue = queue_of(*many, Claim(item="one", client="one"))
    assert taken(queue) == ["many 0", "one", "many 1", "many 2", "many 3", "many 4"]


def test_clients_share_seconds_and_not_turns() -> None:
    claims = [Claim(item=f"{client}{i}", client=client) for i in range(40) for client in ("long", "short")]
    queue, seconds = queue_of(*claims), Counter[str]()
    for _ in range(44):
        item = queue.take(now=0.0)
        assert item is not None
        client = item.rstrip("0123456789")
        took = 10.0 if client == "long" else 1.0
        seconds[client] += took
        queue.served(client, took)
    assert abs(seconds["long"] - seconds["short"]) <= 10


@given(
    shares=st.lists(st.floats(0.25, 4), min_size=2, max_size=4),
    costs=st.lists(st.floats(0.1, 2), min_size=40, max_size=80),
)
def test_clients_that_wait_get_seconds_by_their_shares(shares: list[float], costs: list[float]) -> None:
    """Of any two that never stop waiting, what each got for its share differs by no more than the longest job
    counts for either.
    """
    told = {str(number): share for number, share in enumerate(shares)}
    queue: FairQueue[tuple[str, int]] = FairQueue(shares=told)
    got = dict.fromkeys(told, 0.0)
    for client in told:
        for number in range(len(costs) + 1):
            queue.add(Claim(item=(client, number), client=client))
    for seconds in costs:
        item = queue.take(now=0.0)
        assert item is not None
        got[item[0]] += seconds
        queue.served(item[0], seconds)
        by_share = [got[client] / share for client, share in told.items()]
        assert max(by_share) - min(by_share) <= max(costs) / min(shares) + 1e-6


def test_who_rested_starts_level_and_has_saved_up_nothing() -> None:
    queue = queue_of(*(Claim(item=f"busy {i}", client="busy") for i in range(20)))
    for _ in range(10):
        queue.take(now=0.0)
        queue.served("busy", 1.0)
    for i in range(10):
        queue.add(Claim(item=f"late {i}", client="late"))
    first = [claim.client for claim in queue.order()[:8]]
    assert Counter(first) == {"busy": 4, "late": 4}


def test_an_endless_stream_of_new_clients_does_not_starve_an_old_one() -> None:
    queue = queue_of(*(Claim(item=f"old {i}", client="old") for i in range(2)))
    assert queue.take(now=0.0) == "old 0"
    queue.served("old", 5.0)
    for number in itertools.count():
        queue.add(Claim(item=f"new {number}", client=f"new {number}"))
        item = queue.take(now=0.0)
        if item == "old 1":
            break
        queue.served(str(item), 1.0)
        assert number < 20
    assert len(queue._accounts) < 25


def test_priority_then_deadline_then_who_came_first() -> None:
    claims = [
        Claim(item="third", client="a"),
        Claim(item="fourth", client="a"),
        Claim(item="second", client="a", deadline=10.0),
        Claim(item="first", client="a", priority=1),
        Claim(item="last", client="a", priority=-1, deadline=1.0),
    ]
    assert taken(queue_of(*claims)) == ["first", "second", "third", "fourth", "last"]


def test_a_priority_is_one_among_the_claims_of_its_client() -> None:
    claims = [Claim(item="modest", client="a"), Claim(item="loud", client="b", priority=10)]
    assert taken(queue_of(*claims)) == ["modest", "loud"]


def test_the_stack_that_is_applied_goes_first_until_somebody_was_overtaken_enough() -> None:
    claims = [Claim(item="other", client="a", key="y")]
    claims += [Claim(item=f"same {i}", client=f"b{i}", key="x") for i in range(5)]
    assert taken(queue_of(*claims, overtaken=3), key="x") == [
        "same 0", "same 1", "same 2", "other", "same 3", "same 4",
    ]  # fmt: skip


def test_nobody_who_waited_long_is_overtaken() -> None:
    claims = [Claim(item="other", client="a", key="y"), Claim(item="same", client="b", key="x", since=40.0)]
    assert queue_of(*claims, patience=50.0).take(now=49.0, key="x") == "same"
    claims = [Claim(item="other", client="a", key="y"), Claim(item="same", client="b", key="x", since=40.0)]
    assert queue_of(*claims, patience=50.0).take(now=50.0, key="x") == "other"


def test_what_two_want_goes_with_the_first_turn_of_either() -> None:
    shared = "last of many"
    backlog = [Claim(item=item, client="many") for item in ("first", "second", shared)]
    queue = queue_of(*backlog, Claim(item=shared, client="few"))
    assert taken(queue) == ["first", shared, "second"]
    assert len(queue) == 0


@pytest.mark.parametrize("count", [1, 5])
def test_an_account_of_who_wants_nothing_is_closed(count: int) -> None:
    queue = queue_of(*(Claim(item=str(i), client=f"c{i}") for i in range(count)))
    taken(queue)
    assert not queue._accounts
    claim = Claim(item="x", client="gone")
    queue.add(claim)
    queue.remove(claim)
    assert not queue._accounts


def test_nobody_is_remembered_when_the_last_who_waited_goes() -> None:
    greedy, patient = Claim(item="greedy", client="a"), Claim(item="patient", client="b")
    queue = queue_of(greedy, patient)
    assert queue.take(now=0.0) == "greedy"
    queue.served("a", 10.0)
    assert set(queue._accounts) == {"a", "b"}  # a had more than its share, and b waits
    queue.remove(patient)
    assert not queue._accounts


def test_who_is_being_served_is_remembered_when_the_last_who_waited_goes() -> None:
    first, last = Claim(item="first", client="a"), Claim(item="last", client="b")
    queue = queue_of(first, last)
    assert queue.take(now=0.0) == "first"
    queue.served("a", 10.0)
    again = Claim(item="again", client="a")
    queue.add(again)
    assert queue.take(now=0.0) == "last"
    queue.remove(again)
    assert queue._accounts["a"].served == 10.0
    queue.served("b", 1.0)
    assert not queue._accounts
