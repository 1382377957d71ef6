"""The picture that a version is published with: its strength sweep, the same one each time, so that it is
shown once however often it is published.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from atelier.v1 import compose_pb2, render_pb2, sweep_pb2
from compose.errors import ComposeError
from registry.errors import RegistryError
from registry.hub.plan import Shot
from registry.records import Version
from server.convert import caption
from server.errors import BadRequest
from server.job import Caller
from server.previews import redrawn
from server.sweeps import Progress, Sweeps, Swept

STRENGTHS, SEED = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2), 1


@dataclass(frozen=True, slots=True)
class Rendered:
    """Cells that are finished, of so many."""

    done: int
    total: int


async def strength(sweeps: Sweeps, version: Version, caller: Caller) -> AsyncGenerator[Rendered | Shot, None]:
    """Renders a version in its strengths, and tells how far that is; the picture, last. Leaving the generator
    ends it. Raises RegistryError, ComposeError, BadRequest, ServerError.
    """
    request = sweep_pb2.SweepRequest(
        common=render_pb2.RenderRequest(
            stack=[compose_pb2.WeightedRef(ref=version.ref, weight=1.0)], seed=SEED
        ),
        axes=[sweep_pb2.Axis(weight=sweep_pb2.WeightAxis(adapter=version.ref, values=STRENGTHS))],
    )
    try:
        plan = await asyncio.to_thread(sweeps.plan, request)
    except (RegistryError, ComposeError, BadRequest) as error:
        raise type(error)(f"no sweep of {version.ref}: {error}", field="sweep") from None
    total, told = len(plan.places), -1
    async with aclosing(sweeps.run(plan, caller)) as events:
        async for event in events:
            match event:
                case Progress(done=done) if done != told:
                    told = done
                    yield Rendered(done, total)
                case Swept(png=png, sweep=text):
                    yield Rendered(total, total)
                    kept, _, _ = await asyncio.to_thread(redrawn, await asyncio.to_thread(bytes, png))
                    yield Shot(kept, caption(_told(json.loads(text))))


def _told(document: dict[str, Any]) -> str:
    """The picture's caption: `sweep: milo 0 to 1.2; a milo on a yellow background`."""
    labels = document["axes"][0]["labels"]
    return f"sweep: {labels[0]} to {labels[-1].split()[-1]}; {document['cells'][0]['manifest']['prompt']}"
