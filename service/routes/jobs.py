"""Jobs over HTTP: submit, list, read, cancel, and follow by events.

Refuses to judge a job itself: the spec model, `jobs.sources` and the devices decide, this only asks and
answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from jobs.devices import check_feasible
from jobs.errors import JobsError, SourceError, SubmitError, UnknownData, UnknownModel
from jobs.records import JobRecord, JobStatus
from jobs.sources import resolve_data, resolve_model
from jobs.spec import JobSpec
from service.context import Context, ServerContext
from service.problems import Refusal, RefusedField
from service.spec_errors import InvalidJson, InvalidSpec, parse_spec
from service.sse import stream_response
from service.wire import Event, EventList, Job, JobList

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
MAX_EVENT_ID = 2**63 - 1
SPEC_EXAMPLE: dict[str, Any] = {
    "model": "builtin:demo",
    "data": [{"source": "builtin:python-docs"}],
    "method": {"effort": "standard", "tokens": 400_000},
    "resources": {"gpus": 2},
}
#: The body is read by hand so that the key is checked before it and mistakes get our own pointers.
SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}, "example": SPEC_EXAMPLE}},
    }
}

AfterId = Annotated[int, Query(ge=0, le=MAX_EVENT_ID, description="Skip events up to this id.")]


async def read_spec(request: Request) -> JobSpec:
    """The spec in the request's body."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(
            "unsupported_media_type",
            f"the body is {media_type or 'of no type'}, a job spec is application/json",
            "with curl add -H 'Content-Type: application/json'",
        )
    try:
        return parse_spec(await request.body())
    except InvalidJson as error:
        raise Refusal("invalid_json", f"the body is not JSON: {error}", "see JobSpec at /openapi.json") from error
    except InvalidSpec as error:
        hint = "fields, limits and defaults are in the schema JobSpec at /openapi.json"
        raise Refusal("invalid_spec", str(error), hint, errors=error.errors) from error


def idempotency_key(
    value: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="1 to 255 visible ASCII characters, chosen by you; a repeated request with the same "
            "key and body gets the same job instead of a second one.",
        ),
    ] = None,
) -> str | None:
    """The request's idempotency key, if any."""
    if value is not None and not IDEMPOTENCY_KEY.fullmatch(value):
        raise Refusal(
            "invalid_idempotency_key",
            f"the Idempotency-Key has {len(value)} characters or some that are not visible ASCII",
            "use 1 to 255 visible ASCII characters, such as a UUID",
        )
    return value


def event_id(
    value: Annotated[
        str | None,
        Header(alias="Last-Event-ID", description="Resume a stream behind this event; wins over `after`."),
    ] = None,
) -> int | None:
    """The id a stream resumes behind, if given."""
    if value is None or value == "":
        return None
    if not value.isascii() or not value.isdecimal() or len(value) > 18:
        raise Refusal("invalid_event_id", f"Last-Event-ID {value[:40]!r} is not an event id", "send an `id:` you got")
    return int(value)


def check_job(context: ServerContext, spec: JobSpec) -> None:
    """Raises the refusal of the first source, or of the number of devices, that this server cannot serve."""
    with blaming("/model", UnknownModel):
        resolve_model(spec.model, context.policy)
    for field, sources in (("data", spec.data), ("eval", spec.eval)):
        for index, source in enumerate(sources):
            with blaming(f"/{field}/{index}/source", UnknownData):
                resolve_data(source.source, context.policy)
    if context.devices is not None:
        with blaming("/resources/gpus", SubmitError):
            check_feasible(spec, list(context.devices))


@contextmanager
def blaming(pointer: str, otherwise: type[JobsError]) -> Iterator[None]:
    """Ties a refusal to the field at `pointer`.

    A path the operating system chokes on (NUL, too long, no permission, no such home) is one that cannot be
    used: it becomes an error of the class `otherwise`.
    """
    try:
        yield
    except (SourceError, SubmitError) as error:
        raise RefusedField(pointer, error) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        refusal = otherwise(f"the path cannot be read: {reason}", "give the path of a readable file or folder")
        raise RefusedField(pointer, refusal) from error


def wire_job(context: ServerContext, record: JobRecord) -> Job:
    """The job with its number of artifacts."""
    return Job.of(record, context.store.artifact_counts([record.id])[record.id])


@router.post("", status_code=202, response_model=Job, operation_id="submit_job", openapi_extra=SPEC_BODY)
def submit_job(
    context: Context,
    response: Response,
    spec: Annotated[JobSpec, Depends(read_spec)],
    key: Annotated[str | None, Depends(idempotency_key)],
) -> Job:
    """Submits a job. It is stored when the answer comes; it starts when devices are free."""
    if key is None or context.store.submitted(spec, key) is None:  # a replay is answered though its model has gone
        check_job(context, spec)
    result = context.store.submit(spec, idempotency_key=key)
    job = wire_job(context, result.job)
    response.headers["Location"] = job.links.self
    if not result.created:
        response.headers["Idempotency-Replayed"] = "true"
    return job


@router.get("", response_model=JobList, operation_id="list_jobs")
def list_jobs(
    context: Context,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=24, description="`next_cursor` of the page before.")] = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this state.")] = None,
) -> JobList:
    """Jobs, newest first."""
    page = context.store.list_jobs(limit, cursor, status)
    counts = context.store.artifact_counts(job.id for job in page.jobs)
    return JobList(data=[Job.of(job, counts[job.id]) for job in page.jobs], next_cursor=page.next_cursor)


@router.get("/{job_id}", response_model=Job, operation_id="get_job")
def get_job(context: Context, job_id: str) -> Job:
    """One job."""
    return wire_job(context, context.store.get(job_id))


@router.post("/{job_id}/cancel", status_code=202, response_model=Job, operation_id="cancel_job")
def cancel_job(context: Context, job_id: str) -> Job:
    """Asks for the end of a job: at once while it waits, else when its ranks have stopped."""
    return wire_job(context, context.store.request_cancel(job_id))


@router.get(
    "/{job_id}/events",
    response_model=EventList,
    operation_id="job_events",
    responses={
        200: {
            "description": "A list; with `Accept: text/event-stream` a stream that ends with `event: done`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
def job_events(
    request: Request,
    context: Context,
    job_id: str,
    last_event_id: Annotated[int | None, Depends(event_id)],
    after: AfterId = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of the list; a stream has no limit.")] = 500,
) -> Any:
    """What happened to a job, as a list or as Server-Sent Events."""
    if accepts(request, "text/event-stream"):
        context.store.get(job_id)
        return stream_response(context.store, job_id, after if last_event_id is None else last_event_id)
    records = context.store.events(job_id, after, limit + 1)
    shown = records[:limit]
    return EventList(
        data=[Event.of(record) for record in shown],
        last_id=shown[-1].id if shown else after,
        has_more=len(records) > limit,
    )


def accepts(request: Request, media_type: str) -> bool:
    """Whether the Accept header names exactly this type."""
    ranges = request.headers.get("accept", "").lower().split(",")
    return any(one.partition(";")[0].strip() == media_type for one in ranges)
