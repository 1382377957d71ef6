"""`atelier job …`: renders that are kept by the server, and outlive hanging up and its restart."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table

from atelier.client import Client
from atelier.console import (
    CONFLICT,
    INVALID,
    USAGE,
    AsJson,
    Energy,
    MethodName,
    Out,
    Rank,
    Settings,
    StackOption,
    check_picture,
    command,
    fail,
    how,
    jobs,
    out,
    pairs,
    picture,
    print_json,
    print_line,
    progress,
    size_of,
)
from atelier.picturing import (
    BaseName,
    Batch,
    Count,
    Guidance,
    Image,
    Mask,
    Negative,
    Priority,
    Prompt,
    SchedulerName,
    Seed,
    Size,
    Steps,
    Strength,
    When,
    check_prompt,
    schedules,
    scheduling,
)
from atelier.steering import Controls, References, steered
from atelier.v1 import jobs_pb2

STATES = {number: name.removeprefix("JOB_STATE_").lower() for name, number in jobs_pb2.JobState.items()}
Name = Annotated[str, typer.Argument(help="As `atelier job create` said.")]
of_jobs = partial(command, group=jobs)


@of_jobs
def job_create(
    prompt: Prompt = "",
    stack: StackOption = "",
    method_name: MethodName = "naive",
    rank: Rank = None,
    energy: Energy = None,
    settings: Settings = [],  # noqa: B006
    when: When = [],  # noqa: B006
    negative: Negative = "",
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = "",
    count: Count = None,
    batch: Batch = None,
    scheduler: SchedulerName = "",
    image: Image = None,
    mask: Mask = None,
    strength: Strength = None,
    control: Controls = [],  # noqa: B006
    reference: References = [],  # noqa: B006
    base: BaseName = "",
    priority: Priority = None,
    request_id: Annotated[str, typer.Option(help="The same again under it is the same job.")] = "",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print its name alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep a render as a job: what it depends on is decided now, and it is done whoever hangs up."""
    check_prompt(prompt, stack)
    width, height = size_of(size)
    merging = how(method_name, rank, energy, settings)
    with Client() as client:
        job = client.create_job(
            prompt,
            request_id=request_id,
            stack=pairs(stack),
            method=merging,
            negative_prompt=negative,
            seed=seed,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            count=count,
            batch=batch,
            **scheduling(scheduler),
            image=picture(image) if image else b"",
            mask=picture(mask) if mask else b"",
            strength=strength,
            base=base,
            priority=priority,
            schedules=schedules(when, dict(pairs(stack))),
            **steered(control, reference),
        )
    if as_json:
        print_json(job)
    elif quiet:
        print(job.name)
    else:
        fetch = f"atelier job fetch {job.name} --wait"
        print(f"{job.name} is {STATES[job.state]}; `{fetch}` fetches its pictures")


@of_jobs
def job_list(
    state: Annotated[str, typer.Option(help="queued, running, done, failed or cancelled.")] = "",
    creator: Annotated[str, typer.Option(help="Who made it.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """The jobs that the server keeps, the newest first."""
    if state and state not in list(STATES.values())[1:]:
        raise fail(f"{state!r} is no state; there are {', '.join(list(STATES.values())[1:])}", USAGE)
    with Client() as client:
        found = [job for job, _ in zip(client.jobs(state=state, creator=creator), range(limit), strict=False)]
    if as_json:
        print_json(*found, many=True)
        return
    if not found:
        print("no job answers that; `atelier job create PROMPT` makes one")
        return
    table = Table("job", "state", "pictures", "by", "made", "prompt", box=None)
    for job in found:
        table.add_row(
            job.name,
            STATES[job.state],
            f"{len(job.images)} of {job.count}",
            job.creator,
            _time(job.create_time),
            _prompt(job)[:60],
        )
    out.print(table)


@of_jobs
def job_show(name: Name, as_json: AsJson = False) -> None:
    """One job as it stands."""
    with Client() as client:
        job = client.get_job(name)
    if as_json:
        print_json(job)
        return
    table = Table(show_header=False, box=None)
    table.add_row("job", f"{job.name} by {job.creator or 'nobody'}, {_time(job.create_time)}")
    table.add_row("state", STATES[job.state] + (f": {job.error}" if job.error else ""))
    table.add_row("pictures", f"{len(job.images)} of {job.count}")
    table.add_row("prompt", _prompt(job))
    if job.HasField("end_time"):
        table.add_row("over", f"{_time(job.end_time)}, kept until {_time(job.expire_time)}")
    for note in job.warnings:
        table.add_row("note", note)
    out.print(table)


@of_jobs
def job_watch(
    name: Name,
    after: Annotated[int, typer.Option(min=0, help="The number of the last event you have seen.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Print what happens to a job until it is over; --json prints one object a line."""
    with Client() as client, progress(name, unit="steps") as told:
        for event in client.watch_job(name, after):
            if as_json:
                print_line(event)
            elif event.HasField("step"):
                told(event.step.step, event.step.steps)
            elif event.HasField("image"):
                print(f"{event.sequence}  picture {event.image.image + 1}, {event.image.digest}", flush=True)
            elif event.HasField("state"):
                print(f"{event.sequence}  {STATES[event.state]}", flush=True)


@of_jobs
def job_cancel(name: Name, as_json: AsJson = False) -> None:
    """Call a job off; its finished pictures stay."""
    with Client() as client:
        job = client.cancel_job(name)
    if as_json:
        print_json(job)
    else:
        print(f"{job.name} is {STATES[job.state]}, with {len(job.images)} of {job.count} pictures")


@of_jobs
def job_delete(name: Name) -> None:
    """Forget a job and its pictures."""
    with Client() as client:
        client.delete_job(name)
    print(f"{name} is forgotten")


@of_jobs
def job_fetch(
    name: Name,
    output: Out = Path("atelier.png"),
    wait: Annotated[bool, typer.Option("--wait", help="Until it is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a job's finished pictures to files; several are numbered."""
    check_picture(output)
    with Client() as client:
        if wait:
            with progress(name, unit="steps") as told:
                for event in client.watch_job(name):
                    if event.HasField("step"):
                        told(event.step.step, event.step.steps)
        job, files = client.get_job(name), []
        for image in job.images:
            path = output.with_stem(f"{output.stem}-{image.image + 1}") if job.count > 1 else output
            path.write_bytes(client.job_image(name, image.image))
            files.append(str(path))
    if as_json:
        print(json.dumps({"state": STATES[job.state], "files": files}, indent=2))
    else:
        for file in files:
            print(file)
    for note in job.warnings:
        print(f"note: {note}", file=sys.stderr)
    if len(job.images) < job.count:
        over = job.HasField("end_time")
        more = job.error or f"{len(job.images)} of {job.count} pictures" + ("" if over else "; --wait waits")
        raise fail(f"{name} is {STATES[job.state]}: {more}", INVALID if over else CONFLICT)


def _prompt(job: jobs_pb2.Job) -> str:
    return str(json.loads(job.manifest_json)["prompt"])


def _time(moment: Timestamp) -> str:
    return moment.ToDatetime().strftime("%Y-%m-%d %H:%M")
