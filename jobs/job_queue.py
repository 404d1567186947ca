"""The queue's rules as SQL: who runs next, leases and their tokens, the device ledger, how attempts end.

Refuses to open transactions or read a clock: every function works on the caller's connection, at the caller's
`now` (unix seconds), and either does all of its change or raises.

A lease is a token in the job's row. Each write of its holder begins by finding the row *with that token*;
when it is not there, the attempt was taken away in the meantime and the writer must stop (LeaseLost).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, delete, func, insert, or_, select, update

from jobs.errors import IllegalTransition, LeaseLost
from jobs.nodes import choose_devices
from jobs.records import (
    OUT_OF_MEMORY,
    TRANSITIONS,
    ArtifactRecord,
    Failure,
    JobRecord,
    JobStatus,
    Lease,
    LeaseView,
    NewEvent,
)
from jobs.schema import allocations, artifacts, attempts, events, jobs, to_lease

#: Attempts that may run out of memory before that counts: halving the largest micro-batch (4096) gives 1 after 12.
MOST_HALVINGS = 12

_NO_LEASE: dict[str, Any] = {"lease_owner": None, "lease_token": None, "lease_expires_at": None}


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended; see `jobs.store.Store.finish`."""

    status: JobStatus
    error: dict[str, Any] | None = None
    artifacts: tuple[ArtifactRecord, ...] = ()
    retry_at: float | None = None
    actor: str = "runner"
    reason: str = ""
    counts: bool = True


def record_status(
    connection: Connection,
    job_id: str,
    old: JobStatus | None,
    new: JobStatus,
    now: float,
    actor: str,
    reason: str,
) -> None:
    """Write the event of a status change, refusing one that the table of transitions does not have."""
    if old is not None and new not in TRANSITIONS[old]:
        raise IllegalTransition(job_id, old, new)
    data = {"from": old, "to": new, "reason": reason}
    row = {"job_id": job_id, "at": now, "kind": "status", "actor": actor, "data": data}
    connection.execute(insert(events), row)


# Claiming


def claim(connection: Connection, owner: str, devices: Sequence[str], now: float, lease_s: float) -> Lease | None:
    """Start an attempt of the first job in line; see `jobs.store.Store.claim`.

    The line is strict: behind a job that waits for devices nobody is let past, or a large job could starve.
    Jobs that could not start anyway (too large for this server, or waiting for their retry) hold nobody up.
    """
    taken = set(connection.execute(select(allocations.c.device)).scalars())
    free = [device for device in devices if device not in taken]
    ahead: RowMapping | None = None
    for row in connection.execute(_waiting()).mappings().all():
        needed = row["devices_needed"]
        if needed > len(devices):
            reason = f"needs {_devices(needed)}, this server has {len(devices)}"
        elif row["not_before"] is not None and row["not_before"] > now:
            reason = f"attempt {row['attempt']} ended early, the next one follows {_clock_time(row['not_before'])}"
        elif ahead is not None:
            reason = f"behind {ahead['id']}, which needs {_devices(ahead['devices_needed'])}"
        elif needed > len(free):
            reason = f"needs {_devices(needed)}, {len(free)} of {len(devices)} free"
            ahead = row
        else:
            return _start_attempt(connection, row, owner, choose_devices(free, needed), now, lease_s)
        if reason != row["waiting_reason"]:
            connection.execute(update(jobs).where(jobs.c.id == row["id"]).values(waiting_reason=reason))
    return None


def _waiting() -> Select[Any]:
    columns = (
        jobs.c.id,
        jobs.c.attempt,
        jobs.c.devices_needed,
        jobs.c.not_before,
        jobs.c.waiting_reason,
        jobs.c.started_at,
    )
    query = select(*columns).where(jobs.c.status == JobStatus.QUEUED)
    return query.order_by(jobs.c.priority.desc(), jobs.c.seq)


def _start_attempt(
    connection: Connection, row: RowMapping, owner: str, devices: Sequence[str], now: float, lease_s: float
) -> Lease:
    lease = Lease(row["id"], row["attempt"] + 1, owner, secrets.token_hex(16), now + lease_s, tuple(devices))
    reason = f"attempt {lease.attempt} on {', '.join(devices)}"
    record_status(connection, lease.job_id, JobStatus.QUEUED, JobStatus.PREPARING, now, "scheduler", reason)
    changed = {
        "status": JobStatus.PREPARING,
        "attempt": lease.attempt,
        "started_at": now if row["started_at"] is None else row["started_at"],
        "waiting_reason": None,
        "not_before": None,
        "lease_owner": owner,
        "lease_token": lease.token,
        "lease_expires_at": lease.expires_at,
    }
    connection.execute(update(jobs).where(jobs.c.id == lease.job_id).values(changed))
    attempt = {
        "job_id": lease.job_id,
        "number": lease.attempt,
        "owner": owner,
        "devices": list(devices),
        "started_at": now,
        "counts": True,
    }
    connection.execute(insert(attempts), attempt)
    held = [{"device": d, "job_id": lease.job_id, "attempt": lease.attempt, "at": now} for d in devices]
    connection.execute(insert(allocations), held)
    return lease


def hold(connection: Connection, reason: str) -> None:
    """Give every waiting job the same reason; rows that have it already are left alone."""
    stale = or_(jobs.c.waiting_reason.is_(None), jobs.c.waiting_reason != reason)
    connection.execute(update(jobs).where(jobs.c.status == JobStatus.QUEUED, stale).values(waiting_reason=reason))


def cancel(connection: Connection, job: JobRecord, actor: str, now: float) -> None:
    """Cancel a waiting job, or ask the runner of an active one to."""
    if job.status is JobStatus.QUEUED:
        values: dict[str, Any] = {"status": JobStatus.CANCELLED, "finished_at": now}
        values |= {"waiting_reason": None, "not_before": None}
    else:
        values = {"status": JobStatus.CANCELLING}
    record_status(connection, job.id, job.status, values["status"], now, actor, "cancel requested")
    values["cancel_requested"] = True
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))


# Holding a lease


def _leased() -> Select[Any]:
    """Jobs with a running attempt, joined with that attempt's devices."""
    same = (attempts.c.job_id == jobs.c.id) & (attempts.c.number == jobs.c.attempt)
    return select(jobs, attempts.c.devices).join(attempts, same).where(jobs.c.lease_token.is_not(None))


def leases(connection: Connection) -> list[Lease]:
    """Every lease, oldest job first."""
    return [to_lease(row) for row in connection.execute(_leased().order_by(jobs.c.seq)).mappings()]


def find_lease(connection: Connection, job_id: str, token: str) -> Lease:
    """The lease that `token` stands for."""
    query = _leased().where(jobs.c.id == job_id, jobs.c.lease_token == token)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise LeaseLost(job_id)
    return to_lease(row)


def _held(connection: Connection, lease: Lease) -> RowMapping:
    """The job's row, locked, if the lease still holds it."""
    query = select(jobs).where(jobs.c.id == lease.job_id, jobs.c.lease_token == lease.token).with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise LeaseLost(lease.job_id, lease.attempt)
    return row


def renew(connection: Connection, lease: Lease, now: float, lease_s: float) -> LeaseView:
    """Move the lease's end to `now + lease_s`."""
    row = _held(connection, lease)
    connection.execute(update(jobs).where(jobs.c.id == lease.job_id).values(lease_expires_at=now + lease_s))
    return LeaseView(cancel_requested=row["cancel_requested"], expires_at=now + lease_s)


def append(
    connection: Connection,
    lease: Lease,
    new: Sequence[NewEvent],
    now: float,
    status: JobStatus | None,
    progress: dict[str, Any] | None,
    reason: str,
) -> None:
    """Add events; change status and progress; see `jobs.store.Store.append`."""
    old = JobStatus(_held(connection, lease)["status"])
    rows = [
        {
            "job_id": lease.job_id,
            "at": now if event.at is None else event.at,
            "kind": event.kind,
            "actor": event.actor,
            "data": event.data,
        }
        for event in new
    ]
    if rows:
        connection.execute(insert(events), rows)
    values: dict[str, Any] = {} if progress is None else {"progress": progress}
    if status is not None and status is not old and old is not JobStatus.CANCELLING:
        record_status(connection, lease.job_id, old, status, now, "runner", reason)
        values["status"] = status
    if values:
        connection.execute(update(jobs).where(jobs.c.id == lease.job_id).values(values))


# Ending an attempt


def finish(connection: Connection, lease: Lease, end: AttemptEnd, now: float) -> JobStatus:
    """End the attempt and free its devices; see `jobs.store.Store.finish`."""
    old = JobStatus(_held(connection, lease)["status"])
    status = JobStatus.CANCELLED if old is JobStatus.CANCELLING else end.status
    if not (status.terminal or status is JobStatus.RETRYING):
        raise IllegalTransition(lease.job_id, old, status)
    record_status(connection, lease.job_id, old, status, now, end.actor, end.reason)
    _close_attempt(connection, lease, status, end, now)
    if status is JobStatus.RETRYING:
        record_status(connection, lease.job_id, status, JobStatus.QUEUED, now, end.actor, "waits for another attempt")
        reason = f"attempt {lease.attempt} ended early, another one follows"
        values: dict[str, Any] = {
            "status": JobStatus.QUEUED,
            "not_before": end.retry_at,
            "waiting_reason": reason,
        }
    else:
        error = end.error if status is JobStatus.FAILED else None
        values = {"status": status, "finished_at": now, "error": error}
    connection.execute(update(jobs).where(jobs.c.id == lease.job_id).values(values | _NO_LEASE))
    if status is JobStatus.SUCCEEDED and end.artifacts:
        rows = [{"job_id": lease.job_id, "path": a.path, "size": a.size, "sha256": a.sha256} for a in end.artifacts]
        connection.execute(insert(artifacts), rows)
    return JobStatus(values["status"])


def _close_attempt(connection: Connection, lease: Lease, status: JobStatus, end: AttemptEnd, now: float) -> None:
    row = (attempts.c.job_id == lease.job_id) & (attempts.c.number == lease.attempt)
    values = {"finished_at": now, "outcome": status, "error": end.error, "counts": end.counts}
    connection.execute(update(attempts).where(row).values(values))
    connection.execute(delete(allocations).where(allocations.c.job_id == lease.job_id))


def fail(
    connection: Connection,
    lease: Lease,
    failure: Failure,
    now: float,
    max_attempts: int,
    retry_delay_s: float,
    actor: str,
) -> JobStatus:
    """End the attempt with a failure; see `jobs.store.Store.fail`."""
    failed = _retried(connection, lease.job_id, attempts.c.counts)
    counts = failure.counts
    if failure.code == OUT_OF_MEMORY and not counts:  # ranks that forget to halve must not go on for ever
        same = attempts.c.error["code"].as_string() == OUT_OF_MEMORY
        counts = _retried(connection, lease.job_id, same) >= MOST_HALVINGS
    end = AttemptEnd(JobStatus.FAILED, failure.as_dict(), actor=actor, reason=failure.message, counts=counts)
    if failure.may_retry and not counts:
        end = replace(end, status=JobStatus.RETRYING, retry_at=now)
    elif failure.may_retry and failed + 1 < max_attempts:
        end = replace(end, status=JobStatus.RETRYING, retry_at=now + retry_delay_s * 2**failed)
    return finish(connection, lease, end, now)


def _retried(connection: Connection, job_id: str, which: ColumnElement[bool]) -> int:
    """How many earlier attempts of a job were followed by another and are `which`."""
    rows = (attempts.c.job_id == job_id) & (attempts.c.outcome == JobStatus.RETRYING) & which
    return int(connection.execute(select(func.count()).select_from(attempts).where(rows)).scalar_one())


def _devices(count: int) -> str:
    return f"{count} device{'s' if count != 1 else ''}"


def _clock_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
