"""All jobs at a glance as SQL: how many in which state, why they failed, what runs now, who waits longest.

Refuses to open transactions or to read events: every function works on the caller's connection, and its cost
follows the number of failed and active jobs, or an index, never the length of their history.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from jobs.records import ACTIVE, JobRecord, JobStatus
from jobs.schema import allocations, jobs, to_job


@dataclass(frozen=True)
class Overview:
    """What the store holds, at one moment.

    Attributes:
        jobs: Number of jobs in every state, zeros included.
        failures: Number of failed jobs by the code of their error.
        active: Jobs that an attempt holds, oldest first; no more than there are devices.
        devices_in_use: Devices that attempts hold.
        waiting_since: Unix seconds since when the longest waiting queued job could have started; None: none waits.
    """

    jobs: dict[JobStatus, int]
    failures: dict[str, int]
    active: tuple[JobRecord, ...]
    devices_in_use: int
    waiting_since: float | None


def overview(connection: Connection) -> Overview:
    """Everything in one consistent view."""
    active = select(jobs).where(jobs.c.status.in_(sorted(ACTIVE))).order_by(jobs.c.seq)
    # A job between two attempts waits from the end of its pause, not from its submission.
    since = select(func.min(func.coalesce(jobs.c.not_before, jobs.c.created_at)))
    return Overview(
        jobs=_counts(connection),
        failures=_failures(connection),
        active=tuple(to_job(row) for row in connection.execute(active).mappings()),
        devices_in_use=connection.execute(select(func.count()).select_from(allocations)).scalar_one(),
        waiting_since=connection.execute(since.where(jobs.c.status == JobStatus.QUEUED)).scalar_one(),
    )


def _counts(connection: Connection) -> dict[JobStatus, int]:
    query = select(jobs.c.status, func.count()).group_by(jobs.c.status)
    found = {row[0]: int(row[1]) for row in connection.execute(query)}
    return {status: found.get(status, 0) for status in JobStatus}


def _failures(connection: Connection) -> dict[str, int]:
    code = func.coalesce(jobs.c.error["code"].as_string(), "unknown").label("code")
    query = select(code, func.count()).where(jobs.c.status == JobStatus.FAILED).group_by("code")
    return {row[0]: int(row[1]) for row in connection.execute(query)}
