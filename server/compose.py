"""ComposeService: merges over gRPC."""

import asyncio
import time

import grpc

from atelier.v1 import compose_pb2, compose_pb2_grpc
from compose.methods import METHODS
from registry.refs import check_alias, check_name
from server import convert
from server.errors import answering
from server.stacks import Stacks


class ComposeServicer(compose_pb2_grpc.ComposeServiceServicer):
    """Merges on a thread, one at a time: a merge wants every core."""

    def __init__(self, stacks: Stacks) -> None:
        self._stacks = stacks
        self._one = asyncio.Lock()

    async def Merge(
        self, request: compose_pb2.MergeRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.MergeResponse:
        async with answering(context):
            check_name(request.name)
            if request.alias:
                check_alias(request.alias)
            method, parameters = convert.method(request.method)
            refs = convert.stack(request.stack)
            async with self._one:
                start = time.perf_counter()
                stack = await asyncio.to_thread(self._stacks.pin, refs, method=method, parameters=parameters)
                version, created, merged = await asyncio.to_thread(
                    self._stacks.bake,
                    stack,
                    method=method,
                    parameters=parameters,
                    name=request.name,
                    alias=request.alias,
                )
                seconds = time.perf_counter() - start
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
