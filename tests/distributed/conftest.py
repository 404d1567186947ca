"""Starts the ranks of ranks.py once for all tests, and hands out what each left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

#: After which ranks that hang are ended, seconds.
LIMIT_S = 250

#: (number of ranks, scenario, rank) → what that rank returned.
Outcome = Callable[[int, str, int], Any]


@pytest.fixture(scope="session")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs 1, 2 and 3 ranks; each number has a folder in this one."""
    folder = tmp_path_factory.mktemp("ranks")
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | fixed, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pass  # the folder of the ranks that hang has no codes.json: their tests fail with their logs
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the session that this fixture made, ranks included
            process.wait()
    return folder


@pytest.fixture(scope="session")
def run_folder(all_runs: Path) -> Callable[[int], Path]:
    """Number of ranks → the folder they worked in; fails with their logs when they did not end well."""

    def folder_of(size: int) -> Path:
        folder = all_runs / str(size)
        codes = folder / "codes.json"
        if not codes.is_file() or any(json.loads(codes.read_text())):
            logs = [all_runs / "log", *sorted(folder.glob("log-*"))]
            words = [p.read_text(errors="replace")[-3000:] for p in logs if p.is_file()]
            pytest.fail("\n".join([f"{size} ranks did not end well", *words]))
        return folder

    return folder_of


@pytest.fixture(scope="session")
def outcome(run_folder: Callable[[int], Path]) -> Outcome:
    """What a rank returned from a scenario; fails with the rank's own words when it raised unexpectedly."""

    def load(size: int, scenario: str, rank: int) -> Any:
        value = torch.load(run_folder(size) / f"{scenario}-{rank}.pt", weights_only=False)
        if isinstance(value, dict) and "unexpected" in value:
            pytest.fail(f"rank {rank} of {size} in {scenario}: {value['unexpected']}")
        return value

    return load
