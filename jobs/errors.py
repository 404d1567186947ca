"""Every error the torch-free part of jobs raises on purpose: one tree, each leaf with a stable `code`.

Refuses to decide what a caller does about one: HTTP statuses are the service's, retries are the queue's.

    JobsError
    ├── SubmitError                 the request itself was refused
    │   ├── IdempotencyMismatch     same key, other body
    │   ├── NotEnoughDevices        more devices than this server has
    │   └── BadPlan                 a plan was asked for with numbers that cannot be
    ├── SourceError                 a model or data source was refused
    │   ├── UnknownModel            nothing there, or not a model
    │   ├── UnknownShape            the config does not tell the sizes that a plan needs
    │   ├── UnknownData             nothing there
    │   ├── PathNotAllowed          outside the allowed roots
    │   ├── OwnerNotAllowed         hub owner not on the list
    │   ├── PickleWeights           weights only as pickle files
    │   ├── RemoteCode              the config asks for code of its own (`auto_map`)
    │   ├── BadWeights              a safetensors file that is not one
    │   ├── BadDataType             not .txt, .jsonl or .parquet
    │   └── EmptyData               zero bytes
    ├── LookupFailed                nothing has that name
    │   ├── UnknownJob
    │   ├── UnknownArtifact
    │   └── BadCursor               a list cursor this server did not make
    ├── StateError                  the record is not in a state that allows this
    │   ├── AlreadyFinished         cancel of a finished job
    │   ├── IllegalTransition       a status change the table does not have
    │   └── LeaseLost               the attempt belongs to somebody else now
    ├── StorageError                bytes on disk
    │   ├── DiskFull                no space left while writing
    │   ├── HashMismatch            the bytes are not those that were announced
    │   ├── BadManifest             manifest.json of a checkpoint is missing or wrong
    │   └── BlobMissing             a recorded artifact whose bytes are gone
    ├── ClusterError                nodes of jobs that run on several
    │   ├── BadHostfile             the host list is not one
    │   ├── NodeUnreachable         nothing could be started there
    │   ├── FolderNotShared         the job's folder is not there
    │   ├── NodeStartFailed         the ranks could not be started there
    │   └── NodeLost                its agent or the connection to it is gone
    ├── StoreUnavailable            the database does not answer
    ├── SchemaMismatch              the database has another version than this program
    └── SchedulerRunning            another scheduler owns this data directory
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class JobsError(Exception):
    """Base of the tree. `message` says what was wrong, `hint` what to do about it (may be empty)."""

    code: ClassVar[str] = "jobs_error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SubmitError(JobsError):
    """A submission that was refused as it stands."""

    code = "submit_refused"


class IdempotencyMismatch(SubmitError):
    """The idempotency key was used before with another request."""

    code = "idempotency_mismatch"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"idempotency key {key!r} was already used for a different request",
            "send the first request again unchanged, or use a new key",
        )


class NotEnoughDevices(SubmitError):
    """The job asks for more devices than this server has, so it could never start."""

    code = "not_enough_devices"

    def __init__(self, wanted: int, available: int) -> None:
        super().__init__(
            f"resources.gpus is {wanted}, this server has {available} device{'s' if available != 1 else ''}",
            f"ask for 1 to {available}" if available else "start the server with cpu_slots of at least 1",
        )
        self.wanted = wanted
        self.available = available


class BadPlan(SubmitError):
    """A plan was asked for with a number or a combination that cannot be."""

    code = "bad_plan"


class SourceError(JobsError):
    """A model or data source that may not or cannot be used."""

    code = "bad_source"


class UnknownModel(SourceError):
    """No model of that name or at that path."""

    code = "unknown_model"


class UnknownShape(SourceError):
    """The model's config does not tell the sizes that a plan needs."""

    code = "unknown_shape"


class UnknownData(SourceError):
    """No data of that name or at that path."""

    code = "unknown_data"


class PathNotAllowed(SourceError):
    """The path, after following links, is outside every allowed root."""

    code = "path_not_allowed"


class OwnerNotAllowed(SourceError):
    """The hub owner is not on this server's list."""

    code = "owner_not_allowed"


class PickleWeights(SourceError):
    """The model's weights exist only as pickle files, which can run code when loaded."""

    code = "pickle_weights"


class RemoteCode(SourceError):
    """The model's config names Python code of its own (`auto_map`), which is never run here."""

    code = "remote_code"


class BadWeights(SourceError):
    """A weight file is missing, truncated or malformed."""

    code = "bad_weights"


class BadDataType(SourceError):
    """The data file has a type that is not read here."""

    code = "bad_data_type"


class EmptyData(SourceError):
    """The data file holds nothing."""

    code = "empty_data"


class LookupFailed(JobsError):
    """Nothing has the name that was asked for."""

    code = "not_found"


class UnknownJob(LookupFailed):
    """No job has that id."""

    code = "unknown_job"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}", "list the jobs to see their ids")


class UnknownArtifact(LookupFailed):
    """The job has no artifact at that path."""

    code = "unknown_artifact"

    def __init__(self, job_id: str, path: str) -> None:
        super().__init__(
            f"job {job_id!r} has no artifact {path!r}", "list its artifacts; a job has some once it succeeded"
        )


class BadCursor(LookupFailed):
    """The cursor of a list request was not made by this server."""

    code = "bad_cursor"

    def __init__(self, cursor: str) -> None:
        super().__init__(f"cursor {cursor!r} is not one this server gave out", "start again without a cursor")


class StateError(JobsError):
    """The record is in a state that does not allow the operation."""

    code = "wrong_state"


class AlreadyFinished(StateError):
    """The job reached its end and stays there."""

    code = "already_finished"

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"job {job_id!r} has already {_PAST.get(status, status)}", "there is nothing to cancel")
        self.status = status


_PAST = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}


class IllegalTransition(StateError):
    """A status change that the transition table does not have: a bug of the caller."""

    code = "illegal_transition"

    def __init__(self, job_id: str, old: str, new: str) -> None:
        super().__init__(f"job {job_id!r} cannot go from {old} to {new}")


class LeaseLost(StateError):
    """The attempt's lease token is no longer the job's: somebody else decides about this job now."""

    code = "lease_lost"

    def __init__(self, job_id: str, attempt: int | None = None) -> None:
        which = "this attempt" if attempt is None else f"attempt {attempt}"
        super().__init__(f"{which} of job {job_id!r} no longer holds its lease", "stop and write nothing more")


class StorageError(JobsError):
    """Files could not be stored or read back."""

    code = "storage_error"


class DiskFull(StorageError):
    """The file system had no room for a file; nothing of it was kept."""

    code = "disk_full"

    def __init__(self, path: Path) -> None:
        super().__init__(f"no space left on the device while storing {path.name!r}", "free disk space and try again")


class HashMismatch(StorageError):
    """A file's content is not what its announced sha256 says."""

    code = "hash_mismatch"

    def __init__(self, path: Path, expected: str, actual: str) -> None:
        super().__init__(
            f"{path.name!r} has sha256 {actual}, expected {expected}",
            "the file changed or was damaged: make it again",
        )


class BadManifest(StorageError):
    """The manifest of a packed checkpoint is missing, malformed or names files that are not there."""

    code = "bad_manifest"


class BlobMissing(StorageError):
    """The database knows the artifact but its bytes are not in the artifact folder."""

    code = "blob_missing"

    def __init__(self, sha256: str) -> None:
        super().__init__(
            f"the artifact folder has no file with sha256 {sha256}",
            "restore the artifact folder from a backup",
        )


class ClusterError(JobsError):
    """Nodes that jobs should run on are not what they should be. `node` is the name of the one at fault, if any."""

    code = "cluster_error"
    node = ""


class BadHostfile(ClusterError):
    """The host list cannot be read or has a line that is no node."""

    code = "bad_hostfile"

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"the host list {path} {reason}", "write a line `name slots=N` for each node")


class NodeUnreachable(ClusterError):
    """The agent did not come up on a node: no connection, no interpreter, or no kbop in it."""

    code = "node_unreachable"

    def __init__(self, node: str, command: str, reason: str) -> None:
        super().__init__(
            f"node {node!r} cannot be used: `{command}` {reason}",
            "run that command by hand: it must log in without asking, and find the same kbop there (KBOP_NODE_PYTHON)",
        )
        self.node = node


class FolderNotShared(ClusterError):
    """A node does not see the job's folder."""

    code = "folder_not_shared"

    def __init__(self, node: str, path: str) -> None:
        super().__init__(
            f"node {node!r} has no folder {path}",
            "mount the data directory (KBOP_DATA_DIR) at the same path on every node",
        )
        self.node = node


class NodeStartFailed(ClusterError):
    """The agent could not start the ranks of its node."""

    code = "node_start_failed"

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"node {node!r} could not start its ranks: {reason}", "see the node's log in the attempt")
        self.node = node


class NodeLost(ClusterError):
    """A node stopped answering while its ranks ran; the ranks there end by themselves, those elsewhere are killed."""

    code = "node_lost"

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"node {node!r} is lost: {reason}", "see that it and the network to it are up")
        self.node = node


class StoreUnavailable(JobsError):
    """The database could not be reached or did not answer in time; trying again later may work."""

    code = "store_unavailable"


class SchemaMismatch(JobsError):
    """The database's schema is not the one this program works with."""

    code = "schema_mismatch"


class SchedulerRunning(JobsError):
    """Another process schedules the jobs of this data directory."""

    code = "scheduler_running"

    def __init__(self, data_dir: Path) -> None:
        super().__init__(
            f"another scheduler is already running on {data_dir}",
            "stop it, or start this server with embed_scheduler off",
        )
