"""One attempt from its lease to its end: launch the ranks, watch them, stop them, publish or explain.

Refuses to import torch, to decide what a stage does, or to outlive its lease: once it is lost, the ranks are
killed and nothing more is written.

`run_attempt` works in any process (main thread); `python -m jobs.runner` is what the local executor starts.
The latter gets the database URL and the lease token through its environment and hands neither on to the
ranks.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jobs.artifacts import ArtifactStore
from jobs.errors import LeaseLost, StorageError, StoreUnavailable
from jobs.failures import GangEnd, describe, failure_of, failure_of_publishing
from jobs.gang import Gang, Launch, LocalGang
from jobs.gang_watch import Watched, watch
from jobs.heartbeat import Heartbeat
from jobs.json_files import write_json
from jobs.layout import artifacts_dir, attempt_dir, job_dir
from jobs.node_gang import NodeGang
from jobs.process import ProcessIdentity, become_subreaper, free_port
from jobs.publish import publish
from jobs.records import Failure, JobStatus, Lease
from jobs.runner_settings import RunnerSettings
from jobs.spec import JobSpec
from jobs.store import Store

DATABASE_VARIABLE = "KBOP_DATABASE_URL"
TOKEN_VARIABLE = "KBOP_LEASE_TOKEN"
EXIT_LEASE_LOST = 3

_log = logging.getLogger("jobs.runner")
_T = TypeVar("_T")


def run_attempt(
    store: Store,
    artifacts: ArtifactStore,
    lease: Lease,
    job_dir: Path,
    settings: RunnerSettings | None = None,
    stop: threading.Event | None = None,
) -> JobStatus:
    """Run the attempt that `lease` stands for to its end.

    Args:
        store: Where the job is.
        artifacts: Where a finished checkpoint goes.
        lease: From `Store.claim`.
        job_dir: The job's folder; made when it is not there.
        settings: Defaults when None.
        stop: Set it to have the ranks write a checkpoint and the job go back to the queue.

    Returns:
        The job's status afterwards: succeeded, failed, cancelled, or queued for another attempt.

    Raises:
        LeaseLost: The job is somebody else's now; the ranks are dead and nothing was written.
    """
    run = _Attempt(store, artifacts, lease, job_dir, settings or RunnerSettings(), stop or threading.Event())
    with Heartbeat(store, lease, run.settings.lease_s) as heartbeat:
        return run.run(heartbeat)


class _Attempt:
    """The state of one `run_attempt`."""

    def __init__(
        self,
        store: Store,
        artifacts: ArtifactStore,
        lease: Lease,
        job_dir: Path,
        settings: RunnerSettings,
        stop: threading.Event,
    ) -> None:
        self.store = store
        self.artifacts = artifacts
        self.lease = lease
        self.job_dir = job_dir.absolute()
        self.settings = settings
        self.stop = stop
        self.folder = attempt_dir(self.job_dir, lease.attempt)

    def run(self, heartbeat: Heartbeat) -> JobStatus:
        gang = self._prepare()
        try:
            end = watch(gang, self._watched(heartbeat))
        finally:
            gang.kill()
        _log.info("ranks ended: %s", describe(end.exit_codes))
        if end.succeeded and not heartbeat.cancel_requested:
            return self._publish(end, heartbeat)
        if heartbeat.cancel_requested:
            return self._end_cancelled(end, heartbeat)
        return self._end_failed(end, failure_of(end, self.folder), heartbeat)

    def _prepare(self) -> Gang:
        """The attempt's folder and files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "runner.json", asdict(ProcessIdentity.current()) | {"at": time.time()})
        spec = JobSpec.model_validate(self.store.get(self.lease.job_id).spec)
        write_json(self.job_dir / "spec.json", spec.model_dump(mode="json"))
        launch = Launch(self.lease.job_id, self.lease.attempt, self.lease.devices, free_port(), self.job_dir)
        cluster = self.settings.cluster
        if cluster is not None:
            return NodeGang(launch, cluster, self.settings.rank_command, self.settings.lease_s)
        write_json(self.folder / "launch.json", launch.as_dict())
        return LocalGang(launch, self.settings.rank_command)

    def _watched(self, heartbeat: Heartbeat) -> Watched:
        return Watched(self.store, self.lease, self.folder, heartbeat, self.stop, self.settings)

    # Ending

    def _publish(self, end: GangEnd, heartbeat: Heartbeat) -> JobStatus:
        reason = "every stage is complete"
        self._write(heartbeat, partial(self.store.append, self.lease, (), status=JobStatus.PUBLISHING, reason=reason))
        try:
            records = publish(self.artifacts, self.lease.job_id, self.job_dir, heartbeat.check)
        except StorageError as error:
            return self._end_failed(end, failure_of_publishing(error), heartbeat)
        self._note_exit(end, JobStatus.SUCCEEDED, None)
        reason = f"{len(records)} files published"
        finish = partial(self.store.finish, self.lease, JobStatus.SUCCEEDED, artifacts=records, reason=reason)
        return self._write(heartbeat, finish)

    def _end_cancelled(self, end: GangEnd, heartbeat: Heartbeat) -> JobStatus:
        self._note_exit(end, JobStatus.CANCELLED, None)
        finish = partial(self.store.finish, self.lease, JobStatus.CANCELLED, reason="the ranks have stopped")
        return self._write(heartbeat, finish)

    def _end_failed(self, end: GangEnd, failure: Failure, heartbeat: Heartbeat) -> JobStatus:
        _log.error("%s: %s", failure.code, failure.message)
        self._note_exit(end, JobStatus.FAILED, failure)
        return self._write(heartbeat, partial(self.store.fail, self.lease, failure, **self.settings.retries()))

    def _note_exit(self, end: GangEnd, status: JobStatus, failure: Failure | None) -> None:
        """Write the attempt's facts to a file first: they are known even if the database is not reached."""
        error = None if failure is None else failure.as_dict()
        facts = {"status": status, "exit_codes": list(end.exit_codes), "error": error, "at": time.time()}
        try:
            write_json(self.folder / "exit.json", facts)
        except OSError as problem:
            _log.error("exit.json not written: %s", problem)

    def _write(self, heartbeat: Heartbeat, write: Callable[[], _T]) -> _T:
        """Write to the store, trying again while it does not answer and the lease holds."""
        while True:
            heartbeat.check()
            try:
                return write()
            except StoreUnavailable as error:
                _log.warning("store does not answer, trying again: %s", error)
                time.sleep(self.settings.poll_s)


# The process


def main(arguments: list[str] | None = None) -> int:
    """Entry of `python -m jobs.runner`; exit status 0: the attempt ended in order, 3: its lease was lost."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    become_subreaper()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    store = Store(os.environ[DATABASE_VARIABLE])
    settings = RunnerSettings.from_json(options.settings)
    lease: Lease | None = None
    try:
        lease = store.lease(options.job_id, os.environ[TOKEN_VARIABLE])
        _log.info("attempt %d of %s on %s", lease.attempt, lease.job_id, ", ".join(lease.devices))
        data_dir = Path(options.data_dir)
        blobs = ArtifactStore(artifacts_dir(data_dir))
        status = run_attempt(store, blobs, lease, job_dir(data_dir, lease.job_id), settings, stop)
        _log.info("the job is %s", status)
    except LeaseLost as error:
        _log.error("%s; %s", error.message, error.hint)
        return EXIT_LEASE_LOST
    except Exception as error:
        _log.exception("the runner failed")
        if lease is not None:
            _report_crash(store, lease, settings, error)
        return 1
    return 0


def _report_crash(store: Store, lease: Lease, settings: RunnerSettings, error: Exception) -> None:
    failure = Failure("runner_crashed", f"the runner failed: {error}", "see runner.log of the attempt")
    store.fail(lease, failure, **settings.retries())


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m jobs.runner", description="Run one attempt of a job.")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--attempt", required=True, type=int, help="for people who read the process list")
    parser.add_argument("--settings", default=RunnerSettings().to_json(), help="RunnerSettings as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
