"""Starts real ranks: one process each, joined by gloo, running the scenarios of ranks.py once per number of ranks.

A rank takes seconds to import torch and DeepSpeed, so all scenarios of a number of ranks share one set of processes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

#: After which ranks that hang are ended, seconds.
LIMIT_S = 200

#: Number of ranks → scenarios they run, in this order (ranks.py holds them).
SCENARIOS = {
    1: ["collectives", "exact_flips", "small_layers", "quality", "init", "dyadic_engine", "resume", "full_disk"],
    2: ["collectives", "exact_flips", "overlap", "small_layers", "nan_gradient", "missing_gradient", "quality", "init"]
    + ["dyadic_engine", "resume", "nan_loss"],
    3: ["collectives", "small_layers", "quality", "init", "resume"],
}

#: (number of ranks, scenario, rank) → what that rank returned.
Outcome = Callable[[int, str, int], Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(rank: int, size: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | fixed | {name: str(value) for name, value in place.items()}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder), *SCENARIOS[size]]
    with (folder / f"log-{rank}").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_ranks(size: int, folder: Path) -> None:
    """Run all scenarios of `size` ranks; their logs are part of the failure when one does not end well."""
    port = free_port()
    ranks = [start_rank(rank, size, port, folder) for rank in range(size)]
    try:
        codes = [rank.wait(LIMIT_S) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [-1] * size
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(codes):
        logs = "\n".join((folder / f"log-{rank}").read_text(errors="replace")[-3000:] for rank in range(size))
        raise RuntimeError(f"{size} ranks ended with {codes}\n{logs}")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Number of ranks → the folder they worked in; the first call runs them, a failed run fails every later call."""
    finished: dict[int, Path | RuntimeError] = {}

    def folder_of(size: int) -> Path:
        if size not in finished:
            folder = tmp_path_factory.mktemp(f"ranks-{size}")
            try:
                run_ranks(size, folder)
                finished[size] = folder
            except RuntimeError as error:
                finished[size] = error
        found = finished[size]
        if isinstance(found, RuntimeError):
            raise found
        return found

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
