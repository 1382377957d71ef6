"""A call that goes away leaves neither its thread's place nor another's taken."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path

from registry.catalog import Catalog
from registry.hub.client import Hub
from registry.hub.exchange import Exchange
from server.errors import TooManyExchanges
from server.hub import AT_ONCE, Hubs, HubServicer


async def test_a_call_that_is_cancelled_twice_gives_its_place_back(tmp_path: Path, hub: Hub) -> None:
    catalog, release = Catalog(tmp_path / "data"), threading.Event()
    servicer = HubServicer(catalog, Hubs((hub.endpoint,)), None)  # type: ignore[arg-type]  # nothing is swept
    began = threading.Semaphore(0)

    def work(exchange: Exchange, tell: Callable[[int], None]) -> None:
        began.release()
        release.wait()
        tell(1)

    async def call() -> list[object]:
        async with aclosing(servicer._streamed(hub, "ann", work)) as told:
            return [item async for item in told]

    calls = [asyncio.create_task(call()) for _ in range(AT_ONCE)]
    for _ in calls:
        await asyncio.to_thread(began.acquire)
    for _ in range(2):
        for one in calls:
            one.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.wait(calls)
    release.set()
    done = list[object]()
    async with asyncio.timeout(20):
        while not done:  # their threads end in a moment
            with suppress(TooManyExchanges):
                done = await call()
            await asyncio.sleep(0.01)
    assert done == [1]
    catalog.close()
