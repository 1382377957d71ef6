"""A render under way, as the client sees it."""

from collections.abc import Iterator

import grpc

from atelier.messages import Picture, Progress, assemble, errors
from atelier.v1 import render_pb2


class Rendering:
    """A render under way: iterate over its events, or over `pictures()`.

    `cancel()`, and breaking off either loop, stops the server within one denoising step.
    """

    def __init__(self, call: grpc.Call, address: str) -> None:
        self._call = call
        self._address = address
        self.summary = render_pb2.RenderSummary()
        """How it went; empty until the last event was read."""

    def cancel(self) -> None:
        """Stops the render."""
        self._call.cancel()

    def __iter__(self) -> Iterator[render_pb2.RenderResponse]:
        try:
            with errors(self._address):
                for event in self._call:
                    if event.HasField("summary"):
                        self.summary = event.summary
                    yield event
        finally:
            self._call.cancel()

    def pictures(self, progress: Progress | None = None) -> Iterator[Picture]:
        """Each picture as it is finished."""
        parts: dict[int, bytearray] = {}
        for event in self:
            if progress and event.HasField("step"):
                progress(event.step.step, event.step.steps)
            if picture := assemble(parts, event):
                yield picture
