"""Real ranks, joined by gloo: for each number of them, that many processes run the scenarios and leave the outcomes.

    python ranks.py FOLDER

Importing torch, transformers and DeepSpeed costs a rank seconds, so this process imports them once and forks the ranks
before anything has started a thread. FOLDER/N then holds scenario-RANK.pt, log-RANK and codes.json of N ranks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import scenarios_gang
import scenarios_training
import torch

from jobs.process import free_port
from kbop_core.engine import gang_of_ranks

EVERY = (
    "collectives",
    "small_layers",
    "moved_flips",
    "quality",
    "init",
    "blockwise",
    "resume",
    "moved_state",
    "token_files",
)
MOST = (
    "exact_flips",
    "exact_int8_flips",
    "coarse_flips",
    "dyadic_engine",
    "zero_stages",
    "partitioned",
    "nan_norm",
    "recompute",
    "half_precision",
)
#: Number of ranks → scenarios they run, in this order; two ranks first, one goes on with their state, then three do.
SCENARIOS = {
    2: (*EVERY, *MOST, "overlap", "nan_gradient", "missing_gradient", "nan_loss", "teachers"),
    1: (*EVERY, *MOST, "accumulated", "full_disk", "dropout"),
    3: EVERY,
}


def run_scenarios(names: Sequence[str], folder: Path) -> None:
    """What one rank does; an exception is an outcome like any other."""
    scenarios = scenarios_gang.SCENARIOS | scenarios_training.SCENARIOS
    with gang_of_ranks("cpu", timeout_s=60.0) as gang:
        for name in names:
            try:
                result = scenarios[name](gang, folder)
            except Exception:
                result = {"unexpected": traceback.format_exc()}
            torch.save(result, folder / f"{name}-{gang.rank}.pt")


def fork_rank(rank: int, size: int, port: int, folder: Path) -> int:
    """Start a rank; in the child this never returns."""
    if child := os.fork():
        return child
    code = 1
    try:
        log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        run_scenarios(SCENARIOS[size], folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> None:
    """Run every number of ranks, one after the other."""
    torch.set_num_threads(1)
    for size in SCENARIOS:
        (folder / str(size)).mkdir()
        port = free_port()
        children = [fork_rank(rank, size, port, folder / str(size)) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        (folder / str(size) / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
