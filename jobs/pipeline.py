"""Owns the order of a job's stages and their done markers. Refuses to know what a stage does.

    prepare → init → train → pack → evaluate          (publish is the runner's)

A stage with a marker is skipped, so an attempt after a crash goes on at the first stage without one. A marker is
written after the stage's output, by rank 0, and all ranks agree on it before the next stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from jobs.json_files import write_json
from jobs.stages.evaluate import evaluate
from jobs.stages.init import init
from jobs.stages.pack import pack
from jobs.stages.prepare import prepare
from jobs.stages.train import train
from jobs.stop import StopAsked
from jobs.workspace import Workspace
from kbop_core.engine import barrier

Stage = Callable[[Workspace], dict[str, Any]]
STAGES: dict[str, Stage] = {"prepare": prepare, "init": init, "train": train, "pack": pack, "evaluate": evaluate}


def run_pipeline(space: Workspace) -> None:
    """Run every stage that has no marker yet; every rank calls."""
    space.folder("stages")
    for name, stage in STAGES.items():
        if _done_everywhere(space, name):
            space.journal.stage(name, "skipped")
            continue
        space.journal.stage(name, "started")
        began = time.monotonic()
        facts = stage(space)
        barrier(space.gang)
        seconds = time.monotonic() - began
        if space.leads:
            write_json(space.work / "stages" / f"{name}.json", {**facts, "seconds": seconds, "attempt": space.attempt})
        barrier(space.gang)
        space.journal.stage(name, "finished", seconds)
        if space.stop.asked:  # it came while the stage's result was being saved
            raise StopAsked


def _done_everywhere(space: Workspace, name: str) -> bool:
    """Rank 0's view of the marker, so that ranks with a slower file system do not disagree."""
    seen = torch.tensor([float(space.leads and bool(space.facts(name)))], device=space.device)
    return bool(space.gang.max(seen) > 0)
