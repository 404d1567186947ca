"""What the scheduler needs from a place where attempts run.

Refuses to know leases' rules or statuses: an executor starts, finds and ends processes.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Protocol

from jobs.records import Lease


class RunnerState(StrEnum):
    """What can be said about the runner of an attempt."""

    ALIVE = "alive"
    GONE = "gone"
    #: No trace of it yet: it may be starting. Only the end of its lease settles that.
    UNKNOWN = "unknown"


class Executor(Protocol):
    """Starts runners and finds them again, also after this process was restarted."""

    def launch(self, lease: Lease, job_dir: Path) -> None:
        """Start the runner of an attempt. Raises OSError when that is impossible."""

    def state(self, lease: Lease, job_dir: Path) -> RunnerState:
        """Whether the runner lives."""

    def stop(self, lease: Lease, job_dir: Path) -> None:
        """End the runner and every process of its attempt, at once and for certain."""

    def reap(self) -> None:
        """Collect what ended; called at every tick of the scheduler."""
