"""SweepService: sweeps over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from atelier.v1 import sweep_pb2, sweep_pb2_grpc
from server import convert
from server.errors import answering
from server.render import parts
from server.sweeps import Cell, Event, Plan, Progress, Sweeps, Swept


class SweepServicer(sweep_pb2_grpc.SweepServiceServicer):
    """Sweeps on one engine's base."""

    def __init__(self, sweeps: Sweeps) -> None:
        self._sweeps = sweeps

    async def Sweep(
        self, request: sweep_pb2.SweepRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sweep_pb2.SweepResponse]:
        async with answering(context):
            plan = await asyncio.to_thread(self._sweeps.plan, request)
            told = sweep_pb2.SweepPlan(columns=plan.columns, rows=plan.rows, seed=plan.seed)
            yield sweep_pb2.SweepResponse(plan=told)
            async with aclosing(self._sweeps.run(plan, convert.calling(context))) as events:
                async for event in events:
                    async for answer in _responses(event, plan):
                        yield answer


async def _responses(event: Event, plan: Plan) -> AsyncIterator[sweep_pb2.SweepResponse]:
    """An event in the contract's words; pictures go in parts."""
    match event:
        case Progress(done, place, step):
            progress = sweep_pb2.SweepProgress(
                cells_done=done,
                cells=len(plan.places),
                column=place.column,
                row=place.row,
                step=step,
                steps=place.order.settings.steps,
            )
            yield sweep_pb2.SweepResponse(progress=progress)
        case Cell(place, png):
            async for data, last in parts(png):
                cell = sweep_pb2.SweepCell(column=place.column, row=place.row, data=data, last=last)
                yield sweep_pb2.SweepResponse(cell=cell)
        case Swept(png, sweep, seconds, warnings):
            async for data, last in parts(png):
                yield sweep_pb2.SweepResponse(grid=sweep_pb2.SweepGrid(data=data, last=last))
            summary = sweep_pb2.SweepSummary(sweep_json=sweep, seconds=seconds, warnings=warnings)
            yield sweep_pb2.SweepResponse(summary=summary)
