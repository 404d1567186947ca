"""The peak memory of ranks."""

from __future__ import annotations

import json
import os

from jobs.memory import MemoryPeak


def test_the_peak_of_living_ranks_is_kept_and_a_dead_one_counts_nothing(tmp_path):
    path = tmp_path / "memory.json"
    peak = MemoryPeak(path, world_size=2)
    peak.sample([os.getpid(), 1 << 30])
    kept = json.loads(path.read_text())
    assert kept["peak_rss_bytes"] == kept["per_rank"][0] > 1_000_000
    assert kept["per_rank"][1] == 0


def test_looks_are_not_more_often_than_asked(tmp_path):
    peak = MemoryPeak(tmp_path / "memory.json", world_size=1, every_s=1000)
    peak.sample([1 << 30])
    peak.sample([os.getpid()])
    assert peak.total == 0
