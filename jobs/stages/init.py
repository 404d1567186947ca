"""Stage `init`: BNN Init, then block-wise reconstruction. All ranks calibrate on their own windows.

Trains nothing end to end.
"""

from __future__ import annotations

from typing import Any

import torch

from jobs.workspace import Workspace
from kbop_core.checkpoint import save_student
from kbop_core.convert import convert_plain
from kbop_core.init.blockwise import BlockEffort
from kbop_core.init.pretrained import InitEffort, pretrained_init
from kbop_core.init.random import random_init

#: Windows in one calibration batch of all ranks: what one step of block-wise reconstruction reads.
BATCH = 8


def init(space: Workspace) -> dict[str, Any]:
    """Write the student's first signs and scales."""
    student, steps = space.fresh_model(), space.spec.blockwise_steps
    errors: dict[str, float | None] = {}
    if space.spec.init == "random":
        generator = torch.Generator().manual_seed(space.spec.seed)
        for layer in convert_plain(student, space.plan, trainable=True).values():
            random_init(layer, generator)
    else:
        batches = [batch.to(space.device) for batch in calibration_batches(space)]
        effort = InitEffort(blockwise=BlockEffort(steps) if steps else None)
        tell = space.journal.progress
        errors = pretrained_init(student, space.teacher, space.plan, batches, effort, space.gang, tell)
    if left := [block for block, error in errors.items() if error is None]:
        space.journal.note(f"{len(left)} blocks keep their layer-wise fit, first {left[0]}: not all layers run")
    space.folder("init")
    if space.leads:
        save_student(student, space.init_student)
    return {"binary_weights": space.plan.weights, "scales": space.plan.scales, "block_errors": errors}


def calibration_batches(space: Workspace) -> list[torch.Tensor]:
    """This rank's share of the calibration windows: the first of the training order."""
    windows, ranks = space.windows, space.gang.size
    wanted = -(-space.spec.method.calibration_tokens // space.layout.context)
    numbers = windows.numbers(range(max(min(wanted, len(windows)), ranks)))
    return list(windows.rows(numbers[space.gang.rank :: ranks]).split(max(1, BATCH // ranks)))
