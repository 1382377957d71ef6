"""ComposeService: merges and saved stacks over gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import grpc

from atelier.v1 import compose_pb2, compose_pb2_grpc
from compose.difference import total
from compose.merging import Merged, unknown
from compose.methods import METHODS, Parameters
from compose.schedule import MODES
from compose.settings import Settings
from compose.weights import Weight
from registry.catalog import Catalog
from registry.records import Version
from registry.refs import check_alias, check_name
from server import convert, inspection, saved
from server.choosing import Chooser, choose
from server.errors import BadRequest, answering
from server.layered import left_out, mergeable
from server.likes import Likes, Similar
from server.pinned import Pinned, fill
from server.shelf import Check
from server.stacks import Stacks
from server.wanted import wanted

CHUNK, AUTO = 1 << 20, "auto"


class ComposeServicer(compose_pb2_grpc.ComposeServiceServicer):
    """Merges on a thread, one at a time: a merge wants every core."""

    def __init__(
        self,
        catalog: Catalog,
        stacks: Stacks,
        likes: Likes,
        norms: Callable[[str], Mapping[str, float]],
        chooser: Chooser,
    ) -> None:
        self._catalog, self._stacks, self._likes = catalog, stacks, likes
        self._norms, self._chooser = norms, chooser
        self._one = asyncio.Lock()  # a merge wants every core; who waits for it holds no thread

    async def Merge(
        self, request: compose_pb2.MergeRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.MergeResponse:
        async with answering(context):
            check_name(request.name)
            if request.alias:
                check_alias(request.alias)
            method, parameters = convert.method(request.method)
            if method not in {*METHODS, *MODES, AUTO}:
                raise unknown(method, (*METHODS, AUTO))
            refs = convert.stack(request.stack)
            chosen: tuple[Pinned, ...] = ()
            report: dict[str, Any] = {}
            if method == AUTO:
                method, parameters, chosen, report = await self._choose(
                    refs, parameters, request.base, context
                )
            actor = convert.actor(context)

            def work(check_wanted: Check) -> tuple[tuple[Pinned, ...], tuple[Version, bool, Merged], float]:
                check_wanted()
                start = time.perf_counter()
                stack = chosen or self._stacks.pin(
                    refs, method=method, parameters=parameters, base=request.base
                )
                mergeable(stack)
                met = inspection.recorded(
                    self._stacks, stack, norms=self._norms, base=request.base, check=check_wanted
                )
                baked = self._stacks.bake(
                    stack,
                    method=method,
                    parameters=parameters,
                    name=request.name,
                    alias=request.alias,
                    check_wanted=check_wanted,
                    actor=actor,
                    report=report | met,
                )
                return stack, baked, time.perf_counter() - start

            with wanted() as check_wanted:
                async with self._one:
                    stack, (version, created, merged), seconds = await asyncio.to_thread(work, check_wanted)
            return compose_pb2.MergeResponse(
                version=convert.version(version),
                members=[
                    compose_pb2.MemberReport(
                        ref=p.version.ref,
                        weight=p.weight.value,
                        parts=dict(p.weight.parts),
                        kept=kept,
                        left_out=left_out(p.version),
                    )
                    for p, kept in zip(stack, merged.kept, strict=True)
                ],
                truncation_error=merged.truncation_error,
                merge_seconds=seconds,
                created=created,
            )

    async def _choose(
        self,
        refs: Sequence[tuple[str, Weight]],
        parameters: Parameters,
        base: str,
        context: grpc.aio.ServicerContext,
    ) -> tuple[str, Parameters, tuple[Pinned, ...], dict[str, Any]]:
        """What `auto` comes to: a method, what it is told, the stack in its order, and what it was compared
        with.
        """
        if given := sorted(parameters.given()):
            raise BadRequest(f"auto decides by itself: leave {given[0]} out", field=f"method.{given[0]}")
        pinned = await asyncio.to_thread(self._stacks.pin, refs, method="naive", parameters=parameters)
        mergeable(pinned)
        if mute := next((p for p in pinned if not p.triggers), None):
            raise BadRequest(
                f"auto renders what it merges, and {mute.version.ref} has no trigger word to call it by; "
                "choose a method, or ask Tune with prompts of your own",
                field="stack",
            )
        with wanted() as check_wanted:
            question = await asyncio.to_thread(
                self._chooser.question, pinned, prompts=(), base=base, wanted=check_wanted
            )
        best, trials = await choose(self._chooser, question, convert.calling(context))
        stack = tuple(self._stacks.measured(best.stack, best.method, question.base.name))
        compared = [
            {
                "method": trial.method,
                "parameters": {n: getattr(trial.parameters, n) for n in sorted(trial.parameters.given())},
                "order": [p.version.ref for p in trial.stack],
                **({"weights": told} if (told := _weights(trial.stack)) != _weights(pinned) else {}),
                "value": round(trial.value, 4),
            }
            for trial in trials
        ]
        report = {
            "chosen_by": AUTO,
            "looked_at": {"base": question.base.name, "digest": question.base.digest},
            "scorer": self._chooser.scorer(question),
            "compared": compared,
            **({"suggested": said.told(pinned)} if (said := question.suggestion) else {}),
        }
        return best.method, best.parameters, stack, report

    async def SaveStack(
        self, request: compose_pb2.SaveStackRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.SaveStackResponse:
        async with answering(context):
            check_name(request.name)
            if request.alias:
                check_alias(request.alias)
            refs, actor = convert.stack(request.stack), convert.actor(context)
            settings = {
                name: text for name in ("prompt", "negative_prompt") if (text := getattr(request, name))
            }
            settings |= {n: getattr(request, n) for n in ("steps", "guidance") if request.HasField(n)}
            Settings(**{"prompt": "", **settings}).check(1)

            def work() -> tuple[dict[str, Any], tuple[Version | None, bool]]:
                stack = self._stacks.pin(refs, method="naive", parameters=Parameters())
                told = saved.document(refs, stack, settings)
                fill(request.prompt, stack)
                if request.dry_run:
                    return told, (None, False)
                kept = saved.save(
                    self._catalog, told, stack, name=request.name, alias=request.alias, actor=actor
                )
                return told, kept

            told, (version, created) = await asyncio.to_thread(work)
            return compose_pb2.SaveStackResponse(
                version=convert.version(version) if version else None,
                created=created,
                stack_json=convert.stack_json(told),
            )

    async def CompareVersions(
        self, request: compose_pb2.CompareVersionsRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.CompareVersionsResponse:
        async with answering(context):
            before, after, changes = await asyncio.to_thread(
                self._stacks.compare, request.before, request.after
            )
            return compose_pb2.CompareVersionsResponse(
                before=convert.version(before),
                after=convert.version(after),
                layers=[compose_pb2.LayerChange(**asdict(change)) for change in changes],
                total=compose_pb2.LayerChange(**asdict(total(changes))),
            )

    async def FindSimilar(
        self, request: compose_pb2.FindSimilarRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.FindSimilarResponse:
        async with answering(context):
            at_least = request.at_least if request.HasField("at_least") else 0.5
            if not 0 < at_least <= 1:
                raise BadRequest(f"at_least {at_least:g} is not above 0 and at most 1", field="at_least")

            def work() -> tuple[Version, Similar]:
                found = self._catalog.resolve(request.ref)
                return found, self._likes.of(found, at_least)

            found, near = await asyncio.to_thread(work)
            return compose_pb2.FindSimilarResponse(
                version=convert.version(found),
                similar=[convert.similar(other, cosine) for other, cosine in near],
            )

    async def InspectStack(
        self, request: compose_pb2.InspectStackRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.InspectStackResponse:
        async with answering(context):
            refs = convert.stack(request.stack)
            with wanted() as check_wanted:
                return await asyncio.to_thread(
                    inspection.inspect,
                    self._stacks,
                    refs,
                    norms=self._norms,
                    picture=request.picture,
                    layers=request.layers,
                    base=request.base,
                    check=check_wanted,
                )

    async def Remake(
        self, request: compose_pb2.RemakeRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.RemakeResponse:
        async with answering(context):
            with wanted() as check_wanted:
                async with self._one:
                    version, digest, differences = await asyncio.to_thread(
                        self._stacks.remake, request.ref, check_wanted
                    )
            same = digest == version.digest
            return compose_pb2.RemakeResponse(
                version=convert.version(version), digest=digest, same=same, differences=differences
            )

    async def ExportAdapter(
        self, request: compose_pb2.ExportAdapterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[compose_pb2.ExportAdapterResponse]:
        async with answering(context):
            files, without = await asyncio.to_thread(self._stacks.export, request.ref, request.format)
            for name, data in files.items():
                for start in range(0, len(data), CHUNK):
                    part = data[start : start + CHUNK]
                    yield compose_pb2.ExportAdapterResponse(file=name, chunk=part, left_out=without)
                    without = ()

    async def ListMethods(
        self, request: compose_pb2.ListMethodsRequest, context: grpc.aio.ServicerContext
    ) -> compose_pb2.ListMethodsResponse:
        del request, context
        return compose_pb2.ListMethodsResponse(
            methods=[
                compose_pb2.MethodInfo(
                    name=name,
                    summary=method.summary,
                    parameters=sorted(method.parameters),
                    ordered=method.ordered,
                    calibrated=method.calibrated,
                    renders=name in MODES,
                )
                for name, method in {**METHODS, **MODES}.items()
            ]
        )


def _weights(stack: Sequence[Pinned]) -> dict[str, list[str]]:
    """By reference, as they are written on a command line; a reference may come several times."""
    found: dict[str, list[str]] = {}
    for pinned in stack:
        found.setdefault(pinned.version.ref, []).append(str(pinned.weight))
    return found
