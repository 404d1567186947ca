"""The JSON the server answers with: one pydantic model per object, with examples for the OpenAPI page.

Refuses to decide: it turns records of `jobs` into wire objects and knows no HTTP.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from jobs.records import ArtifactRecord, EventRecord, JobRecord, JobStatus
from jobs.training_series import SeriesQuery, TrainingSeries, TrainingStep

JOB_EXAMPLE: dict[str, Any] = {
    "id": "job_01JD5R8Z0Q4T6V9XKBOP2M3N7P",
    "object": "job",
    "name": "demo",
    "status": "running",
    "created_at": "2026-01-05T10:00:00.000Z",
    "started_at": "2026-01-05T10:00:01.000Z",
    "finished_at": None,
    "model": "builtin:demo",
    "method": "standard",
    "spec": {"model": "builtin:demo", "data": [{"source": "builtin:python-docs", "split": "all"}]},
    "progress": {
        "stage": "train",
        "step": 120,
        "steps": 400,
        "percent": 30.0,
        "eta_s": 41.5,
        "metrics": {"loss": 1.92, "flip_rate": 0.0031, "tokens_per_s": 20480.0},
    },
    "attempt": 1,
    "error": None,
    "waiting_reason": None,
    "cancel_requested": False,
    "artifacts": 0,
    "links": {
        "self": "/v1/jobs/job_01JD5R8Z0Q4T6V9XKBOP2M3N7P",
        "events": "/v1/jobs/job_01JD5R8Z0Q4T6V9XKBOP2M3N7P/events",
        "logs": "/v1/jobs/job_01JD5R8Z0Q4T6V9XKBOP2M3N7P/logs",
        "metrics": "/v1/jobs/job_01JD5R8Z0Q4T6V9XKBOP2M3N7P/metrics",
        "report": "/v1/jobs/job_01JD5R8Z0Q4T6V9XKBOP2M3N7P/report",
        "artifacts": "/v1/jobs/job_01JD5R8Z0Q4T6V9XKBOP2M3N7P/artifacts",
        "cancel": "/v1/jobs/job_01JD5R8Z0Q4T6V9XKBOP2M3N7P/cancel",
    },
}


def timestamp(seconds: float | None) -> str | None:
    """Unix seconds as RFC 3339 in UTC with milliseconds; None stays None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Progress(BaseModel):
    """How far the stage that runs now has come."""

    stage: str | None = Field(default=None, description="prepare, init, train, pack, evaluate or publish.")
    step: int | None = None
    steps: int | None = None
    percent: float | None = Field(default=None, description="0 to 100, of this stage.")
    eta_s: float | None = Field(default=None, description="Seconds until the stage ends, as estimated by rank 0.")
    metrics: dict[str, Any] = Field(default={}, description="loss, flip_rate, tokens_per_s and others.")


class Links(BaseModel):
    """Where the parts of a job are, relative to the server."""

    self: str
    events: str
    logs: str
    metrics: str
    report: str
    artifacts: str
    cancel: str

    @classmethod
    def of(cls, job_id: str) -> Links:
        """Links of one job."""
        base = f"/v1/jobs/{job_id}"
        parts = ("events", "logs", "metrics", "report", "artifacts", "cancel")
        return cls.model_validate({"self": base, **{part: f"{base}/{part}" for part in parts}})


class Job(BaseModel):
    """One binarization job."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE]})

    id: str
    object: Literal["job"] = "job"
    name: str | None
    status: JobStatus
    created_at: str | None = Field(description="RFC 3339, UTC.")
    started_at: str | None
    finished_at: str | None
    model: str | None
    method: str | None = Field(description="The effort level: quick, standard or max.")
    spec: dict[str, Any] = Field(description="The spec with every default filled in.")
    progress: Progress | None
    attempt: int = Field(description="0 before the first attempt.")
    error: dict[str, Any] | None = Field(description="Of a failed job: code, message, hint, retryable, origin.")
    waiting_reason: str | None = Field(description="Why a queued job has not started.")
    cancel_requested: bool
    artifacts: int = Field(description="Number of published files.")
    links: Links

    @classmethod
    def of(cls, record: JobRecord, artifacts: int) -> Job:
        """From the store's record and the number of its published files."""
        return cls(
            id=record.id,
            name=record.name,
            status=record.status,
            created_at=timestamp(record.created_at),
            started_at=timestamp(record.started_at),
            finished_at=timestamp(record.finished_at),
            model=record.spec.get("model"),
            method=(record.spec.get("method") or {}).get("effort"),
            spec=record.spec,
            progress=None if record.progress is None else Progress.model_validate(record.progress),
            attempt=record.attempt,
            error=record.error,
            waiting_reason=record.waiting_reason,
            cancel_requested=record.cancel_requested,
            artifacts=artifacts,
            links=Links.of(record.id),
        )


class JobList(BaseModel):
    """One page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Job]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page; null on the last one.")


class Event(BaseModel):
    """One change of one job."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": 42,
                    "job_id": JOB_EXAMPLE["id"],
                    "at": "2026-01-05T10:00:01.000Z",
                    "kind": "status",
                    "actor": "runner",
                    "data": {"from": "preparing", "to": "running"},
                }
            ]
        }
    )

    id: int = Field(description="Grows; unique over all jobs of the server.")
    job_id: str
    at: str | None
    kind: str = Field(description="status, stage, progress or note.")
    actor: str
    data: dict[str, Any]

    @classmethod
    def of(cls, record: EventRecord) -> Event:
        """From the store's record."""
        return cls(
            id=record.id,
            job_id=record.job_id,
            at=timestamp(record.at),
            kind=record.kind,
            actor=record.actor,
            data=record.data,
        )


class EventList(BaseModel):
    """Events of one job, oldest first."""

    object: Literal["list"] = "list"
    data: list[Event]
    last_id: int = Field(description="Pass as `after` to read on.")
    has_more: bool


class MetricsSeries(BaseModel):
    """The training series of one job, in rising order of steps; empty while it has not trained."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "metrics",
                    "job_id": JOB_EXAMPLE["id"],
                    "every": 64,
                    "next_since": 119,
                    "data": [
                        {"step": 64, "loss": 2.11, "flip_rate": 0.0034, "tokens_per_s": 20011.0},
                        {"step": 118, "loss": 1.92, "flip_rate": 0.0031, "tokens_per_s": 20480.0},
                    ],
                }
            ]
        }
    )

    object: Literal["metrics"] = "metrics"
    job_id: str
    every: int = Field(description="Steps shown are divisible by this; the newest is shown in any case.")
    next_since: int = Field(description="Pass as `since` to read on.")
    data: list[TrainingStep]

    @classmethod
    def of(cls, job_id: str, query: SeriesQuery, series: TrainingSeries) -> MetricsSeries:
        """From the steps that a query found."""
        following = series.steps[-1].step + 1 if series.steps else query.since
        return cls(job_id=job_id, every=series.every, next_since=following, data=list(series.steps))


class Artifact(BaseModel):
    """One published file."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "path": "model.safetensors",
                    "size": 262144,
                    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                    "url": f"/v1/jobs/{JOB_EXAMPLE['id']}/artifacts/model.safetensors",
                }
            ]
        }
    )

    path: str
    size: int = Field(description="Bytes.")
    sha256: str = Field(description="Also the ETag of the download.")
    url: str

    @classmethod
    def of(cls, record: ArtifactRecord) -> Artifact:
        """From the store's record."""
        url = f"/v1/jobs/{record.job_id}/artifacts/{quote(record.path, safe='/')}"
        return cls(path=record.path, size=record.size, sha256=record.sha256, url=url)


class ArtifactList(BaseModel):
    """Every published file of one job."""

    object: Literal["list"] = "list"
    data: list[Artifact]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str


class Readiness(BaseModel):
    """The server can take and run work; when not, the answer is a problem with the same `checks`."""

    status: Literal["ready"] = "ready"
    checks: dict[str, str] = Field(
        description="`ok` for each part that was looked at.",
        examples=[{"database": "ok", "scheduler": "ok", "disk": "ok"}],
    )


class FieldError(BaseModel):
    """One part of a request that is wrong."""

    pointer: str = Field(description="JSON pointer into the body, or `?name` for a query parameter.")
    detail: str


class Problem(BaseModel):
    """An RFC 9457 problem (`application/problem+json`): the body of every error answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:kbop:problem:invalid_spec",
                    "title": "The job spec is not valid",
                    "status": 422,
                    "detail": "/method/flip_rate: Input should be less than or equal to 0.5",
                    "instance": "/v1/jobs",
                    "code": "invalid_spec",
                    "hint": "The fields and their limits are in the schema JobSpec at /openapi.json.",
                    "request_id": "req_6f1d2c0a9b8e4f7a",
                    "errors": [
                        {
                            "pointer": "/method/flip_rate",
                            "detail": "Input should be less than or equal to 0.5",
                        }
                    ],
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="Stable name of the kind of error.")
    hint: str | None = Field(default=None, description="What to do about it.")
    request_id: str = Field(description="Also in the `X-Request-Id` header and in the server's log.")
    errors: list[FieldError] = []
