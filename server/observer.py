"""The interceptor that follows every call from its first byte to its last, whoever answers it.

A call is known by the `x-request-id` of its metadata, or is given one; the answer's trailing metadata say
it. `traceparent` puts its span under the caller's.
"""

import asyncio
import inspect
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.auth import OPEN, caller
from server.calls import REQUEST_ID, Call, enter
from server.errors import BadRequest, answering
from server.telemetry import Telemetry

CLOCKS_APART = 0.2
"""Seconds: a client whose deadline passes hangs up, and that comes a moment before it passes here."""
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_PROPAGATOR = TraceContextTextMapPropagator()
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class Observer(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Measures every call; to be the first of the interceptors, so that refusals are seen, too."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, with a `Call` around it."""
        told = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        call = Call(
            self._telemetry,
            details.method.rsplit("/", 1)[-1],
            request_id=_request_id(told),
            parent=_PROPAGATOR.extract(told),
            quiet=details.method.startswith(OPEN),
        )
        enter(call)
        if task := asyncio.current_task():  # grpc's, for this call: given up before its method has begun
            task.add_done_callback(lambda _: call.finish(grpc.StatusCode.CANCELLED))
        handler = await continuation(details)
        if handler is None:  # what nobody has; a caller's own words are no label
            call.rpc = "unknown"
            call.finish(grpc.StatusCode.UNIMPLEMENTED)
            return None
        user = "".join(c for c in told.get("atelier-user", "") if c.isprintable())
        call.client = caller.get() or user[:100]
        return _observed(handler, call)


def _request_id(told: Mapping[str, str]) -> str:
    said = told.get(REQUEST_ID, "")
    return said if _WELL_FORMED.fullmatch(said) else uuid.uuid4().hex


def _observed(handler: grpc.RpcMethodHandler, call: Call) -> grpc.RpcMethodHandler:
    kind = f"{'stream' if handler.request_streaming else 'unary'}_"
    kind += "stream" if handler.response_streaming else "unary"
    behaviour: Callable[..., Any] = getattr(handler, kind)

    async def one(request: object, context: grpc.aio.ServicerContext) -> object:
        _arrived(call, context)
        try:
            await _check_readable(request, context)
            answer = await behaviour(request, context)
        except BaseException as error:
            call.finish(_code(context, error))
            raise
        call.finish(_code(context, None))
        return answer

    async def many(request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[object]:
        _arrived(call, context)
        try:
            await _check_readable(request, context)
            async with aclosing(behaviour(request, context)) as answers:
                async for answer in answers:
                    begun = time.perf_counter()
                    yield answer
                    call.sent(time.perf_counter() - begun)
        except BaseException as error:
            call.finish(_code(context, error))
            raise
        call.finish(_code(context, None))

    if inspect.isasyncgenfunction(behaviour):
        wrapped: Callable[..., Any] = many
    elif inspect.iscoroutinefunction(behaviour):
        wrapped = one
    else:  # runs in a thread of grpc's
        return handler
    return getattr(grpc, f"{kind}_rpc_method_handler")(
        wrapped,
        _reading(handler.request_deserializer, streaming=handler.request_streaming),
        handler.response_serializer,
    )


def _reading(parse: Callable[[bytes], object], *, streaming: bool) -> Callable[[bytes], object]:
    """A parser that lets the method's own code meet what cannot be parsed: of a stream as an error where it
    is read, else as a request. grpc ends such a call before anybody hears of it.
    """

    def read(data: bytes) -> object:
        try:
            return parse(data)
        except DecodeError as error:
            refused = BadRequest(f"the request is no message of the contract: {error}")
            if streaming:
                raise refused from None
            return refused

    return read


async def _check_readable(request: object, context: grpc.aio.ServicerContext) -> None:
    if isinstance(request, BadRequest):
        async with answering(context):
            raise request


def _arrived(call: Call, context: grpc.aio.ServicerContext) -> None:
    call.client = call.client or context.peer()
    context.set_trailing_metadata(call.named())
    # A call that is cancelled while grpc sends: the generator is closed some time later, this comes at once.
    context.add_done_callback(lambda context: call.finish(_code(context, asyncio.CancelledError())))


def _code(context: grpc.aio.ServicerContext, error: BaseException | None) -> grpc.StatusCode:
    """How it ends. `context.cancelled()` is False in a handler that is being cancelled (grpc #36193); what is
    answered to a caller who has just gone, grpc fails to send.
    """
    if isinstance(error, asyncio.CancelledError | GeneratorExit | grpc.aio.InternalError):
        left = context.time_remaining()
        late = left is not None and left < CLOCKS_APART
        return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    if error is not None and not isinstance(error, grpc.aio.AbortError):
        return grpc.StatusCode.UNKNOWN
    said = context.code()
    return said if isinstance(said, grpc.StatusCode) else _CODES.get(said or 0, grpc.StatusCode.OK)
