"""What is asked of the server and what of the answer is told, for both clients: a request and a pick."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypedDict, TypeVar, Unpack

from google.protobuf.message import Message

from atelier.messages import HubProgress, Progress, Stack, render_request, weighted
from atelier.v1 import catalog_pb2, compose_pb2, engine_pb2, hub_pb2, jobs_pb2, render_pb2

T = TypeVar("T")
Tried = Callable[[render_pb2.Trial], None]
LeftOut = Callable[[Sequence[str]], None]
PICTURES = 24
"""Of a calibration, where nobody says how many."""
LONGEST = 1e9
"""Seconds: gRPC takes a deadline that is much further away for one that has passed."""


class Trials(TypedDict, total=False):
    """What pictures that are rendered to look at are made of; `size` in pixels a side, `base` by name."""

    prompts: Sequence[str]
    pictures: int | None
    steps: int | None
    base: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Unary(Generic[T]):
    """A call with one answer: `rpc` of the stub `service` (catalog, compose, engine, hub, jobs, render)."""

    service: str
    rpc: str
    request: Message
    pick: Callable[[Any], T] = lambda answer: answer


def patience(timeout: float | None) -> float | None:
    """A call's timeout, None for none. Raises ValueError for what is no number of seconds above 0."""
    if timeout is not None and not 0 < timeout <= LONGEST:
        raise ValueError(f"the timeout {timeout:g} is not above 0 and up to {LONGEST:g} seconds")
    return timeout


def replay(
    png: bytes,
    *,
    image: bytes = b"",
    mask: bytes = b"",
    controls: Sequence[bytes] = (),
    references: Sequence[bytes] = (),
) -> render_pb2.ReplayRequest:
    return render_pb2.ReplayRequest(
        png=png, image=image, mask=mask, control_images=controls, reference_images=references
    )


def get_upload(request_id: str) -> Unary[int]:
    request = catalog_pb2.GetUploadRequest(request_id=request_id)
    return Unary("catalog", "GetUpload", request, lambda answer: answer.offset)


def get(ref: str) -> Unary[catalog_pb2.GetVersionResponse]:
    return Unary("catalog", "GetVersion", catalog_pb2.GetVersionRequest(ref=ref))


def page(request: catalog_pb2.ListAssetsRequest) -> Unary[catalog_pb2.ListAssetsResponse]:
    return Unary("catalog", "ListAssets", request)


def history(name: str) -> Unary[Sequence[catalog_pb2.Version]]:
    request = catalog_pb2.ListVersionsRequest(name=name)
    return Unary("catalog", "ListVersions", request, lambda answer: list(answer.versions))


def set_alias(
    name: str, alias: str, number: int, expected: int | None
) -> Unary[catalog_pb2.SetAliasResponse]:
    request = catalog_pb2.SetAliasRequest(name=name, alias=alias, number=number, expected_number=expected)
    return Unary("catalog", "SetAlias", request)


def delete(ref: str) -> Unary[catalog_pb2.Version]:
    request = catalog_pb2.DeleteVersionRequest(ref=ref)
    return Unary("catalog", "DeleteVersion", request, lambda answer: answer.version)


def undelete(ref: str) -> Unary[catalog_pb2.Version]:
    request = catalog_pb2.UndeleteVersionRequest(ref=ref)
    return Unary("catalog", "UndeleteVersion", request, lambda answer: answer.version)


def collect_garbage(
    dry_run: bool, retention: timedelta, grace: timedelta
) -> Unary[catalog_pb2.CollectGarbageResponse]:
    request = catalog_pb2.CollectGarbageRequest(dry_run=dry_run, retention=retention, grace=grace)
    return Unary("catalog", "CollectGarbage", request)


def set_card(ref: str, card: bytes, expected: str | None) -> Unary[catalog_pb2.SetCardResponse]:
    request = catalog_pb2.SetCardRequest(ref=ref, card=card, expected_card_digest=expected)
    return Unary("catalog", "SetCard", request)


def cards(ref: str) -> Unary[Sequence[catalog_pb2.CardRevision]]:
    request = catalog_pb2.ListCardsRequest(ref=ref)
    return Unary("catalog", "ListCards", request, lambda answer: answer.revisions)


def add_preview(ref: str, image: bytes, caption: str) -> Unary[catalog_pb2.PreviewImage]:
    request = catalog_pb2.AddPreviewRequest(ref=ref, image=image, caption=caption)
    return Unary("catalog", "AddPreview", request, lambda answer: answer.preview)


def remove_preview(ref: str, digest: str) -> Unary[Sequence[catalog_pb2.PreviewImage]]:
    request = catalog_pb2.RemovePreviewRequest(ref=ref, digest=digest)
    return Unary("catalog", "RemovePreview", request, lambda answer: answer.previews)


def preview(ref: str, digest: str) -> Unary[bytes]:
    request = catalog_pb2.GetPreviewRequest(ref=ref, digest=digest)
    return Unary("catalog", "GetPreview", request, lambda answer: answer.png)


def similar(ref: str, at_least: float | None) -> Unary[Sequence[catalog_pb2.Similar]]:
    request = compose_pb2.FindSimilarRequest(ref=ref, at_least=at_least)
    return Unary("compose", "FindSimilar", request, lambda answer: answer.similar)


def merge(
    stack: Stack, name: str, method: compose_pb2.Method | None, alias: str, base: str
) -> Unary[compose_pb2.MergeResponse]:
    request = compose_pb2.MergeRequest(
        stack=weighted(stack), method=method, name=name, alias=alias, base=base
    )
    return Unary("compose", "Merge", request)


def inspect(stack: Stack, **told: Any) -> Unary[compose_pb2.InspectStackResponse]:
    request = compose_pb2.InspectStackRequest(stack=weighted(stack), **told)
    return Unary("compose", "InspectStack", request)


def remake(ref: str) -> Unary[compose_pb2.RemakeResponse]:
    return Unary("compose", "Remake", compose_pb2.RemakeRequest(ref=ref))


def save_stack(stack: Stack, **told: Any) -> Unary[compose_pb2.SaveStackResponse]:
    return Unary("compose", "SaveStack", compose_pb2.SaveStackRequest(stack=weighted(stack), **told))


def compare(before: str, after: str) -> Unary[compose_pb2.CompareVersionsResponse]:
    request = compose_pb2.CompareVersionsRequest(before=before, after=after)
    return Unary("compose", "CompareVersions", request)


def methods() -> Unary[Sequence[compose_pb2.MethodInfo]]:
    request = compose_pb2.ListMethodsRequest()
    return Unary("compose", "ListMethods", request, lambda answer: list(answer.methods))


def bases() -> Unary[Sequence[render_pb2.Base]]:
    request = render_pb2.ListBasesRequest()
    return Unary("render", "ListBases", request, lambda answer: list(answer.bases))


def create_job(prompt: str, request_id: str, settings: Mapping[str, Any]) -> Unary[jobs_pb2.Job]:
    request = jobs_pb2.CreateJobRequest(request=render_request(prompt, **settings), request_id=request_id)
    return Unary("jobs", "CreateJob", request)


def get_job(name: str) -> Unary[jobs_pb2.Job]:
    return Unary("jobs", "GetJob", jobs_pb2.GetJobRequest(name=name))


def job_page(state: str, creator: str, token: str) -> Unary[jobs_pb2.ListJobsResponse]:
    """A page of jobs. Raises ValueError for a state that is none."""
    wanted = f"JOB_STATE_{(state or 'unspecified').upper()}"
    request = jobs_pb2.ListJobsRequest(state=wanted, creator=creator, page_token=token)
    return Unary("jobs", "ListJobs", request)


def cancel_job(name: str) -> Unary[jobs_pb2.Job]:
    return Unary("jobs", "CancelJob", jobs_pb2.CancelJobRequest(name=name))


def delete_job(name: str) -> Unary[None]:
    return Unary("jobs", "DeleteJob", jobs_pb2.DeleteJobRequest(name=name), lambda answer: None)


def status() -> Unary[engine_pb2.Status]:
    return Unary("engine", "GetStatus", engine_pb2.GetStatusRequest())


def save_as(ref: str, layout: str) -> compose_pb2.ExportAdapterRequest:
    return compose_pb2.ExportAdapterRequest(ref=ref, format=layout)


def calibrate(ref: str, again: bool, **told: Unpack[Trials]) -> render_pb2.CalibrateRequest:
    return render_pb2.CalibrateRequest(ref=ref, again=again, **told)


def calibrated(
    event: render_pb2.CalibrateResponse, pictures: int | None, progress: Progress | None
) -> render_pb2.CalibrateSummary | None:
    """The last event's summary; progress is told on the way."""
    if event.HasField("step") and progress:
        steps = event.step.steps
        progress(event.step.image * steps + event.step.step, (pictures or PICTURES) * steps)
    return event.summary if event.HasField("summary") else None


def tune(stack: Stack, weights: bool, **told: Unpack[Trials]) -> render_pb2.TuneRequest:
    return render_pb2.TuneRequest(stack=weighted(stack), weights=weights, **told)


def tuned(event: render_pb2.TuneResponse, tried: Tried | None) -> render_pb2.TuneSummary | None:
    """The last event's summary; every trial is told on the way."""
    if event.HasField("trial") and tried:
        tried(event.trial)
    return event.summary if event.HasField("summary") else None


def hub_push(ref: str, **told: Any) -> hub_pb2.PushRequest:
    return hub_pb2.PushRequest(ref=ref, **told)


def hub_pull(repo: str, **told: Any) -> hub_pb2.PullRequest:
    return hub_pb2.PullRequest(repo=repo, **told)


def hub_sync(names: Sequence[str], direction: str, keep: str, **told: Any) -> hub_pb2.SyncRequest:
    """Raises ValueError for a direction or a choice that there is not."""
    way = "UNSPECIFIED" if direction == "both" else direction.upper()
    return hub_pb2.SyncRequest(
        names=names,
        direction=f"SYNC_DIRECTION_{way}",
        keep=f"SYNC_KEEP_{keep.upper() or 'UNSPECIFIED'}",
        **told,
    )


def hub_status(names: Sequence[str]) -> Unary[hub_pb2.StatusResponse]:
    return Unary("hub", "Status", hub_pb2.StatusRequest(names=names))


def hub_told(event: Any, field: str, told: HubProgress | None) -> Any:
    """What an event carries in `field`, None for another; progress is told on the way."""
    if event.HasField("step") and told:
        told(event.step)
    return getattr(event, field) if event.HasField(field) else None
