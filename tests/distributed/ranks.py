"""One rank: joins the others, runs the scenarios named on its command line and leaves what each returned in a file.

    RANK=0 WORLD_SIZE=2 … python ranks.py FOLDER SCENARIO…
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import scenarios_gang
import scenarios_training
import torch

from kbop_core.engine import gang_of_ranks


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    scenarios = scenarios_gang.SCENARIOS | scenarios_training.SCENARIOS
    with gang_of_ranks("cpu", timeout_s=60.0) as gang:
        for name in names:
            try:
                result = scenarios[name](gang, folder)
            except Exception:
                result = {"unexpected": traceback.format_exc()}
            torch.save(result, folder / f"{name}-{gang.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
