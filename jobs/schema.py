"""The tables, and how a row becomes a record.

Refuses to run any statement: transactions are `jobs.database`'s, queries are the store's and the queue's.
Changing a table means a new file in `jobs/migrations/versions`; a test compares both.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
)

from jobs.records import ArtifactRecord, AttemptRecord, EventRecord, JobRecord, JobStatus, Lease

metadata = MetaData()

#: SQLite only counts up without reuse on a column that is literally INTEGER.
_Counter = BigInteger().with_variant(Integer, "sqlite")

jobs = Table(
    "jobs",
    metadata,
    Column("seq", _Counter, primary_key=True, autoincrement=True, comment="order of submission"),
    Column("id", String(64), nullable=False, unique=True),
    Column("status", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("name", String(96)),
    Column("spec", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("devices_needed", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("progress", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("waiting_reason", Text),
    Column("cancel_requested", Boolean, nullable=False),
    Column("not_before", Float),
    Column("lease_owner", String(128)),
    Column("lease_token", String(64)),
    Column("lease_expires_at", Float),
    Index("ix_jobs_status_priority", "status", "priority", "seq"),
    sqlite_autoincrement=True,
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("owner", String(128), nullable=False),
    Column("devices", JSON, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("outcome", String(16)),
    Column("error", JSON(none_as_null=True)),
    Column("counts", Boolean, nullable=False, comment="whether it used up one of the job's attempts"),
)

events = Table(
    "events",
    metadata,
    Column("id", _Counter, primary_key=True, autoincrement=True),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("data", JSON, nullable=False),
    Index("ix_events_job_id", "job_id", "id"),
    sqlite_autoincrement=True,
)

#: The device ledger. The primary key is what makes it impossible for two attempts to hold one device.
allocations = Table(
    "allocations",
    metadata,
    Column("device", String(128), primary_key=True),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("path", String(512), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("at", Float, nullable=False),
)


def to_job(row: RowMapping) -> JobRecord:
    """A row of `jobs` as a record (lease columns and ordering columns stay behind)."""
    fields: dict[str, Any] = {name: row[name] for name in JobRecord.__dataclass_fields__}
    return JobRecord(**fields | {"status": JobStatus(row["status"])})


def to_event(row: RowMapping) -> EventRecord:
    """A row of `events` as a record."""
    return EventRecord(**{name: row[name] for name in EventRecord.__dataclass_fields__})


def to_artifact(row: RowMapping) -> ArtifactRecord:
    """A row of `artifacts` as a record."""
    return ArtifactRecord(**{name: row[name] for name in ArtifactRecord.__dataclass_fields__})


def to_attempt(row: RowMapping) -> AttemptRecord:
    """A row of `attempts` as a record."""
    fields: dict[str, Any] = {name: row[name] for name in AttemptRecord.__dataclass_fields__}
    outcome = None if row["outcome"] is None else JobStatus(row["outcome"])
    return AttemptRecord(**fields | {"devices": tuple(row["devices"]), "outcome": outcome})


def to_lease(row: RowMapping) -> Lease:
    """A row of `jobs` joined with its running attempt as the lease it stands for."""
    return Lease(
        job_id=row["id"],
        attempt=row["attempt"],
        owner=row["lease_owner"],
        token=row["lease_token"],
        expires_at=row["lease_expires_at"],
        devices=tuple(row["devices"]),
    )
