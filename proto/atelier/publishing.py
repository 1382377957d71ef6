"""What both clients do with Hubs: `Client` and `AsyncClient` have these calls, too."""

from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from typing import Any, TypeVar

from atelier import calls
from atelier.messages import HubProgress, errors
from atelier.v1 import hub_pb2

T = TypeVar("T")


class Publishing:
    """Of `Client`."""

    address: str
    _hub: Any

    def _call(self) -> dict[str, Any]:
        raise NotImplementedError

    def _ask(self, asked: calls.Unary[T]) -> T:
        raise NotImplementedError

    def hub_push(
        self,
        ref: str,
        *,
        repo: str = "",
        private: bool = False,
        strip: bool | None = None,
        dry_run: bool = False,
        sweep: bool = False,
        relink: bool = False,
        hub: str = "",
        told: HubProgress | None = None,
    ) -> hub_pb2.PushSummary:
        """Publishes a version in a repository, ORG/NAME; left out: the one that the asset has, and to have
        another from now on takes `relink`. With `sweep` it is rendered in its strengths first, and shown so.
        """
        request = calls.hub_push(
            ref,
            repo=repo,
            private=private,
            strip=strip,
            dry_run=dry_run,
            sweep=sweep,
            relink=relink,
            hub=hub,
        )
        summary = None
        with errors(self.address):
            for event in self._hub.Push(request, **self._call()):
                summary = calls.hub_told(event, "summary", told)
        return summary or hub_pb2.PushSummary()

    def hub_pull(
        self,
        repo: str,
        *,
        revision: str = "",
        name: str = "",
        file: str = "",
        without_card: bool = False,
        hub: str = "",
        told: HubProgress | None = None,
    ) -> hub_pb2.PullSummary:
        """Takes a version from a repository, as the next of `name`, which follows the head of `main` then."""
        request = calls.hub_pull(
            repo, revision=revision, name=name, file=file, without_card=without_card, hub=hub
        )
        summary = None
        with errors(self.address):
            for event in self._hub.Pull(request, **self._call()):
                summary = calls.hub_told(event, "summary", told)
        return summary or hub_pb2.PullSummary()

    def hub_sync(
        self,
        names: Sequence[str] = (),
        *,
        direction: str = "both",
        keep: str = "",
        delete: bool = False,
        dry_run: bool = False,
        hub: str = "",
        told: HubProgress | None = None,
    ) -> Iterator[hub_pb2.SyncOutcome]:
        """Brings assets (all that are published) and their repositories together; how it went with each, as
        it is done. `direction` is both, push or pull; `keep` is ours, theirs or both. Leaving the loop ends
        it. Raises ValueError for another.
        """
        request = calls.hub_sync(names, direction, keep, delete=delete, dry_run=dry_run, hub=hub)
        call = self._hub.Sync(request, **self._call())
        try:
            with errors(self.address):
                for event in call:
                    if outcome := calls.hub_told(event, "outcome", told):
                        yield outcome
        finally:
            call.cancel()

    def hub_status(self, names: Sequence[str] = ()) -> hub_pb2.StatusResponse:
        """Which assets have a repository, and what both held when they were last the same."""
        return self._ask(calls.hub_status(names))


class AsyncPublishing:
    """Of `AsyncClient`."""

    address: str
    _hub: Any

    def _call(self) -> dict[str, Any]:
        raise NotImplementedError

    def _ask(self, asked: calls.Unary[T]) -> Awaitable[T]:
        raise NotImplementedError

    async def hub_push(
        self,
        ref: str,
        *,
        repo: str = "",
        private: bool = False,
        strip: bool | None = None,
        dry_run: bool = False,
        sweep: bool = False,
        relink: bool = False,
        hub: str = "",
        told: HubProgress | None = None,
    ) -> hub_pb2.PushSummary:
        """Publishes a version in a repository, ORG/NAME; left out: the one that the asset has, and to have
        another from now on takes `relink`. With `sweep` it is rendered in its strengths first, and shown so.
        """
        request = calls.hub_push(
            ref,
            repo=repo,
            private=private,
            strip=strip,
            dry_run=dry_run,
            sweep=sweep,
            relink=relink,
            hub=hub,
        )
        summary = None
        with errors(self.address):
            async for event in self._hub.Push(request, **self._call()):
                summary = calls.hub_told(event, "summary", told)
        return summary or hub_pb2.PushSummary()

    async def hub_pull(
        self,
        repo: str,
        *,
        revision: str = "",
        name: str = "",
        file: str = "",
        without_card: bool = False,
        hub: str = "",
        told: HubProgress | None = None,
    ) -> hub_pb2.PullSummary:
        """Takes a version from a repository, as the next of `name`, which follows the head of `main` then."""
        request = calls.hub_pull(
            repo, revision=revision, name=name, file=file, without_card=without_card, hub=hub
        )
        summary = None
        with errors(self.address):
            async for event in self._hub.Pull(request, **self._call()):
                summary = calls.hub_told(event, "summary", told)
        return summary or hub_pb2.PullSummary()

    async def hub_sync(
        self,
        names: Sequence[str] = (),
        *,
        direction: str = "both",
        keep: str = "",
        delete: bool = False,
        dry_run: bool = False,
        hub: str = "",
        told: HubProgress | None = None,
    ) -> AsyncIterator[hub_pb2.SyncOutcome]:
        """Brings assets (all that are published) and their repositories together; how it went with each, as
        it is done. `direction` is both, push or pull; `keep` is ours, theirs or both. Leaving the loop ends
        it. Raises ValueError for another.
        """
        request = calls.hub_sync(names, direction, keep, delete=delete, dry_run=dry_run, hub=hub)
        call = self._hub.Sync(request, **self._call())
        try:
            with errors(self.address):
                async for event in call:
                    if outcome := calls.hub_told(event, "outcome", told):
                        yield outcome
        finally:
            call.cancel()

    async def hub_status(self, names: Sequence[str] = ()) -> hub_pb2.StatusResponse:
        """Which assets have a repository, and what both held when they were last the same."""
        return await self._ask(calls.hub_status(names))
