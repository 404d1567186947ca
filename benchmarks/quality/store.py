"""Owns finished runs: one JSON line each in results/quality-runs.jsonl, keyed by everything that decides the result.

Refuses to run anything twice: a suite that was stopped goes on where it was. A line is written in one call, so
that several processes may append. Change RULE (ours), tasks.INIT (starts) or training.PROTOCOL (all) when code changes
what a configuration gives: older lines of the methods concerned then do not count any more.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks import INIT
from benchmarks.quality.training import PROTOCOL, RunConfig
from benchmarks.record import RESULTS, machine

PATH = RESULTS / "quality-runs.jsonl"
#: Version of our own rule, part of the keys of the runs that train with it. The starts that reconstruct blocks use the
#: rule too: when it changes, tasks.INIT does as well.
RULE = 3
OURS = ("kbop", "ablation")
#: Methods that start from nothing of ours; all others have tasks.INIT in their keys.
INDEPENDENT = ("plain", "ste", "onebit", "binarymos")


def key(config: RunConfig) -> str:
    """Canonical JSON of a configuration."""
    version = {"rule": RULE} if config.method in OURS else {}
    version |= {} if config.method in INDEPENDENT else {"init": INIT}
    return json.dumps(asdict(config) | version | {"protocol": PROTOCOL}, sort_keys=True)


def finished(path: Path = PATH) -> dict[str, dict[str, Any]]:
    """key → result of every run there is; a line cut short is skipped."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["key"]] = row["result"]
    return found


def save(config: RunConfig, result: dict[str, Any], code: str, path: Path = PATH) -> None:
    """Append one run.

    Args:
        code: the commit that was there when the run's process began (`benchmarks.record.commit`).
    """
    path.parent.mkdir(exist_ok=True)
    line = json.dumps({"key": key(config), "result": result, "commit": code, "machine": machine()}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
