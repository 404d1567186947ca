"""Who runs next, on which devices, and what becomes of attempts whose process is gone.

Refuses to run anything itself: it claims through the store and launches through an executor. One scheduler
per data directory, held by a file lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO

from jobs.artifacts import ArtifactStore, disk_shortage
from jobs.errors import LeaseLost, SchedulerRunning, StoreUnavailable
from jobs.executors.base import Executor, RunnerState
from jobs.failures import runner_lost
from jobs.layout import artifacts_dir, attempt_dir, job_dir, runner_log
from jobs.records import Failure, Lease
from jobs.store import Store

_log = logging.getLogger(__name__)
_LOCK_FILE = "scheduler.lock"


@dataclass(frozen=True)
class SchedulerSettings:
    """How jobs are scheduled.

    Attributes:
        data_dir: Where jobs and artifacts are; this scheduler's alone.
        devices: Every device jobs may run on, from `jobs.devices.discover_devices`.
        lease_s: Seconds a lease lasts without renewal.
        max_attempts: Attempts of a job that end in system errors before it fails.
        retry_delay_s: Seconds before the second attempt; doubles with each further one.
        disk_floor_bytes: Nothing is started while less than this is free under `data_dir`.
        tick_s: Seconds between two ticks.
    """

    data_dir: Path
    devices: tuple[str, ...]
    lease_s: float = 30.0
    max_attempts: int = 3
    retry_delay_s: float = 5.0
    disk_floor_bytes: int = 1 << 30
    tick_s: float = 0.5


class Scheduler:
    """Claims jobs and launches their attempts.

    Raises:
        SchedulerRunning: On construction, when another one has the data directory.
    """

    def __init__(self, store: Store, executor: Executor, settings: SchedulerSettings) -> None:
        self._store = store
        self._executor = executor
        self._settings = settings
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        #: When this process first saw a lease expired, by token (monotonic seconds).
        self._expired_since: dict[str, float] = {}
        self._lock = _acquire_lock(settings.data_dir)
        ArtifactStore(artifacts_dir(settings.data_dir)).remove_stale()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another scheduler have the data directory. Running attempts go on."""
        self._lock.close()

    def run_forever(self, stop: threading.Event) -> None:
        """Tick until `stop` is set; a database or disk that does not answer is waited for."""
        while not stop.is_set():
            try:
                self.tick()
            except (StoreUnavailable, OSError) as error:
                _log.warning("scheduler tries again: %s", error)
            stop.wait(self._settings.tick_s)

    def tick(self) -> None:
        """One round: settle attempts whose runner is gone, then start what can be started."""
        self._executor.reap()
        for lease in self._store.leases():
            self._settle(lease)
        shortage = disk_shortage(self._settings.data_dir, self._settings.disk_floor_bytes)
        if shortage is not None:
            self._store.hold(shortage)
        else:
            self._start_all()
        os.utime(self._lock.fileno())

    def _start_all(self) -> None:
        settings = self._settings
        while (lease := self._store.claim(self._owner, settings.devices, settings.lease_s)) is not None:
            self._launch(lease)

    def _launch(self, lease: Lease) -> None:
        try:
            self._executor.launch(lease, self._job_dir(lease))
        except OSError as error:
            hint = "see that the disk has room and processes may be started"
            self._fail(lease, Failure("launch_failed", f"the runner could not be started: {error}", hint))

    def _settle(self, lease: Lease) -> None:
        """Unreachable is not dead: an attempt is closed only when its process is known to be gone."""
        state = self._executor.state(lease, self._job_dir(lease))
        expired = lease.expires_at < self._store.now()
        if state is RunnerState.ALIVE:
            if self._hangs(lease, expired):
                _log.error("runner of %s attempt %d hangs, killing it", lease.job_id, lease.attempt)
                self._executor.stop(lease, self._job_dir(lease))
        elif state is RunnerState.GONE or expired:
            self._executor.stop(lease, self._job_dir(lease))
            folder = attempt_dir(self._job_dir(lease), lease.attempt)
            self._fail(lease, runner_lost(folder, runner_log(folder)))

    def _hangs(self, lease: Lease, expired: bool) -> bool:
        """True when a living runner has not renewed for two leases, the second of which we watched.

        Watched, because after a suspended machine wakes up every lease looks expired although nobody hangs.
        """
        if not expired:
            self._expired_since.pop(lease.token, None)
            return False
        since = self._expired_since.setdefault(lease.token, monotonic())
        return monotonic() - since > self._settings.lease_s

    def _fail(self, lease: Lease, failure: Failure) -> None:
        """End the attempt, unless its runner did in the meantime."""
        settings = self._settings
        try:
            status = self._store.fail(
                lease,
                failure,
                max_attempts=settings.max_attempts,
                retry_delay_s=settings.retry_delay_s,
                actor="scheduler",
            )
        except LeaseLost:
            return
        self._expired_since.pop(lease.token, None)
        _log.warning("%s attempt %d: %s; now %s", lease.job_id, lease.attempt, failure.message, status)

    def _job_dir(self, lease: Lease) -> Path:
        return job_dir(self._settings.data_dir, lease.job_id)


def _acquire_lock(data_dir: Path) -> IO[bytes]:
    """An open, locked file; the kernel unlocks it when this process ends, however it ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = (data_dir / _LOCK_FILE).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise SchedulerRunning(data_dir) from None
    return lock


def last_tick(data_dir: Path) -> float | None:
    """When the scheduler of a data directory, in whatever process, last completed a tick (unix seconds)."""
    try:
        return (data_dir / _LOCK_FILE).stat().st_mtime
    except FileNotFoundError:
        return None
