"""Numbers over HTTP: the training series of one job, and the state of the whole server for Prometheus.

Refuses to measure: ranks wrote the series, and the rest is counted from the store at the moment it is asked for.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from jobs.layout import job_dir, training_metrics
from jobs.training_series import SeriesQuery, read_series
from service.context import Context
from service.wire import MetricsSeries

router = APIRouter(tags=["metrics"])

MAX_STEP = 10**15 - 1
MAX_STEPS_SHOWN = 5000


@router.get(
    "/v1/jobs/{job_id}/metrics",
    response_model=MetricsSeries,
    response_model_exclude_none=True,
    operation_id="job_metrics",
)
def job_metrics(
    context: Context,
    job_id: str,
    since: Annotated[int, Query(ge=0, le=MAX_STEP, description="First step, inclusive.")] = 0,
    until: Annotated[int | None, Query(ge=0, le=MAX_STEP, description="Last step, inclusive.")] = None,
    every: Annotated[int, Query(ge=1, le=MAX_STEP, description="Only steps divisible by this, and the newest.")] = 1,
    limit: Annotated[
        int, Query(ge=1, le=MAX_STEPS_SHOWN, description="`every` doubles until at most this many steps are left.")
    ] = 500,
    layers: Annotated[bool, Query(description="With flips and reversals per layer.")] = False,
) -> MetricsSeries:
    """The training series of a job: loss, flips, speed, seconds by phase and memory, step by step.

    Empty for a job that has not trained yet, or will not. The newest step is always there, whatever `every` says.
    """
    job = context.store.get(job_id)
    query = SeriesQuery(since, until, every, limit, layers)
    series = read_series(training_metrics(job_dir(context.settings.data_dir, job.id)), query)
    return MetricsSeries.of(job.id, query, series)


@router.get(
    "/metrics",
    operation_id="prometheus_metrics",
    response_class=PlainTextResponse,
    responses={200: {"description": "The Prometheus text format, version 0.0.4; docs/metrics.md lists the metrics."}},
)
def prometheus_metrics(request: Request) -> Response:
    """Jobs, devices, the progress of running jobs, and requests, in Prometheus' text format."""
    registry: CollectorRegistry = request.app.state.metrics
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
