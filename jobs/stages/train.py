"""Stage `train`: KBOP steps with resumable checkpoints. Decides nothing: the loop is kbop_core's."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.json_files import write_json
from jobs.stages.step_metrics import StepJournal, keep_metrics
from jobs.stages.teacher import remove_stored_targets, training_teacher
from jobs.stop import StopAsked
from jobs.workspace import GANG_TIMEOUT_S, Workspace
from kbop_core.checkpoint import load_student, save_student
from kbop_core.convert import convert_plain
from kbop_core.engine import barrier, limit_collectives
from kbop_core.errors import OutOfMemory
from kbop_core.loop import Run, TrainConfig, start_run
from kbop_core.loop import train as training_steps
from kbop_core.phases import Phases
from kbop_core.training_state import (
    StateWriter,
    checkpoint_folder,
    clear_unfinished,
    load_state,
    newest_state,
    step_of,
)

#: After which a collective of a training step that hangs fails, seconds.
STEP_TIMEOUT_S = 600.0


def train(space: Workspace) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start that stage `init` made.

    Raises:
        StopAsked: SIGTERM arrived on some rank; the state is saved.
        OutOfMemory: a micro-step does not fit; the next attempt takes a smaller one.
    """
    if not space.steps:
        space.journal.note("no end-to-end tokens were asked for: the start is packed as it is")
        return {"steps": 0, "tokens": 0}
    if space.layout.tokens != space.spec.method.batch_tokens:
        asked = space.spec.method.batch_tokens
        space.journal.note(f"a step holds {space.layout.tokens} tokens, not {asked}: whole windows on every rank")
    try:
        return _train(space)
    except OutOfMemory as error:
        space.folder("train")
        write_json(space.micro_batch_file, {"windows": max(1, error.micro_batch // 2)})
        raise


def _train(space: Workspace) -> dict[str, Any]:
    teacher, phases = training_teacher(space), _phases(space.device)
    student = space.model_to_binarize()
    convert_plain(student, space.plan, trainable=True)
    load_student(student, space.init_student)
    run = start_run(student, teacher, space.windows, train_config(space), space.layout, space.gang, phases)
    checkpoints = space.folder("train/checkpoints")
    start = _resume(space, run, checkpoints)
    with space.stop.deferred():
        _steps(space, run, start, checkpoints)
        limit_collectives(GANG_TIMEOUT_S)
        with run.engine.whole_parameters():
            if space.leads:
                save_student(student, space.final_student)
                remove_stored_targets(space)
        barrier(run.gang)
    run.engine.close()
    return {
        "steps": space.steps,
        "tokens": space.steps * space.layout.tokens,
        "tokens_per_step": space.layout.tokens,
        "state_bytes_per_binary_weight": run.kbop.state_bytes() / space.plan.weights,
    }


def _phases(device: torch.device) -> Phases:
    if device.type == "cuda":
        return Phases(time.perf_counter, partial(torch.cuda.synchronize, device))
    return Phases(time.perf_counter)


def _resume(space: Workspace, run: Run, checkpoints: Path) -> int:
    """Load the newest complete checkpoint, which rank 0 chooses for all; returns the steps done, 0 without one.

    Rank 0 reads every byte of it to compare the hashes, and ranks do not load equally fast: until all are ready they
    may wait for each other longer than in a step.
    """
    limit_collectives(GANG_TIMEOUT_S)
    if space.leads:
        clear_unfinished(checkpoints)
    newest = newest_state(checkpoints, space.journal.note) if space.leads else None
    chosen = torch.tensor([float(step_of(newest)) if newest else 0.0], device=space.device, dtype=torch.float64)
    start = int(space.gang.max(chosen))
    if start:
        load_state(checkpoint_folder(checkpoints, start), run.engine, run.kbop)
        space.journal.note(f"resumed after step {start}")
    barrier(run.gang)
    limit_collectives(STEP_TIMEOUT_S)
    return start


def train_config(space: Workspace) -> TrainConfig:
    """The spec's numbers in the core's words."""
    method, resources = space.spec.method, space.spec.resources
    return TrainConfig(
        steps=space.steps,
        flip_rate=method.flip_rate,
        momentum=method.momentum,
        evidence=method.evidence,
        scale_lr=method.scale_lr,
        other_lr=method.other_lr,
        zero_stage=resources.zero_stage,
        activation_checkpointing=resources.activation_checkpointing,
        timeout_s=STEP_TIMEOUT_S,
    )


def _steps(space: Workspace, run: Run, start: int, checkpoints: Path) -> None:
    if space.leads:
        keep_metrics(space.metrics_file, start)
    writer, journal = StateWriter(checkpoints, run.gang), StepJournal(space, start)
    for metrics in training_steps(run, range(start, space.steps)):
        done = metrics.step + 1
        journal.tell(metrics)
        stop = bool(run.gang.max(torch.tensor([float(space.stop.asked)], device=space.device)) > 0)
        if done < space.steps and (stop or done % space.spec.checkpoint_every == 0):
            writer.save(done, run.engine, run.kbop)
        if stop and done < space.steps:
            writer.wait()
            barrier(run.gang)  # a rank that ended before the checkpoint is complete would take rank 0 down with it
            raise StopAsked
    writer.wait()
