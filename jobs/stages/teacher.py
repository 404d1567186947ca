"""Where the teacher of stage `train` is, as the spec asks: in memory, on disk, over the ranks, or as stored targets."""

from __future__ import annotations

import shutil

import psutil
import torch
from torch import nn

from jobs.workspace import Workspace
from kbop_core.engine import barrier, share_frozen
from kbop_core.hf import vocabulary_size
from kbop_core.target_cache import TargetCache
from kbop_core.teacher import CachedTeacher, LiveTeacher, Teacher

#: Logits that a teacher makes at once when its targets are stored: 2^24 float32 are 64 MiB.
BATCH_LOGITS = 2**24
#: float32 arrays of these logits that live at once while the likeliest tokens are found (distill.top_targets).
LOGITS_ARRAYS = 3


def training_teacher(space: Workspace) -> Teacher:
    """The teacher of the job; every rank calls."""
    place = space.spec.resources.teacher
    if place == "sharded":
        space.forget_teacher()  # its embedding and head, whole on every rank
        return LiveTeacher(share_frozen(space.fresh_model()))
    if place == "cached":
        return CachedTeacher(_stored_targets(space))
    return LiveTeacher(space.teacher)  # resident, or loaded block by block


def _stored_targets(space: Workspace) -> TargetCache:
    """The teacher's targets at every window that training will see, written by the ranks together if not there yet."""
    windows = space.windows
    cache = TargetCache(space.folder("train/targets"), windows.numbers(range(space.steps * space.layout.windows)))
    window = vocabulary_size(space.teacher) * space.layout.context
    batch = max(1, BATCH_LOGITS // window)
    fits = fits_whole(space, batch * window)
    teacher = LiveTeacher(space.whole_model() if fits else space.teacher)
    way = "from memory" if fits else "with its blocks read from disk for every batch: it does not fit into memory"
    space.journal.note(f"the teacher's likeliest tokens are written to {cache.parts} files, {way}")
    cache.write(
        space.gang,
        lambda numbers: windows.rows(numbers).to(space.device),
        teacher.log_probs,
        batch,
        lambda done, total: space.journal.progress(done, total),
    )
    del teacher
    space.forget_teacher()
    barrier(space.gang)
    return cache


def remove_stored_targets(space: Workspace) -> None:
    """Free the disk of targets that nobody will read again."""
    shutil.rmtree(space.work / "train" / "targets", ignore_errors=True)


def fits_whole(space: Workspace, logits: int) -> bool:
    """Whether there is room for the whole teacher and for so many of its logits, on a host for those of all ranks."""
    ranks = 1 if space.device.type == "cuda" else space.gang.size
    return ranks * (model_bytes(space.teacher) + LOGITS_ARRAYS * 4 * logits) < free_bytes(space.device)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, also of those that are on disk."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_bytes(device: torch.device) -> int:
    """Memory that nothing uses now: of the GPU, which is one rank's, else of the host, which ranks share."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
