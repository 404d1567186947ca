"""What a job, its attempts and its events are: states, the legal transitions as data, frozen records.

Refuses to know how records are stored or who changes them: the store and the state machine test share this
table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal


class JobStatus(StrEnum):
    """Where a job is on its way."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    RETRYING = "retrying"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        """True for a state no job leaves."""
        return not TRANSITIONS[self]

    @property
    def active(self) -> bool:
        """True while an attempt holds the job."""
        return self in ACTIVE


_S = JobStatus
_ENDS = frozenset({_S.RETRYING, _S.CANCELLING, _S.FAILED})

#: Every legal change; an empty set is a terminal state. A job being cancelled ends so whatever its ranks did.
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _S.QUEUED: frozenset({_S.PREPARING, _S.CANCELLED}),
    _S.PREPARING: _ENDS | {_S.RUNNING, _S.EVALUATING, _S.PUBLISHING},
    _S.RUNNING: _ENDS | {_S.EVALUATING, _S.PUBLISHING},
    _S.EVALUATING: _ENDS | {_S.PUBLISHING},
    _S.PUBLISHING: _ENDS | {_S.SUCCEEDED},
    _S.RETRYING: frozenset({_S.QUEUED}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.FAILED: frozenset(),
}
ACTIVE = frozenset({_S.PREPARING, _S.RUNNING, _S.EVALUATING, _S.PUBLISHING, _S.CANCELLING})
TERMINAL = frozenset(status for status, to in TRANSITIONS.items() if not to)


@dataclass(frozen=True)
class JobRecord:
    """One job as it is stored. Times are unix seconds; `attempt` is 0 before the first one."""

    id: str
    status: JobStatus
    created_at: float
    started_at: float | None
    finished_at: float | None
    name: str | None
    spec: dict[str, Any]
    priority: int
    attempt: int
    progress: dict[str, Any] | None
    error: dict[str, Any] | None
    waiting_reason: str | None
    cancel_requested: bool
    not_before: float | None


EventKind = Literal["status", "stage", "progress", "note"]


@dataclass(frozen=True)
class EventRecord:
    """Something that happened to a job. `id` is unique over all jobs and grows strictly."""

    id: int
    job_id: str
    at: float
    kind: EventKind
    actor: str
    data: dict[str, Any]


@dataclass(frozen=True)
class NewEvent:
    """An event before it is stored; `at` None means the time of storing."""

    kind: EventKind
    data: dict[str, Any]
    at: float | None = None
    actor: str = "rank 0"


@dataclass(frozen=True)
class ArtifactRecord:
    """A published file of a job: `path` as the user sees it, `size` in bytes, content by `sha256` (hex)."""

    job_id: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class AttemptRecord:
    """One try at a job. `outcome` is None while it runs, then the status it ended with."""

    job_id: str
    number: int
    owner: str
    devices: tuple[str, ...]
    started_at: float
    finished_at: float | None
    outcome: JobStatus | None
    error: dict[str, Any] | None


@dataclass(frozen=True)
class Lease:
    """The right to run one attempt. Whoever presents `token` may write; a new claim makes a new token."""

    job_id: str
    attempt: int
    owner: str
    token: str = field(repr=False)
    expires_at: float
    devices: tuple[str, ...]


@dataclass(frozen=True)
class LeaseView:
    """What the holder learns when it renews."""

    cancel_requested: bool
    expires_at: float


@dataclass(frozen=True)
class SubmitResult:
    """The job of a submission; `created` is False when an idempotency key found an earlier one."""

    job: JobRecord
    created: bool


@dataclass(frozen=True)
class JobPage:
    """One page of a job list, newest first; `next_cursor` None on the last page."""

    jobs: list[JobRecord]
    next_cursor: str | None


#: Code of a failure that is nobody's fault: the attempt was asked to stop although its job goes on.
INTERRUPTED = "interrupted"
#: Code of a failure after which the ranks try a smaller micro-batch, for as long as they say `retryable`.
OUT_OF_MEMORY = "out_of_memory"


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended badly, in the form a user reads it.

    `origin` "user" means the request was at fault: such a failure is never retried, whatever `retryable`
    says.
    """

    code: str
    message: str
    hint: str = ""
    retryable: bool = True
    origin: Literal["user", "system"] = "system"
    log_tail: str = ""

    @property
    def counts(self) -> bool:
        """False when the end uses up none of the job's attempts: an interruption, or memory that ran out."""
        return self.code not in (INTERRUPTED, OUT_OF_MEMORY) or not self.may_retry

    @property
    def may_retry(self) -> bool:
        """True when another attempt could end differently."""
        return self.retryable and self.origin == "system"

    def as_dict(self) -> dict[str, Any]:
        """The JSON form stored with the job and shown on the wire."""
        return asdict(self)
