"""Owns what stage `train` tells about each step: a line of `metrics.jsonl`, and the job's progress.

Refuses to measure phases itself (kbop_core/phases.py). Keys and units: docs/metrics.md.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from jobs.workspace import Workspace
from kbop_core.flops import ModelSize, flops_per_token, peak_flops
from kbop_core.loop import StepMetrics


class StepJournal:
    """Writes down every step of one attempt, on rank 0.

    Args:
        space: of the job.
        start: steps done when the attempt began.
    """

    def __init__(self, space: Workspace, start: int) -> None:
        self._space, self._start, self._began = space, start, time.monotonic()
        self._utilization = _utilization_per_token(space)

    def tell(self, metrics: StepMetrics) -> None:
        """Append a step's line and report progress."""
        if not self._space.leads:
            return
        done = metrics.step + 1
        speed = (done - self._start) * self._space.layout.tokens / (time.monotonic() - self._began)
        flips, reversals = dict(metrics.stats.flips), dict(metrics.stats.reversals)
        told: dict[str, Any] = {
            "loss": metrics.loss,
            "flip_rate": metrics.stats.rate,
            "reversal_rate": sum(reversals.values()) / max(1, sum(flips.values())),
            "tokens_per_s": round(speed, 1),
            "peak_bytes": peak_bytes(self._space.device),
        }
        if self._utilization is not None:
            told["mfu"] = round(self._utilization * speed, 4)
        seconds = {name: round(value, 6) for name, value in metrics.seconds.items()}
        line = {"step": metrics.step, **told, "seconds": seconds, "flips": flips, "reversals": reversals}
        with self._space.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        phases = {f"{name}_s": value for name, value in seconds.items()}
        self._space.journal.progress(done, self._space.steps, **told, **phases)


def peak_bytes(device: torch.device) -> int:
    """Most memory this process has had in use: of the GPU if it has one, else resident."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most resident memory of this process. Not getrusage's ru_maxrss: a large parent's survives exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _utilization_per_token(space: Workspace) -> float | None:
    """Share of what the GPUs can do that one token a second needs; None on CPUs and unknown GPUs."""
    if space.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(space.device))
    if peak is None:
        return None
    model = space.teacher
    tables = {id(p): p.numel() for p in [model.get_input_embeddings().weight] if not model.config.tie_word_embeddings}
    parameters = sum(p.numel() for p in model.parameters()) - sum(tables.values())
    size = ModelSize(parameters, model.config.num_hidden_layers, model.config.hidden_size)
    place = space.spec.resources.teacher
    if place in ("sharded", "cached"):
        space.forget_teacher()  # a copy that was loaded to be counted
    live = place != "cached"
    return flops_per_token(size, space.layout.context, live) / (peak * space.gang.size)


def keep_metrics(path: Path, steps: int) -> None:
    """Drop what an earlier attempt wrote after the step this one starts at, half lines included."""
    lines = read_metrics(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(m) + "\n" for m in lines if m["step"] < steps), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The step metrics in a file, up to a line that was cut short; empty when there is no file."""
    found: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break  # what follows a torn line belongs to lost steps
    return found
