"""Entry of every rank: `python -m jobs.rank_main --job-dir J --attempt N`, with RANK, WORLD_SIZE, … in the environment.

Refuses a database and credentials: a rank sees its job's folder and the other ranks, nothing else. It may also be
started by hand with `torchrun` or `deepspeed` (`--local_rank` is accepted).

Exit status: 0 all stages done; 75 stopped by SIGTERM after saving its state; 1 a known error, written to `error.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.process import PARENT_VARIABLE, die_with_parent
from jobs.stop import EXIT_STOPPED, Stop, StopAsked


@dataclass(frozen=True)
class RankError:
    """What a rank leaves in `error.json`."""

    code: str
    message: str
    hint: str
    retryable: bool
    origin: str


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline on this rank; returns the exit status."""
    parent = os.environ.get(PARENT_VARIABLE)
    die_with_parent(int(parent) if parent else None)
    options = _parse(arguments)
    stop = Stop()
    stop.listen()
    attempt_dir = options.job_dir / "attempts" / str(options.attempt)
    try:
        return _run(options.job_dir, options.attempt, stop)
    except Exception as error:  # top of the process: known errors become a file, all are printed to the rank's log
        traceback.print_exc()
        known = describe(error)
        if known is not None:
            _leave(attempt_dir, known)
        sys.stderr.flush()
        os._exit(1 if known else 70)  # other ranks may hang in a collective: no orderly teardown with them


def _run(job_dir: Path, attempt: int, stop: Stop) -> int:
    import torch

    from jobs.journal import Journal
    from jobs.pipeline import run_pipeline
    from jobs.spec import JobSpec
    from jobs.workspace import GANG_TIMEOUT_S, Workspace
    from kbop_core.engine import gang_of_ranks

    kind = os.environ.get("KBOP_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    (job_dir / "attempts" / str(attempt)).mkdir(parents=True, exist_ok=True)  # missing when started by hand
    spec = JobSpec.model_validate_json((job_dir / "spec.json").read_text(encoding="utf-8"))
    with gang_of_ranks(kind, GANG_TIMEOUT_S) as gang:
        device = torch.device("cpu" if kind == "cpu" else f"cuda:{torch.cuda.current_device()}")
        journal = Journal(job_dir / "attempts" / str(attempt) / "events.jsonl" if gang.rank == 0 else None)
        space = Workspace(job_dir, spec, attempt, gang, device, journal, stop)
        try:
            run_pipeline(space)
        except StopAsked:
            return EXIT_STOPPED
    return 0


def describe(error: Exception) -> RankError | None:
    """A known error in the words of `error.json`; None for one nobody expected."""
    from jobs.errors import JobsError
    from kbop_core.checkpoint import is_disk_full
    from kbop_core.errors import KbopError

    if isinstance(error, KbopError):
        return RankError(error.code, error.message, error.hint, error.retryable, error.origin)
    if isinstance(error, JobsError):
        return RankError(error.code, str(error), getattr(error, "hint", ""), False, "user")
    if is_disk_full(error):
        return RankError("disk_full", "no space left on the device", "free disk space and resume", True, "system")
    if isinstance(error, MemoryError | RuntimeError) and (lacking := _describe_memory(error)):
        return lacking
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return RankError(
            "port_taken", "the rendezvous port was taken", "the next attempt takes another", True, "system"
        )
    return None


def _describe_memory(error: MemoryError | RuntimeError) -> RankError | None:
    """Memory that ran out outside a training step: there is nothing smaller to try. None for another error."""
    from kbop_core.loop import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    words = str(error).partition("\n")[0] or type(error).__name__
    hint = "set resources.teacher to 'offloaded', shorten method.context, or use devices with more memory"
    return RankError("out_of_memory", f"the memory does not suffice: {words}", hint, False, "system")


def _leave(attempt_dir: Path, error: RankError) -> None:
    """Write error.json; the first rank that gets there is the one that is heard."""
    import json

    try:
        with (attempt_dir / "error.json").open("x", encoding="utf-8") as file:
            json.dump(asdict(error), file)
    except FileExistsError:
        return


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.rank_main")
    parser.add_argument("--job-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--local_rank", type=int, default=None, help="given by launchers; LOCAL_RANK is used")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of communication libraries have been seen to abort a rank that was done, at its very end
