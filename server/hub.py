"""HubService: publishing, pulling and syncing over gRPC. The Hub is talked to on threads, which a caller that
hangs up stops.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TypeVar

import grpc

from atelier.v1 import hub_pb2, hub_pb2_grpc
from compose.threads import heed
from registry.catalog import Catalog
from registry.errors import Unavailable
from registry.hub.client import Hub
from registry.hub.endpoint import DEFAULT, Endpoint, endpoint
from registry.hub.exchange import Claims, Exchange, Step
from registry.hub.plan import Plan, Shot
from registry.hub.pull import Pulled, pull
from registry.hub.push import Published, push
from registry.hub.state import Link, Links
from registry.hub.sync import Direction, Keep, Outcome, Wish, ahead, linked, sync
from server import convert
from server.door import Gate
from server.errors import BadRequest, TooManyExchanges, answering, status
from server.showing import Rendered, strength
from server.sweeps import Sweeps

T = TypeVar("T")
STEP_SECONDS, NAMES_LIMIT = 0.1, 10_000
AT_ONCE = 8
"""Calls that talk to a Hub at once, on threads of their own: one that waits keeps no other call waiting."""
_DIRECTIONS: dict[int, Direction] = {0: "both", 1: "push", 2: "pull"}
_KEEPS: dict[int, Keep] = {0: "", 1: "ours", 2: "theirs", 3: "both"}


@dataclass(frozen=True, slots=True)
class Hubs:
    """The Hubs that a server may reach; the first is meant when nobody says which."""

    endpoints: Sequence[Endpoint] = field(default_factory=lambda: (endpoint(DEFAULT),))
    offline: bool = False
    client: Callable[[Endpoint], Hub] = Hub

    def chosen(self, url: str) -> Endpoint:
        """One of them. Raises BadRequest, and Unavailable for a server that shall reach none."""
        if self.offline:
            raise Unavailable(
                "the server stays off the network (--offline); what was pulled is in the catalog"
            )
        for one in self.endpoints:
            if url.rstrip("/") in {"", one.url}:
                return one
        known = ", ".join(one.url for one in self.endpoints)
        raise BadRequest(f"{url[:120]!r} is not among the server's Hubs: {known}", field="hub")


class HubServicer(hub_pb2_grpc.HubServiceServicer):
    """Answers for one catalog."""

    def __init__(self, catalog: Catalog, hubs: Hubs, sweeps: Sweeps) -> None:
        self._catalog, self._hubs, self._claims = catalog, hubs, Claims()
        self._sweeps = sweeps
        self._clients = {one.url: hubs.client(one) for one in hubs.endpoints}
        self._threads, self._live = ThreadPoolExecutor(AT_ONCE, "hub", heed), 0

    async def Push(
        self, request: hub_pb2.PushRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[hub_pb2.PushResponse]:
        async with answering(context):
            hub, actor, ref, shot = self._chosen(request.hub), convert.actor(context), request.ref, None
            if request.sweep:
                plan = await self._planned(hub, actor, request)
                ref, name = plan.version.ref, plan.version.name
                sweeping = strength(self._sweeps, plan.version, convert.calling(context))
                async with aclosing(sweeping) as rendered:
                    async for cell in rendered:
                        if isinstance(cell, Rendered):
                            step = Step(name, plan.repo, "sweeping", cell.done, cell.total)
                            yield hub_pb2.PushResponse(step=_step(step))
                        else:
                            shot = cell
            pushing = self._pushed(hub, actor, request, ref, dry_run=request.dry_run, shot=shot)
            async with aclosing(pushing) as events:
                async for event in events:
                    if isinstance(event, Step):
                        yield hub_pb2.PushResponse(step=_step(event))
                    else:
                        yield hub_pb2.PushResponse(summary=_published(event, hub))

    async def _planned(self, hub: Hub, actor: str, request: hub_pb2.PushRequest) -> Plan:
        """What a push comes to, before anything is rendered for it. Raises what that raises."""
        pushing = self._pushed(hub, actor, request, request.ref, dry_run=True)
        async with aclosing(pushing) as events:
            async for event in events:
                if isinstance(event, Published):
                    return event.plan
        raise AssertionError  # it ends with that, or an error

    def _pushed(
        self,
        hub: Hub,
        actor: str,
        request: hub_pb2.PushRequest,
        ref: str,
        *,
        dry_run: bool,
        shot: Shot | None = None,
    ) -> AsyncGenerator[Step | Published, None]:
        def work(exchange: Exchange, tell: Callable[[Published], None]) -> None:
            tell(
                push(
                    exchange,
                    ref,
                    repo=request.repo,
                    private=request.private,
                    strip=request.strip if request.HasField("strip") else None,
                    dry_run=dry_run,
                    relink=request.relink,
                    shot=shot,
                )
            )

        return self._streamed(hub, actor, work)

    async def Pull(
        self, request: hub_pb2.PullRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[hub_pb2.PullResponse]:
        async with answering(context):
            hub, actor = self._chosen(request.hub), convert.actor(context)

            def work(exchange: Exchange, tell: Callable[[Pulled], None]) -> None:
                tell(
                    pull(
                        exchange,
                        request.repo,
                        revision=request.revision,
                        name=request.name,
                        file=request.file,
                        without_card=request.without_card,
                    )
                )

            async with aclosing(self._streamed(hub, actor, work)) as events:
                async for event in events:
                    if isinstance(event, Step):
                        yield hub_pb2.PullResponse(step=_step(event))
                    else:
                        yield hub_pb2.PullResponse(summary=_pulled(event))

    async def Sync(
        self, request: hub_pb2.SyncRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[hub_pb2.SyncResponse]:
        async with answering(context):
            wish = _wish(request)
            hub, actor, seen = self._chosen(request.hub), convert.actor(context), Counter[str]()

            def work(exchange: Exchange, tell: Callable[[Outcome], None]) -> None:
                for outcome in sync(exchange, linked(exchange, list(request.names)), wish):
                    tell(outcome)

            async with aclosing(self._streamed(hub, actor, work)) as events:
                async for event in events:
                    if isinstance(event, Step):
                        yield hub_pb2.SyncResponse(step=_step(event))
                    else:
                        seen[event.action] += 1
                        yield hub_pb2.SyncResponse(outcome=_outcome(event))
            yield hub_pb2.SyncResponse(summary=hub_pb2.SyncSummary(actions=dict(seen)))

    async def Status(
        self, request: hub_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> hub_pb2.StatusResponse:
        async with answering(context):
            _check_names(request.names)
            links = Links(self._catalog)

            def work() -> list[hub_pb2.HubLink]:
                asked = [links.of(name) for name in request.names] if request.names else links.all()
                return [self._link(link) for link in asked]

            return hub_pb2.StatusResponse(
                links=await asyncio.to_thread(work),
                hubs=[
                    hub_pb2.HubEndpoint(url=one.url, has_token=bool(one.token))
                    for one in self._hubs.endpoints
                ],
                offline=self._hubs.offline,
            )

    def _chosen(self, url: str) -> Hub:
        return self._clients[self._hubs.chosen(url).url]

    def _link(self, link: Link) -> hub_pb2.HubLink:
        message = hub_pb2.HubLink(
            name=link.name,
            hub=link.endpoint,
            repo=link.repo,
            file=link.file,
            number=link.here.number,
            commit=link.commit,
            ahead=ahead(self._catalog, link),
        )
        if link.synced_at:
            message.sync_time.FromJsonString(link.synced_at)
        return message

    async def _streamed(
        self, hub: Hub, actor: str, work: Callable[[Exchange, Callable[[T], None]], None]
    ) -> AsyncGenerator[Step | T, None]:
        """What `work` tells, on a thread of its own, and how far it is, ten times a second at most. Leaving
        the loop stops it. Raises its error.
        """
        loop, told, stopped = asyncio.get_running_loop(), asyncio.Queue[Step | T | None](), threading.Event()
        last: dict[str, float] = {}

        def tell(item: Step | T) -> None:
            loop.call_soon_threadsafe(told.put_nowait, item)

        def step(item: Step) -> None:
            now = time.monotonic()
            if item.done in {0, item.total} or now - last.get(item.name, 0.0) > STEP_SECONDS:
                last[item.name] = now
                tell(item)

        exchange = Exchange(
            self._catalog, hub, Gate(self._catalog), actor, step, stopped.is_set, self._claims
        )
        if self._live >= AT_ONCE:
            raise TooManyExchanges(f"{self._live} calls talk to a Hub already, the limit; try again")
        running = loop.run_in_executor(self._threads, copy_context().run, work, exchange, tell)
        self._live += 1

        def ended(_: asyncio.Future[None]) -> None:  # whoever was waiting for it may be gone
            self._live -= 1
            told.put_nowait(None)

        running.add_done_callback(ended)
        try:
            while (item := await told.get()) is not None:
                yield item
            await running
        finally:
            stopped.set()
            if not running.done():  # nobody closes what it works with before it has seen that
                await asyncio.wait([running])


def _wish(request: hub_pb2.SyncRequest) -> Wish:
    if request.direction not in _DIRECTIONS or request.keep not in _KEEPS:
        raise BadRequest("the direction is push, pull or both; keep is ours, theirs or both", field="keep")
    _check_names(request.names)
    return Wish(_DIRECTIONS[request.direction], _KEEPS[request.keep], request.delete, request.dry_run)


def _check_names(names: Sequence[str]) -> None:
    """Raises BadRequest."""
    if len(names) > NAMES_LIMIT:
        raise BadRequest(
            f"{len(names)} names, at most {NAMES_LIMIT} at once; none means all that are published",
            field="names",
        )


def _step(step: Step) -> hub_pb2.HubStep:
    return hub_pb2.HubStep(name=step.name, repo=step.repo, what=step.what, done=step.done, total=step.total)


def _published(done: Published, hub: Hub) -> hub_pb2.PushSummary:
    plan = done.plan
    return hub_pb2.PushSummary(
        ref=plan.version.ref,
        repo=plan.repo,
        commit=done.commit,
        tag=done.tag,
        made=done.made,
        files=[hub_pb2.HubFile(path=f.path, size_bytes=f.size, fresh=f.fresh) for f in plan.files],
        card=plan.card,
        notes=done.notes,
        url=f"{hub.endpoint.url}/{plan.repo}",
    )


def _pulled(done: Pulled) -> hub_pb2.PullSummary:
    return hub_pb2.PullSummary(
        ref=done.version.ref,
        digest=done.version.digest,
        created=done.created,
        repo=done.head.repo,
        commit=done.head.commit,
        file=done.file,
        notes=done.notes,
    )


def _outcome(done: Outcome) -> hub_pb2.SyncOutcome:
    return hub_pb2.SyncOutcome(
        name=done.name,
        repo=done.repo,
        action=done.action,
        number=done.number,
        commit=done.commit,
        notes=[status(done.error)[1]] if done.error else done.notes,
        ours=done.ours,
        theirs=done.theirs,
    )
