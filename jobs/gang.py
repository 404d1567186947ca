"""The ranks of one attempt as a group: started together, watched together, ended together.

Refuses to judge how they ended or to decide when to stop them: that is the runner's.

Why no launcher is used (`deepspeed`, `torchrun`): killed launchers leave their ranks running. Here each rank
is a child of the runner, dies with it (`jobs.process.die_with_parent`) and carries the attempt's tag. On several
nodes the same holds for the agent of each (`jobs.node_gang`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jobs.layout import attempt_dir, attempt_tag, rank_log
from jobs.nodes import parse_device
from jobs.process import PARENT_VARIABLE, TAG_VARIABLE, sweep

#: What starts a rank; `--job-dir J --attempt N` follows.
RANK_COMMAND = (sys.executable, "-m", "jobs.rank_main")


@dataclass(frozen=True)
class Launch:
    """Everything the ranks of an attempt are told; written to `launch.json`.

    Attributes:
        job_id: Of the job.
        attempt: Number of the attempt, from 1.
        devices: One for each rank, those of a node together (`jobs.nodes.parse_device`).
        master_port: Where rank 0 waits for the others.
        job_dir: Absolute path, the same on every node.
        master_address: Of rank 0's node.
    """

    job_id: str
    attempt: int
    devices: tuple[str, ...]
    master_port: int
    job_dir: Path
    master_address: str = "127.0.0.1"

    @property
    def world_size(self) -> int:
        """Number of ranks: one per device."""
        return len(self.devices)

    @property
    def device_kind(self) -> str:
        """`cpu` or `cuda`."""
        return parse_device(self.devices[0]).kind

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes in the order of their ranks; one empty name without a host list."""
        return list(dict.fromkeys(parse_device(device).node for device in self.devices))

    def ranks_on(self, node: str) -> list[int]:
        """The ranks of a node; their places in this list are their local ranks."""
        return [rank for rank, device in enumerate(self.devices) if parse_device(device).node == node]

    def as_dict(self) -> dict[str, object]:
        """The content of `launch.json`."""
        return {
            "job_id": self.job_id,
            "attempt": self.attempt,
            "world_size": self.world_size,
            "devices": list(self.devices),
            "device_kind": self.device_kind,
            "master_address": self.master_address,
            "master_port": self.master_port,
            "job_dir": str(self.job_dir),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Launch:
        """The inverse of `as_dict`."""
        devices, job_dir = tuple(data["devices"]), Path(data["job_dir"])
        return cls(data["job_id"], data["attempt"], devices, data["master_port"], job_dir, data["master_address"])


def rank_environment(base: Mapping[str, str], launch: Launch, rank: int) -> dict[str, str]:
    """The environment of one rank: `base` without KBOP_ settings (credentials above all), plus its place."""
    kind, node = launch.device_kind, parse_device(launch.devices[rank]).node
    neighbours = launch.ranks_on(node)
    env = {name: value for name, value in base.items() if not name.startswith("KBOP_")}
    if kind == "cpu":
        env["OMP_NUM_THREADS"] = str(max(1, _cores() // len(neighbours)))
    if not node:
        env["GLOO_SOCKET_IFNAME"] = "lo"  # all ranks are on this host; the host's name may lead anywhere
    visible = [parse_device(launch.devices[r]).slot for r in neighbours] if kind == "cuda" else []
    return env | {
        "RANK": str(rank),
        "LOCAL_RANK": str(neighbours.index(rank)),
        "WORLD_SIZE": str(launch.world_size),
        "MASTER_ADDR": launch.master_address,
        "MASTER_PORT": str(launch.master_port),
        "KBOP_DEVICE": kind,
        "CUDA_VISIBLE_DEVICES": ",".join(visible),
        "DS_ACCELERATOR": kind,
        "DS_BUILD_OPS": "0",
        "PYTHONUNBUFFERED": "1",
        TAG_VARIABLE: attempt_tag(launch.job_id, launch.attempt),
        PARENT_VARIABLE: str(os.getpid()),
    }


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Gang(Protocol):
    """The ranks of one attempt, wherever they run."""

    def start(self) -> None:
        """Start every rank; when one cannot be started, none is left."""

    def poll(self) -> list[int | None]:
        """Exit code by rank: None while it runs, negative for a signal. Raises NodeLost."""

    def terminate(self) -> None:
        """Ask the ranks that still run to stop (SIGTERM): they may write a checkpoint first."""

    def kill(self) -> None:
        """End the ranks and everything they started, and wait until all are gone."""


class LocalGang:
    """The ranks of an attempt on this machine: all of them, or with a host list those of `node`.

    Start it from a thread that lives as long as they do: they die with that thread.

    Args:
        launch: What they are told.
        command: What starts a rank; `--job-dir J --attempt N` follows.
        node: This machine's name in the host list.
        base: Environment they begin with; None: this process's.
    """

    def __init__(
        self,
        launch: Launch,
        command: Sequence[str] = RANK_COMMAND,
        node: str = "",
        base: Mapping[str, str] | None = None,
    ) -> None:
        self._launch = launch
        self._command = [*command, "--job-dir", str(launch.job_dir), "--attempt", str(launch.attempt)]
        self._node = node
        self._base = os.environ if base is None else base
        self._ranks: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start every rank; when one cannot be started, none is left."""
        try:
            for rank in self._launch.ranks_on(self._node):
                self._ranks.append(self._spawn(rank))
        except OSError:
            self.kill()
            raise

    def _spawn(self, rank: int) -> subprocess.Popen[bytes]:
        folder = attempt_dir(self._launch.job_dir, self._launch.attempt)
        with rank_log(folder, rank).open("ab") as log:
            return subprocess.Popen(
                self._command,
                env=rank_environment(self._base, self._launch, rank),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own group within the attempt's session: a terminal's Ctrl-C is for the runner to handle,
                # and a kill reaches what the rank started.
                process_group=0,
            )

    def poll(self) -> list[int | None]:
        """Exit code by rank: None while it runs, negative for a signal."""
        return [rank.poll() for rank in self._ranks]

    def terminate(self) -> None:
        """Ask the ranks that still run to stop (SIGTERM): they may write a checkpoint first."""
        for rank in self._ranks:
            if rank.poll() is None:
                rank.terminate()

    def kill(self) -> None:
        """End the ranks and everything they started, and wait until all are gone."""
        for rank in self._ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()
        sweep(attempt_tag(self._launch.job_id, self._launch.attempt))
