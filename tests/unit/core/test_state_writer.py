"""Checkpoints written beside the training: by a thread, by several ranks (here in turn), and when that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbop_core import training_state
from kbop_core.checkpoint import sha256
from kbop_core.engine import Engine
from kbop_core.errors import CheckpointError, DiskFull
from kbop_core.kbop import KBOP
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.slices import Slice, SliceReader, write_slices
from kbop_core.training_state import (
    KEEP,
    StateWriter,
    checkpoint_folder,
    clear_unfinished,
    load_state,
    newest_state,
    read_facts,
)

pytestmark = pytest.mark.timeout(60)
Patch = pytest.MonkeyPatch


class Scales(Engine):
    """A full-precision side of three numbers, all on rank 0."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.values = rank, torch.zeros(3)

    def state(self) -> dict[str, Slice]:
        return {} if self.rank else {"parameter.scales": Slice.whole(self.values)}

    def load(self, saved: SliceReader, steps_done: int) -> None:
        self.values.copy_(saved.read_whole("parameter.scales"))


@pytest.fixture
def kbop_of(learner: Callable) -> Callable[..., KBOP]:
    """(rank, size) → the optimizer of one layer of 5 × 20."""

    def make(rank: int = 0, size: int = 1, seed: int = 0) -> KBOP:
        return learner(5, 20, FlipSchedule(0.1, 40, 2), seed=seed, gang=Gang(rank, size)).kbop

    return make


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def broken(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_training_changes_after_save_is_not_in_the_checkpoint(
    kbop_of: Callable[..., KBOP], tmp_path: Path, monkeypatch: Patch
) -> None:
    changed = threading.Event()
    monkeypatch.setattr(training_state, "write_slices", lambda *args: changed.wait() and write_slices(*args))
    kbop, engine, writer = kbop_of(), Scales(), StateWriter(tmp_path, Gang())
    before = {name: piece.rows.clone() for name, piece in kbop.state().items()}
    writer.save(1, engine, kbop)
    engine.values += 1
    for piece in kbop.state().values():
        piece.rows.add_(1)
    changed.set()
    writer.wait()
    load_state(checkpoint_folder(tmp_path, 1), engine, kbop)
    assert not bool(engine.values.any())
    assert all(torch.equal(piece.rows, before[name]) for name, piece in kbop.state().items())


def test_save_returns_before_its_own_write_is_done_and_after_the_one_before(
    kbop_of: Callable[..., KBOP], tmp_path: Path, monkeypatch: Patch
) -> None:
    may_write = threading.Semaphore(0)
    monkeypatch.setattr(training_state, "write_slices", lambda *args: may_write.acquire() and write_slices(*args))
    kbop, writer = kbop_of(), StateWriter(tmp_path, Gang())
    writer.save(1, Scales(), kbop)
    assert newest_state(tmp_path, print) is None
    may_write.release()
    writer.save(2, Scales(), kbop)
    assert newest_state(tmp_path, print) == checkpoint_folder(tmp_path, 1)
    may_write.release()
    writer.wait()
    assert newest_state(tmp_path, print) == checkpoint_folder(tmp_path, 2)


@pytest.mark.parametrize("heard_by", ["save", "wait"])
def test_an_error_of_the_thread_is_raised_where_training_hears_it_once(
    heard_by: str, kbop_of: Callable[..., KBOP], tmp_path: Path, monkeypatch: Patch
) -> None:
    kbop, writer = kbop_of(), StateWriter(tmp_path, Gang())
    with monkeypatch.context() as full:
        full.setattr(training_state, "write_slices", broken)
        writer.save(1, Scales(), kbop)
        with pytest.raises(DiskFull, match="while writing a training checkpoint"):
            writer.wait() if heard_by == "wait" else writer.save(2, Scales(), kbop)
    writer.save(3, Scales(), kbop)
    writer.wait()
    assert names(tmp_path) == ["step-00000003"]  # and what the full disk left is gone


def test_a_rank_whose_file_never_comes_is_named(
    kbop_of: Callable[..., KBOP], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(training_state, "PEERS_S", 2 * training_state.LOOK_S)
    writer = StateWriter(tmp_path, Gang(0, 3))
    StateWriter(tmp_path, Gang(1, 3))._write(training_state._Snapshot(7, {}, {}))
    writer.save(7, Scales(), kbop_of(0, 3))
    with pytest.raises(CheckpointError, match=r"rank 2 has not written its part of \.step-00000007"):
        writer.wait()
    assert newest_state(tmp_path, print) is None


def save(folder: Path, kbop: KBOP, step: int) -> None:
    """One rank's part of a checkpoint; returns when it is written, and on rank 0 complete."""
    writer = StateWriter(folder, kbop.gang)
    writer.save(step, Scales(kbop.gang.rank), kbop)
    writer.wait()


def test_two_ranks_leave_one_checkpoint_that_one_rank_reads(kbop_of: Callable[..., KBOP], tmp_path: Path) -> None:
    ranks = [kbop_of(rank, 2) for rank in range(2)]
    for kbop in ranks:
        kbop.shards["a"].moments.row += 1 + kbop.gang.rank
    for kbop in reversed(ranks):
        save(tmp_path, kbop, 4)
    alone = kbop_of(seed=1)
    assert load_state(checkpoint_folder(tmp_path, 4), Scales(), alone) == alone.steps_done == 4
    assert alone.shards["a"].moments.row.tolist() == [1.0] * 3 + [2.0] * 2
    assert torch.equal(alone.shards["a"].layer.weight, ranks[0].shards["a"].layer.weight)


def test_a_crash_before_completion_leaves_no_checkpoint_and_the_next_attempt_clears_up(
    kbop_of: Callable[..., KBOP], tmp_path: Path, monkeypatch: Patch
) -> None:
    with monkeypatch.context() as crash:
        crash.setattr(training_state, "_complete", broken)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, kbop_of(), 1)
    assert names(tmp_path) == [".step-00000001.parts"] and newest_state(tmp_path, print) is None
    clear_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_the_newest_are_kept(kbop_of: Callable[..., KBOP], tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, kbop_of(), step)
    assert KEEP == 2 and names(tmp_path) == ["step-00000015", "step-00000020"]


def test_checkpoints_behind_which_the_run_went_back_do_not_push_out_its_own(
    kbop_of: Callable[..., KBOP], tmp_path: Path
) -> None:
    for step in (100, 150):  # both damaged, so that the run begins anew
        save(tmp_path, kbop_of(), step)
    save(tmp_path, kbop_of(), 50)
    assert newest_state(tmp_path, print) == checkpoint_folder(tmp_path, 50)


def test_completing_a_step_leaves_the_parts_of_the_next_alone(kbop_of: Callable[..., KBOP], tmp_path: Path) -> None:
    for step in (1, 2):  # rank 1 is ahead
        save(tmp_path, kbop_of(1, 2), step)
    save(tmp_path, kbop_of(0, 2), 1)
    assert names(tmp_path) == [".step-00000002.parts", "step-00000001"]
    save(tmp_path, kbop_of(0, 2), 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_manifest_says_what_a_reader_needs(kbop_of: Callable[..., KBOP], tmp_path: Path) -> None:
    kbop = kbop_of()
    save(tmp_path, kbop, 3)
    folder = checkpoint_folder(tmp_path, 3)
    files = {"rank-0.safetensors": sha256(folder / "rank-0.safetensors")}
    assert read_facts(folder) == {"step": 3, "ranks": 1, "unit": kbop.unit, "files": files}
