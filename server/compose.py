"""ComposeService: merges over gRPC."""

import asyncio
import threading
import time

import grpc

from atelier.v1 import compose_pb2, compose_pb2_grpc
from compose.methods import METHODS, Merged
from registry.catalog import Version
from registry.refs import check_alias, check_name
from server import convert
from server.errors import Cancelled, answering
from server.stacks import Pinned, Stacks


class ComposeServicer(compose_pb2_grpc.ComposeServiceServicer):
    """Merges on a thread, one at a time: a merge wants every core."""

    def __init__(self, stacks: Stacks) -> None:
        self._stacks = stacks
        self._one = threading.Lock()

    async def Merge(
        self, request: compose_pb2.MergeRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.MergeResponse:
        async with answering(context):
            check_name(request.name)
            if request.alias:
                check_alias(request.alias)
            method, parameters = convert.method(request.method)
            refs = convert.stack(request.stack)
            gone, actor = threading.Event(), convert.actor(context)

            def check_wanted() -> None:
                if gone.is_set():
                    raise Cancelled("nobody waits for this merge any more")

            def work() -> tuple[tuple[Pinned, ...], tuple[Version, bool, Merged], float]:
                with self._one:
                    check_wanted()
                    start = time.perf_counter()
                    stack = self._stacks.pin(refs, method=method, parameters=parameters)
                    baked = self._stacks.bake(
                        stack,
                        method=method,
                        parameters=parameters,
                        name=request.name,
                        alias=request.alias,
                        check_wanted=check_wanted,
                        actor=actor,
                    )
                    return stack, baked, time.perf_counter() - start

            try:
                stack, (version, created, merged), seconds = await asyncio.to_thread(work)
            except asyncio.CancelledError:
                gone.set()  # the thread cannot be stopped, but it keeps nothing
                raise
            return compose_pb2.MergeResponse(
                version=convert.version(version),
                members=[
                    compose_pb2.MemberReport(ref=p.version.ref, weight=p.weight, kept=kept)
                    for p, kept in zip(stack, merged.kept, strict=True)
                ],
                truncation_error=merged.truncation_error,
                merge_seconds=seconds,
                created=created,
            )

    async def ListMethods(
        self, request: compose_pb2.ListMethodsRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.ListMethodsResponse:
        del request, context
        return compose_pb2.ListMethodsResponse(
            methods=[
                compose_pb2.MethodInfo(
                    name=name, summary=method.summary, parameters=sorted(method.parameters)
                )
                for name, method in METHODS.items()
            ]
        )
