"""JobService: durable renders over gRPC."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from atelier.v1 import jobs_pb2, jobs_pb2_grpc, render_pb2
from registry import jobs as kept
from registry.catalog import Catalog
from registry.jobs import Job, JobEvent, JobImage
from server import convert, outbox
from server.auth import check_owner
from server.calls import current
from server.errors import BadRequest, answering
from server.guides import Sent
from server.rendering import Renderings, png_of
from server.repeats import check_id, fingerprint
from server.runner import JobRunner, Progress

PAGE, PAGE_LIMIT = 100, 1000
STATES = {
    kept.QUEUED: jobs_pb2.JOB_STATE_QUEUED,
    kept.RUNNING: jobs_pb2.JOB_STATE_RUNNING,
    kept.DONE: jobs_pb2.JOB_STATE_DONE,
    kept.FAILED: jobs_pb2.JOB_STATE_FAILED,
    kept.CANCELLED: jobs_pb2.JOB_STATE_CANCELLED,
}


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Keeps, lists, watches and ends jobs."""

    def __init__(self, catalog: Catalog, renderings: Renderings, runner: JobRunner) -> None:
        self._catalog, self._jobs = catalog, catalog.jobs
        self._renderings, self._runner = renderings, runner

    async def CreateJob(
        self, request: jobs_pb2.CreateJobRequest, context: grpc.aio.ServicerContext
    ) -> jobs_pb2.Job:
        async with answering(context):
            check_id(request.request_id)
            if request.request.request_id:
                raise BadRequest(
                    "a job's request has no request_id of its own; say it in the job's", field="request"
                )
            creator, told = convert.actor(context), fingerprint(request.request)

            def create() -> Job:
                sent = Sent.of(request.request)
                order = self._renderings.kept(self._renderings.order(request.request))
                self._renderings.resumed(order, sent=sent)  # or it would fail when nobody looks
                return self._jobs.create(
                    order,
                    creator=creator,
                    priority=request.request.priority,
                    request_id=request.request_id,
                    fingerprint=told,
                    inputs=sent.files(),
                )

            async def created() -> Job:
                found = await asyncio.to_thread(create)
                current().about(job=found.name)
                self._runner.add(found)
                return found

            if known := await asyncio.to_thread(self._jobs.repeated, creator, request.request_id, told):
                return _job(known)  # also when there is no room for another
            self._runner.check_room()
            return _job(await asyncio.shield(asyncio.create_task(created())))  # who hangs up has a job

    async def GetJob(
        self, request: jobs_pb2.GetJobRequest, context: grpc.aio.ServicerContext
    ) -> jobs_pb2.Job:
        async with answering(context):
            return _job(await asyncio.to_thread(self._jobs.get, request.name))

    async def ListJobs(
        self, request: jobs_pb2.ListJobsRequest, context: grpc.aio.ServicerContext
    ) -> jobs_pb2.ListJobsResponse:
        async with answering(context):
            if not 0 <= request.page_size <= PAGE_LIMIT:
                raise BadRequest(
                    f"page_size {request.page_size} is not within 0 and {PAGE_LIMIT}", field="page_size"
                )
            states = {number: state for state, number in STATES.items()} | {0: ""}
            if request.state not in states:
                raise BadRequest(f"state {request.state} is none", field="state")
            limit = request.page_size or PAGE
            found = await asyncio.to_thread(
                self._jobs.newest,
                below=_number_in(request.page_token),
                limit=limit + 1,
                state=states[request.state],
                creator=request.creator,
            )
            token = str(found[limit - 1].number) if len(found) > limit else ""
            return jobs_pb2.ListJobsResponse(jobs=map(_job, found[:limit]), next_page_token=token)

    async def CancelJob(
        self, request: jobs_pb2.CancelJobRequest, context: grpc.aio.ServicerContext
    ) -> jobs_pb2.Job:
        async with answering(context):
            await self._check_owner(request.name)
            return _job(await asyncio.shield(asyncio.create_task(self._runner.cancel(request.name))))

    async def DeleteJob(
        self, request: jobs_pb2.DeleteJobRequest, context: grpc.aio.ServicerContext
    ) -> jobs_pb2.DeleteJobResponse:
        async with answering(context):
            await self._check_owner(request.name)
            await asyncio.shield(asyncio.create_task(self._runner.delete(request.name)))
            return jobs_pb2.DeleteJobResponse()

    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[jobs_pb2.JobEvent]:
        async with answering(context):
            job = await asyncio.to_thread(self._jobs.get, request.name)
            steps = json.loads(job.order["manifest"])["steps"]
            await context.send_initial_metadata((("atelier-watching", "1"),))  # a client knows it was here
            async with aclosing(self._runner.watch(request.name, request.after_sequence)) as events:
                async for sequence, event in events:
                    yield await _event(sequence, event, steps)

    async def GetJobImage(
        self, request: jobs_pb2.GetJobImageRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[jobs_pb2.GetJobImageResponse]:
        async with answering(context):
            found = await asyncio.to_thread(self._jobs.image, request.name, request.image)
            chunks = self._catalog.blobs.chunks(found.digest)
            while data := await asyncio.to_thread(next, chunks, b""):
                yield jobs_pb2.GetJobImageResponse(data=data)

    async def _check_owner(self, name: str) -> None:
        job = await asyncio.to_thread(self._jobs.get, name)
        check_owner(job.creator, f"the job {name}")


def _number_in(token: str) -> int | None:
    if not token:
        return None
    if not (token.isascii() and token.isdecimal() and len(token) < 19):
        raise BadRequest("page_token is not one that this server gave out", field="page_token")
    return int(token)


def _image(found: JobImage) -> jobs_pb2.JobImage:
    return jobs_pb2.JobImage(image=found.image, digest=found.digest, size_bytes=found.size_bytes)


def _job(found: Job) -> jobs_pb2.Job:
    told = found.told
    message = jobs_pb2.Job(
        name=found.name,
        state=STATES[found.state],
        creator=found.creator,
        count=found.order["count"],
        images=map(_image, found.images),
        manifest_json=found.order["manifest"],
        priority=found.priority,
        sequence=found.sequence,
        error_code=told.get("error_code", ""),
        error=told.get("error", ""),
        warnings=told.get("warnings", ()),
        seconds=told.get("seconds", {}),
    )
    message.create_time.FromDatetime(found.created_at)
    if found.ended_at:
        message.end_time.FromDatetime(found.ended_at)
    if found.expires_at:
        message.expire_time.FromDatetime(found.expires_at)
    return message


async def _event(sequence: int, event: JobEvent | Progress, steps: int) -> jobs_pb2.JobEvent:
    message = jobs_pb2.JobEvent(sequence=sequence)
    match event:
        case JobEvent(at=at, detail={"state": state}):
            message.time.FromDatetime(at)
            message.state = STATES[state]
        case JobEvent(at=at, detail=image):
            message.time.FromDatetime(at)
            message.image.CopyFrom(_image(JobImage(**image)))
        case outbox.Step(which, step):
            message.time.GetCurrentTime()
            message.step.CopyFrom(render_pb2.StepProgress(image=which, step=step, steps=steps))
        case outbox.Preview(which, step, picture):
            message.time.GetCurrentTime()
            png = await asyncio.to_thread(png_of, picture)
            message.preview.CopyFrom(render_pb2.Preview(image=which, step=step, png=png))
    return message
