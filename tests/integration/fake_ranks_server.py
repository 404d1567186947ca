"""A data directory with store, scheduler and runners as they are, and ranks that pretend to train (fake_rank.py)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from jobs.artifacts import ArtifactStore
from jobs.executors.local import LocalExecutor
from jobs.json_files import read_json
from jobs.layout import artifacts_dir, attempt_dir, attempt_tag, job_dir
from jobs.process import ProcessIdentity, sweep, tagged
from jobs.records import JobRecord, JobStatus, Lease
from jobs.runner import run_attempt
from jobs.runner_settings import RunnerSettings
from jobs.scheduler import Scheduler, SchedulerSettings
from jobs.spec import JobSpec
from jobs.store import Store

DEVICES = ("cpu:0", "cpu:1")
FAKE_RANK = (sys.executable, str(Path(__file__).with_name("fake_rank.py")))
QUICK = RunnerSettings(
    lease_s=10,
    grace_s=5,
    peer_grace_s=1,
    max_attempts=2,
    retry_delay_s=0.05,
    poll_s=0.02,
    rank_command=FAKE_RANK,
)
HARD = replace(QUICK, grace_s=0.3)


class FakeRanksServer:
    """One data directory with its store and, until it is stopped, a scheduler."""

    def __init__(self, data_dir: Path, runner: RunnerSettings = QUICK, devices: tuple[str, ...] = DEVICES) -> None:
        self.data_dir = data_dir
        self.devices = devices
        self.store = Store.open(f"sqlite:///{data_dir}/kbop.db")
        self.executors: list[LocalExecutor] = []
        self.scheduler = self.start(runner)

    def start(self, runner: RunnerSettings = QUICK) -> Scheduler:
        """A scheduler with an executor that knows nothing yet, as after a restart of the server."""
        executor = LocalExecutor(self.data_dir, self.store.database_url, runner)
        self.executors.append(executor)
        settings = SchedulerSettings(
            self.data_dir, self.devices, lease_s=10, max_attempts=2, retry_delay_s=0.05, disk_floor_bytes=0
        )
        self.scheduler = Scheduler(self.store, executor, settings)
        return self.scheduler

    def close(self) -> None:
        """End every runner and rank that is left, and wait until they are gone."""
        self.scheduler.close()
        for job in self.store.list_jobs().jobs:
            for attempt in self.store.attempts(job.id):
                runner = ProcessIdentity.from_json(read_json(self.folder(job.id, attempt.number) / "runner.json"))
                process = None if runner is None else runner.process()
                if process is not None and process.pid != os.getpid():
                    process.kill()
                sweep(attempt_tag(job.id, attempt.number))
        while any(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children()):
            time.sleep(0.02)
        for executor in self.executors:
            executor.reap()
        self.store.close()

    def submit(self, name: str, gpus: int = 2) -> str:
        wire = {
            "model": "builtin:demo",
            "data": [{"source": "builtin:python-docs"}],
            "resources": {"gpus": gpus},
        }
        return self.store.submit(JobSpec.model_validate(wire | {"name": name})).job.id

    def until(self, condition: Callable[[], object], seconds: float = 40) -> None:
        """Tick until something is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.logs()}"
            self.scheduler.tick()
            time.sleep(0.05)

    def until_ended(self, job_id: str) -> JobRecord:
        self.until(lambda: self.store.get(job_id).status.terminal)
        return self.store.get(job_id)

    def until_ranks_wait(self, job_id: str, attempt: int = 1) -> Path:
        folder = self.folder(job_id, attempt)
        self.until(lambda: all((folder / f"waiting{rank}").exists() for rank in range(2)))
        return folder

    def folder(self, job_id: str, attempt: int = 1) -> Path:
        return attempt_dir(job_dir(self.data_dir, job_id), attempt)

    def logs(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()}" for path in self.data_dir.rglob("*.log"))

    def statuses(self, job_id: str) -> list[str]:
        return [e.data["to"] for e in self.store.events(job_id) if e.kind == "status"]

    def claim(self) -> Lease:
        lease = self.store.claim("in this process", self.devices, 10)
        assert lease is not None
        return lease

    def run_here(self, lease: Lease, **arguments: object) -> JobStatus:
        """The attempt in this process, as `kbop binarize` runs it."""
        blobs = ArtifactStore(artifacts_dir(self.data_dir))
        folder = job_dir(self.data_dir, lease.job_id)
        return run_attempt(self.store, blobs, lease, folder, QUICK, **arguments)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def ranks(job_id: str, attempt: int = 1) -> list[psutil.Process]:
    return tagged(attempt_tag(job_id, attempt))
