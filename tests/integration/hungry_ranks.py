"""Attempts of several jobs, one rank each, on a machine whose memory takes one window with a live teacher at a time.

    python hungry_ranks.py FOLDER JOB:ATTEMPT …

FOLDER/JOB/spec.json is there. Each attempt is `jobs.rank_main` in a process of its own, forked from this one so that
torch and its company are imported once. Stages after `train` are left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jobs.pipeline
import kbop_core.engine
from jobs import rank_main
from jobs.process import free_port
from kbop_core.teacher import LiveTeacher


def make_hungry() -> None:
    """From now on more than one window with a live teacher is too much."""
    loss = LiveTeacher.loss

    def hungry(teacher: LiveTeacher, student_BTV: Tensor, ids_BT: Tensor, numbers: Sequence[int]) -> Tensor:
        if len(ids_BT) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
        return loss(teacher, student_BTV, ids_BT, numbers)

    patched: Any = LiveTeacher
    patched.loss = hungry


def run_attempt(job_dir: Path, attempt: int) -> int:
    """Exit status of the rank."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in place.items()})
        code = rank_main.main(["--job-dir", str(job_dir), "--attempt", str(attempt)])
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, attempts: Sequence[str]) -> None:
    """Print each attempt's exit status, in order."""
    torch.set_num_threads(1)
    assert kbop_core.engine.deepspeed  # imported here, not in every rank
    make_hungry()
    for stage in ("pack", "evaluate"):
        del jobs.pipeline.STAGES[stage]
    codes = [run_attempt(folder / name, int(number)) for name, number in (a.split(":") for a in attempts)]
    print("exit codes", *codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
