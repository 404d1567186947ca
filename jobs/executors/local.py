"""Attempts on this machine: one `python -m jobs.runner` process each, which outlives the server.

Refuses to put a secret on a command line: the database URL and the lease token go through the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from jobs.executors.base import RunnerState
from jobs.json_files import read_json
from jobs.layout import attempt_dir, attempt_tag, runner_log
from jobs.process import ProcessIdentity, sweep
from jobs.records import Lease
from jobs.runner import DATABASE_VARIABLE, EXIT_LEASE_LOST, TOKEN_VARIABLE
from jobs.runner_settings import RunnerSettings


class LocalExecutor:
    """Runs attempts as processes of this machine.

    Args:
        data_dir: The server's data directory.
        database_url: How the runner reaches the store.
        settings: How it runs the attempt.
    """

    def __init__(self, data_dir: Path, database_url: str, settings: RunnerSettings | None = None) -> None:
        self._data_dir = data_dir.absolute()
        self._database_url = database_url
        self._settings = settings or RunnerSettings()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def launch(self, lease: Lease, job_dir: Path) -> None:
        """Start a runner in a session of its own, so that nothing sent to the server reaches it."""
        folder = attempt_dir(job_dir, lease.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "jobs.runner", "--data-dir", str(self._data_dir)]
        command += ["--job-id", lease.job_id, "--attempt", str(lease.attempt)]
        command += ["--settings", self._settings.to_json()]
        env = {name: value for name, value in os.environ.items() if not name.startswith("KBOP_")}
        env |= {DATABASE_VARIABLE: self._database_url, TOKEN_VARIABLE: lease.token}
        with runner_log(folder).open("ab") as log:
            self._children[lease.token] = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def state(self, lease: Lease, job_dir: Path) -> RunnerState:
        """By our own child, else by the process id and start time the runner wrote down."""
        child = self._children.get(lease.token)
        if child is not None:
            return RunnerState.ALIVE if child.poll() is None else RunnerState.GONE
        identity = _identity(lease, job_dir)
        if identity is None:
            return RunnerState.UNKNOWN
        return RunnerState.GONE if identity.process() is None else RunnerState.ALIVE

    def stop(self, lease: Lease, job_dir: Path) -> None:
        """Kill the runner, which takes its ranks along, then whatever still carries the attempt's tag."""
        child = self._children.pop(lease.token, None)
        identity = _identity(lease, job_dir)
        process = None if identity is None else identity.process()
        if child is not None:
            child.kill()
            child.wait()
        elif process is not None:
            try:
                process.kill()
                process.wait(timeout=5)
            except psutil.Error:
                pass
        sweep(attempt_tag(lease.job_id, lease.attempt))

    def reap(self) -> None:
        """Collect exit statuses, so that no runner stays a zombie, and forget those that ended in order."""
        for token, child in list(self._children.items()):
            if child.poll() in (0, EXIT_LEASE_LOST):
                del self._children[token]


def _identity(lease: Lease, job_dir: Path) -> ProcessIdentity | None:
    return ProcessIdentity.from_json(read_json(attempt_dir(job_dir, lease.attempt) / "runner.json"))
