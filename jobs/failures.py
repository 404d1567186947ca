"""What went wrong with an attempt, in words for its user: from exit codes, `error.json` and logs.

Refuses to decide whether the job is tried again: that is the queue's, from the failure's `origin` and
`retryable`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.errors import BadManifest, ClusterError, HashMismatch, JobsError
from jobs.json_files import read_json
from jobs.layout import node_log, rank_log
from jobs.records import INTERRUPTED, Failure
from jobs.watchdog import Stall

LOG_TAIL_LINES = 40
_LOG_TAIL_BYTES = 16_384
EXIT_KNOWN_ERROR = 1
EXIT_STOPPED = 75


@dataclass(frozen=True)
class GangEnd:
    """How the ranks ended.

    Attributes:
        exit_codes: By rank; empty when they were never started or nobody could tell.
        first_failed: Ranks that failed first; empty: none did by itself.
        stall: Why they were ended although none had failed: no progress.
        lost: The node because of which they were never started, or ended.
    """

    exit_codes: tuple[int, ...] = ()
    first_failed: tuple[int, ...] = ()
    stall: Stall | None = None
    lost: ClusterError | None = None

    @property
    def succeeded(self) -> bool:
        """Every rank finished every stage."""
        return bool(self.exit_codes) and all(code == 0 for code in self.exit_codes)


def failure_of(end: GangEnd, attempt_dir: Path) -> Failure:
    """Why an attempt whose ranks did not finish every stage, and that nobody cancelled, ended."""
    if end.lost is not None:
        return failure_of_node(end.lost, attempt_dir)
    if end.first_failed:
        return failure_of_ranks(end, attempt_dir)
    return interrupted() if end.stall is None else stalled(end.stall, attempt_dir)


def failure_of_ranks(end: GangEnd, attempt_dir: Path) -> Failure:
    """The failure behind ranks that failed by themselves.

    The first ranks to fail name it: what the others say while the gang is torn down is only an echo. A rank
    that exits with 1 explains itself in `error.json`; every other end is the system's fault and may be
    retried.
    """
    known = failure_from_json(read_json(attempt_dir / "error.json"))
    explained = [rank for rank in end.first_failed if end.exit_codes[rank] == EXIT_KNOWN_ERROR]
    if known is not None and explained:
        return replace(known, log_tail=known.log_tail or log_tail(rank_log(attempt_dir, explained[0])))
    rank = min(end.first_failed, key=lambda rank: (end.exit_codes[rank] >= 0, rank))
    return replace(_unexplained(rank, end.exit_codes[rank]), log_tail=log_tail(rank_log(attempt_dir, rank)))


def _unexplained(rank: int, code: int) -> Failure:
    if code == -signal.SIGKILL:
        hint = "the kernel sends it when memory runs out; try a smaller resources.max_micro_batch"
        return Failure("rank_killed", f"rank {rank} was killed by SIGKILL", hint)
    if code < 0:
        return Failure("rank_killed", f"rank {rank} was killed by {_signal_name(-code)}", "see log_tail")
    if code == EXIT_STOPPED:
        return Failure("rank_stopped", f"rank {rank} was told to stop by somebody else", "see who sent it SIGTERM")
    return Failure("rank_crashed", f"rank {rank} ended with exit code {code}", "see log_tail")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def failure_from_json(data: dict[str, Any] | None) -> Failure | None:
    """A failure as a rank or a runner wrote it to a file; None when it is not one."""
    if data is None or not isinstance(data.get("code"), str) or not isinstance(data.get("message"), str):
        return None
    return Failure(
        code=data["code"],
        message=data["message"],
        hint=str(data.get("hint") or ""),
        retryable=data.get("retryable") is True,
        origin="user" if data.get("origin") == "user" else "system",
        log_tail=str(data.get("log_tail") or ""),
    )


def stalled(stall: Stall, attempt_dir: Path) -> Failure:
    """Ranks that ran without getting anywhere."""
    where = f"in stage {stall.stage}" if stall.stage else "before the first stage"
    message = f"no progress for {stall.seconds:.0f} s {where} (allowed: {stall.limit_s:.0f} s)"
    hint = "see log_tail for what rank 0 was doing; a server whose stages are only slow wants a larger KBOP_WATCHDOG_S"
    return Failure("stalled", message, hint, log_tail=log_tail(rank_log(attempt_dir, 0)))


def failure_of_node(error: ClusterError, attempt_dir: Path) -> Failure:
    """A node that could not start its ranks, or is gone; another attempt may find it well."""
    tail = log_tail(node_log(attempt_dir, error.node)) if error.node else ""
    return Failure(error.code, error.message, error.hint, log_tail=tail)


def failure_of_publishing(error: JobsError) -> Failure:
    """Why a finished checkpoint was not published; damaged files stay damaged, so they are not retried."""
    damaged = isinstance(error, BadManifest | HashMismatch)
    return Failure(error.code, f"publishing failed: {error.message}", error.hint, retryable=not damaged)


def interrupted() -> Failure:
    """The runner was told to stop while its job goes on (a server or machine that shuts down)."""
    return Failure(INTERRUPTED, "the attempt was stopped from outside", "it goes on from its last checkpoint")


def runner_lost(attempt_dir: Path, log: Path) -> Failure:
    """The runner is gone without having ended its attempt: what it wrote down itself, or that it was lost."""
    noted = failure_from_json((read_json(attempt_dir / "exit.json") or {}).get("error"))
    if noted is not None:
        return noted
    message = "the process that ran the attempt is gone"
    return Failure("runner_lost", message, "it or its machine was stopped", log_tail=log_tail(log))


def log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log (at most 16 KiB of them); empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def describe(codes: Sequence[int]) -> str:
    """Exit codes for a log line."""
    return ", ".join(f"rank {rank}: {code}" for rank, code in enumerate(codes))
