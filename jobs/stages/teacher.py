"""Where the teacher of stage `train` is, as the spec asks: in memory, on disk, over the ranks, or as stored targets."""

from __future__ import annotations

from jobs.workspace import Workspace
from kbop_core.engine import barrier, share_frozen
from kbop_core.hf import vocabulary_size
from kbop_core.target_cache import TargetCache
from kbop_core.teacher import CachedTeacher, LiveTeacher, Teacher

#: Logits that a teacher makes at once when its targets are stored: 2^24 float32 are 64 MiB.
BATCH_LOGITS = 2**24


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
    batch = max(1, BATCH_LOGITS // (vocabulary_size(space.teacher) * space.layout.context))
    teacher = LiveTeacher(space.teacher)
    space.journal.note(f"the teacher's likeliest tokens are written to disk: {cache.parts} files")
    cache.write(
        space.gang,
        lambda numbers: windows.rows(numbers).to(space.device),
        teacher.log_probs,
        batch,
        lambda done, total: space.journal.progress(done, total),
    )
    space.forget_teacher()
    barrier(space.gang)
    return cache
