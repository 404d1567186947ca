"""Peak memory of an attempt's ranks, sampled from outside and kept in `memory.json`.

Refuses to guess: a peak between two samples is missed, and GPU memory is the ranks' own business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from jobs.json_files import write_json


class MemoryPeak:
    """Largest resident set sizes seen so far, in bytes: of all ranks at one moment, and of each rank.

    `memory.json` always holds the peak so far, so that the ranks' own report can quote it.
    """

    def __init__(self, path: Path, world_size: int, every_s: float = 1.0) -> None:
        self._path = path
        self._every_s = every_s
        self._next = 0.0
        self.total = 0
        self.per_rank = [0] * world_size

    def sample(self, pids: Sequence[int]) -> None:
        """Look at the ranks (process id by rank) unless the last look was less than `every_s` seconds ago."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        sizes = [_rss(pid) for pid in pids]
        peaks = [max(pair) for pair in zip(sizes, self.per_rank, strict=True)]
        if sum(sizes) > self.total or peaks != self.per_rank:
            self.total, self.per_rank = max(self.total, sum(sizes)), peaks
            write_json(self._path, {"peak_rss_bytes": self.total, "per_rank": self.per_rank})


def _rss(pid: int) -> int:
    """Resident set size of a process in bytes; 0 when it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
