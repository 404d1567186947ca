"""The durable store of jobs: the one class through which everybody reads and changes them.

Refuses to run jobs or to hold state of its own: every method is one transaction. What an attempt's holder may
do is in `jobs.job_queue`.
"""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select

from jobs import job_queue, schema
from jobs.database import Database
from jobs.errors import AlreadyFinished, BadCursor, IdempotencyMismatch, UnknownArtifact, UnknownJob
from jobs.overview import Overview, overview
from jobs.records import (
    ArtifactRecord,
    AttemptRecord,
    EventRecord,
    Failure,
    JobPage,
    JobRecord,
    JobStatus,
    Lease,
    LeaseView,
    NewEvent,
    SubmitResult,
)
from jobs.spec import JobSpec


class Store:
    """Jobs, their events, attempts and artifacts.

    Args:
        database_url: SQLAlchemy URL; for SQLite a file (`sqlite:////absolute/path/kbop.db`).
        clock: Source of unix seconds.
    """

    def __init__(self, database_url: str, clock: Callable[[], float] = time.time) -> None:
        self.database_url = database_url
        self._database = Database(database_url)
        self._clock = clock

    @classmethod
    def open(cls, database_url: str, clock: Callable[[], float] = time.time) -> Store:
        """A store whose schema has been brought to this program's version."""
        store = cls(database_url, clock)
        store._database.upgrade()
        return store

    def close(self) -> None:
        """Give back the connections."""
        self._database.close()

    def ping(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless the store can work."""
        self._database.check()

    def now(self) -> float:
        """Unix seconds by this store's clock, by which leases expire."""
        return self._clock()

    # For users

    def submit(
        self, spec: JobSpec, *, idempotency_key: str | None = None, request_hash: str | None = None
    ) -> SubmitResult:
        """Queue a job, or find the one an earlier request with the same key made.

        Args:
            spec: The validated spec; stored with every default filled in.
            idempotency_key: Chosen by the client; the row is written in the same transaction as the job.
            request_hash: What must be equal for the key to match; default: the spec's digest.

        Raises:
            IdempotencyMismatch: The key belongs to another request.
        """
        request_hash = spec.digest() if request_hash is None else request_hash
        with self._database.write() as connection:
            if idempotency_key is not None:
                earlier = _find_submission(connection, idempotency_key, request_hash)
                if earlier is not None:
                    return SubmitResult(_get(connection, earlier), created=False)
            job_id = _insert_job(connection, spec, self._clock())
            if idempotency_key is not None:
                row = {
                    "key": idempotency_key,
                    "request_hash": request_hash,
                    "job_id": job_id,
                    "at": self._clock(),
                }
                connection.execute(insert(schema.idempotency), row)
            return SubmitResult(_get(connection, job_id), created=True)

    def submitted(self, spec: JobSpec, idempotency_key: str) -> JobRecord | None:
        """The job that an earlier request with this key and spec made, if there was one.

        Raises:
            IdempotencyMismatch: The key belongs to another request.
        """
        with self._database.read() as connection:
            earlier = _find_submission(connection, idempotency_key, spec.digest())
            return None if earlier is None else _get(connection, earlier)

    def get(self, job_id: str) -> JobRecord:
        """The job. Raises UnknownJob."""
        with self._database.read() as connection:
            return _get(connection, job_id)

    def list_jobs(self, limit: int = 50, cursor: str | None = None, status: JobStatus | None = None) -> JobPage:
        """One page of jobs, newest first; stable while jobs are added. Raises BadCursor."""
        query = select(schema.jobs).order_by(schema.jobs.c.seq.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(schema.jobs.c.seq < _decode_cursor(cursor))
        if status is not None:
            query = query.where(schema.jobs.c.status == status)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        more = len(rows) > limit
        rows = rows[:limit]
        return JobPage([schema.to_job(row) for row in rows], _encode_cursor(rows[-1]["seq"]) if more else None)

    def request_cancel(self, job_id: str, actor: str = "user") -> JobRecord:
        """Ask for a job's end: at once while it waits, otherwise when its ranks have stopped.

        Raises:
            UnknownJob: No such job.
            AlreadyFinished: It succeeded, failed or was cancelled before.
        """
        with self._database.write() as connection:
            job = _get(connection, job_id)
            if job.status.terminal:
                raise AlreadyFinished(job_id, job.status)
            if job.status is not JobStatus.CANCELLING:
                job_queue.cancel(connection, job, actor, self._clock())
            return _get(connection, job_id)

    def events(self, job_id: str, after: int = 0, limit: int = 500) -> list[EventRecord]:
        """Events of a job with an id above `after`, in order. Raises UnknownJob."""
        table = schema.events
        query = select(table).where(table.c.job_id == job_id, table.c.id > after).order_by(table.c.id).limit(limit)
        with self._database.read() as connection:
            _get(connection, job_id)
            return [schema.to_event(row) for row in connection.execute(query).mappings()]

    def artifacts(self, job_id: str) -> list[ArtifactRecord]:
        """Published files of a job, by path; none before it succeeded. Raises UnknownJob."""
        table = schema.artifacts
        with self._database.read() as connection:
            _get(connection, job_id)
            rows = connection.execute(select(table).where(table.c.job_id == job_id).order_by(table.c.path))
            return [schema.to_artifact(row) for row in rows.mappings()]

    def artifact(self, job_id: str, path: str) -> ArtifactRecord:
        """One published file. Raises UnknownJob or UnknownArtifact."""
        table = schema.artifacts
        query = select(table).where(table.c.job_id == job_id, table.c.path == path)
        with self._database.read() as connection:
            _get(connection, job_id)
            row = connection.execute(query).mappings().first()
        if row is None:
            raise UnknownArtifact(job_id, path)
        return schema.to_artifact(row)

    def artifact_counts(self, job_ids: Iterable[str]) -> dict[str, int]:
        """How many files each of these jobs has published (0 for those without)."""
        ids = list(job_ids)
        table = schema.artifacts
        query = select(table.c.job_id, func.count()).where(table.c.job_id.in_(ids)).group_by(table.c.job_id)
        with self._database.read() as connection:
            found = {row[0]: int(row[1]) for row in connection.execute(query)}
        return {job_id: found.get(job_id, 0) for job_id in ids}

    def attempts(self, job_id: str) -> list[AttemptRecord]:
        """Every try at a job, first one first. Raises UnknownJob."""
        table = schema.attempts
        with self._database.read() as connection:
            _get(connection, job_id)
            rows = connection.execute(select(table).where(table.c.job_id == job_id).order_by(table.c.number))
            return [schema.to_attempt(row) for row in rows.mappings()]

    def overview(self) -> Overview:
        """Counts over all jobs, and those that run."""
        with self._database.read() as connection:
            return overview(connection)

    # For the scheduler

    def claim(self, owner: str, devices: Sequence[str], lease_s: float) -> Lease | None:
        """Start an attempt of the first job in line (highest priority, then oldest) if the devices are free.

        Devices and job are taken in one transaction, all of a gang or none. Jobs that wait learn why.

        Args:
            owner: Who claims, for people to read.
            devices: Every device of this scheduler, free or not.
            lease_s: Seconds until the lease must be renewed.
        """
        with self._database.write() as connection:
            return job_queue.claim(connection, owner, devices, self._clock(), lease_s)

    def hold(self, reason: str) -> None:
        """Tell every waiting job why nothing is started at the moment."""
        with self._database.write() as connection:
            job_queue.hold(connection, reason)

    def leases(self) -> list[Lease]:
        """The lease of every attempt that has not ended, expired ones included."""
        with self._database.read() as connection:
            return job_queue.leases(connection)

    # For the holder of a lease: every method raises LeaseLost when the token is no longer the job's

    def lease(self, job_id: str, token: str) -> Lease:
        """The lease that `token` stands for."""
        with self._database.read() as connection:
            return job_queue.find_lease(connection, job_id, token)

    def renew(self, lease: Lease, lease_s: float) -> LeaseView:
        """Keep the lease for `lease_s` more seconds and learn whether a cancel was asked for."""
        with self._database.write() as connection:
            return job_queue.renew(connection, lease, self._clock(), lease_s)

    def append(
        self,
        lease: Lease,
        events: Sequence[NewEvent],
        *,
        status: JobStatus | None = None,
        progress: dict[str, Any] | None = None,
        reason: str = "",
    ) -> None:
        """Add events, and change status and progress, of a running attempt.

        The status of a job that is being cancelled stays so. Raises IllegalTransition.
        """
        with self._database.write() as connection:
            job_queue.append(connection, lease, events, self._clock(), status, progress, reason)

    def finish(
        self,
        lease: Lease,
        status: JobStatus,
        *,
        error: dict[str, Any] | None = None,
        artifacts: Sequence[ArtifactRecord] = (),
        retry_at: float | None = None,
        actor: str = "runner",
        reason: str = "",
    ) -> JobStatus:
        """End the attempt, free its devices and return the job's status after that.

        A job being cancelled becomes cancelled whatever `status` says, and publishes nothing. RETRYING goes
        on to QUEUED in the same transaction, not to be claimed before `retry_at` (unix seconds).
        """
        end = job_queue.AttemptEnd(status, error, tuple(artifacts), retry_at, actor, reason)
        with self._database.write() as connection:
            return job_queue.finish(connection, lease, end, self._clock())

    def fail(
        self,
        lease: Lease,
        failure: Failure,
        *,
        max_attempts: int,
        retry_delay_s: float,
        actor: str = "runner",
    ) -> JobStatus:
        """End the attempt badly: retry it later if another try may help and one is left, else the job failed.

        The delay doubles with every attempt that failed. An interruption, or memory that ran out while the
        ranks can do with less (`failure.counts` False), uses up no attempt and is retried at once.
        """
        with self._database.write() as connection:
            return job_queue.fail(connection, lease, failure, self._clock(), max_attempts, retry_delay_s, actor)


def _insert_job(connection: Connection, spec: JobSpec, now: float) -> str:
    job_id = f"job_{uuid.uuid4().hex}"
    row = {
        "id": job_id,
        "status": JobStatus.QUEUED,
        "created_at": now,
        "name": spec.name,
        "spec": spec.model_dump(mode="json"),
        "priority": spec.priority,
        "devices_needed": spec.resources.gpus,
        "attempt": 0,
        "waiting_reason": "waiting for the scheduler",
        "cancel_requested": False,
    }
    connection.execute(insert(schema.jobs), row)
    job_queue.record_status(connection, job_id, None, JobStatus.QUEUED, now, "user", "submitted")
    return job_id


def _find_submission(connection: Connection, key: str, request_hash: str) -> str | None:
    row = connection.execute(select(schema.idempotency).where(schema.idempotency.c.key == key)).mappings().first()
    if row is None:
        return None
    if row["request_hash"] != request_hash:
        raise IdempotencyMismatch(key)
    return str(row["job_id"])


def _get(connection: Connection, job_id: str) -> JobRecord:
    row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).mappings().first()
    if row is None:
        raise UnknownJob(job_id)
    return schema.to_job(row)


def _encode_cursor(seq: int) -> str:
    return base64.urlsafe_b64encode(str(seq).encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> int:
    try:
        place = int(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error):
        raise BadCursor(cursor) from None
    if not 0 <= place < 2**63:  # beyond what a database column holds
        raise BadCursor(cursor)
    return place
