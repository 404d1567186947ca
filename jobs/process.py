"""Processes of an attempt: who they are, how they die with their parent, how strays are found.

Refuses to know jobs: it works with process ids and the tag that every process of an attempt carries in its
environment. Used by the runner, the executors, the agents of nodes and every rank; Linux gives all guarantees,
elsewhere the calls that only Linux has do nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

TAG_VARIABLE = "KBOP_ATTEMPT_TAG"
PARENT_VARIABLE = "KBOP_PARENT_PID"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: psutil derives start times from the boot time, which clock corrections shift a little between two readings.
_START_TIME_TOLERANCE_S = 2.0


def die_with_parent(expected_parent: int | None) -> None:
    """Have the kernel kill this process (SIGKILL) when its parent dies; first call of every rank.

    Args:
        expected_parent: Process id of the parent as it told us (`KBOP_PARENT_PID`). When it is not our parent
            any more it died before this call, and so do we (exit status 1). None: started by hand, nothing is
            checked.

    The kernel watches the parent's *thread* that started us, so the runner starts ranks from its main thread.
    """
    if expected_parent is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected_parent:
        os._exit(1)


def become_subreaper() -> None:
    """Have orphaned descendants of this process become its children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process for good: ids are reused, an id together with its start time (unix s) is not."""

    pid: int
    start_time: float

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        return cls(os.getpid(), psutil.Process().create_time())

    @classmethod
    def from_json(cls, data: dict[str, Any] | None) -> ProcessIdentity | None:
        """From a file's `pid` and `start_time`; None when they are not there."""
        pid, start_time = (data or {}).get("pid"), (data or {}).get("start_time")
        if not isinstance(pid, int) or not isinstance(start_time, int | float):
            return None
        return cls(pid, float(start_time))

    def process(self) -> psutil.Process | None:
        """The process while it lives; None when it ended (as a zombie has) or the id is another one's now."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.start_time) <= _START_TIME_TOLERANCE_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def tagged(tag: str) -> list[psutil.Process]:
    """Living processes of this user, except this one, whose environment carries the attempt's tag."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(TAG_VARIABLE) == tag:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, a zombie, or another user's
    return found


def sweep(tag: str, timeout_s: float = 5.0) -> int:
    """Kill (SIGKILL) every process with the tag, wait for them, and say how many there were.

    Repeats until none is found, since a process may start another while it is being killed.
    """
    deadline, killed = time.monotonic() + timeout_s, set[int]()
    while (strays := tagged(tag)) and time.monotonic() < deadline:
        for process in strays:
            killed.add(process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    for pid in killed:
        _reap(pid)
    return len(killed)


def _reap(pid: int) -> None:
    """Collect the exit status of a stray that a subreaper inherited; not our child: nothing to do."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that was free on `address` (empty: on every one of this machine) a moment ago."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
