"""Stage `train`: KBOP steps with resumable checkpoints. Decides nothing: the loop is kbop_core's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from jobs.stop import StopAsked
from jobs.workspace import GANG_TIMEOUT_S, Workspace
from kbop_core.checkpoint import load_student, save_student
from kbop_core.convert import convert_plain
from kbop_core.engine import barrier, limit_collectives
from kbop_core.loop import Run, StepMetrics, TrainConfig, start_run
from kbop_core.loop import train as training_steps
from kbop_core.training_state import checkpoint_folder, load_state, newest_state, save_state, step_of

#: After which a collective of a training step that hangs fails, seconds.
STEP_TIMEOUT_S = 600.0


def train(space: Workspace) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start that stage `init` made.

    Raises:
        StopAsked: SIGTERM arrived on some rank; the state is saved.
    """
    if not space.steps:
        space.journal.note("no end-to-end tokens were asked for: the start is packed as it is")
        return {"steps": 0, "tokens": 0}
    if space.layout.tokens != space.spec.method.batch_tokens:
        asked = space.spec.method.batch_tokens
        space.journal.note(f"a step holds {space.layout.tokens} tokens, not {asked}: whole windows on every rank")
    student = space.fresh_model()
    convert_plain(student, space.plan, trainable=True)
    load_student(student, space.init_student)
    run = start_run(student, space.teacher, space.windows, train_config(space), space.layout, space.gang)
    checkpoints = space.folder("train/checkpoints")
    start = _resume(space, run, checkpoints)
    with space.stop.deferred():
        _steps(space, run, start, checkpoints)
        limit_collectives(GANG_TIMEOUT_S)
        if space.leads:
            save_student(student, space.final_student)
        barrier(run.gang)
    run.engine.close()
    return {
        "steps": space.steps,
        "tokens": space.steps * space.layout.tokens,
        "tokens_per_step": space.layout.tokens,
        "state_bytes_per_binary_weight": run.kbop.state_bytes() / space.plan.weights,
    }


def _resume(space: Workspace, run: Run, checkpoints: Path) -> int:
    """Load the newest complete checkpoint, which rank 0 chooses for all; returns the steps done, 0 without one."""
    newest = newest_state(checkpoints, space.gang.size, space.journal.note) if space.leads else None
    chosen = torch.tensor([float(step_of(newest)) if newest else 0.0], device=space.device, dtype=torch.float64)
    start = int(space.gang.max(chosen))
    if start:
        load_state(checkpoint_folder(checkpoints, start), run.engine, run.kbop, run.gang)
        space.journal.note(f"resumed after step {start}")
    return start


def train_config(space: Workspace) -> TrainConfig:
    """The spec's numbers in the core's words."""
    method = space.spec.method
    return TrainConfig(
        steps=space.steps,
        flip_rate=method.flip_rate,
        momentum=method.momentum,
        evidence=method.evidence,
        scale_lr=method.scale_lr,
        other_lr=method.other_lr,
        zero_stage=space.spec.resources.zero_stage,
        timeout_s=STEP_TIMEOUT_S,
    )


def _steps(space: Workspace, run: Run, start: int, checkpoints: Path) -> None:
    metrics_file = space.work / "train" / "metrics.jsonl"
    if space.leads:
        keep_metrics(metrics_file, start)
    began = time.monotonic()
    for metrics in training_steps(run, range(start, space.steps)):
        done = metrics.step + 1
        speed = (done - start) * space.layout.tokens / (time.monotonic() - began)
        if space.leads:
            _append(metrics_file, metrics)
        space.journal.progress(
            done, space.steps, loss=metrics.loss, flip_rate=metrics.flip_rate, tokens_per_s=round(speed, 1)
        )
        stop = bool(run.gang.max(torch.tensor([float(space.stop.asked)], device=space.device)) > 0)
        if done < space.steps and (stop or done % space.spec.checkpoint_every == 0):
            save_state(checkpoints, done, run.engine, run.kbop, run.gang)
        if stop and done < space.steps:
            raise StopAsked


def _append(path: Path, metrics: StepMetrics) -> None:
    line = {"step": metrics.step, "loss": metrics.loss, "flip_rate": metrics.flip_rate, "flips": dict(metrics.flips)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


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
