"""Owns resumable training checkpoints: what ranks write and when, which one counts as complete, which is the newest.

Layout of a folder of checkpoints:

    step-00000050/            complete by construction: it was renamed after all ranks had written and synced
        rank-0.safetensors …  each rank's rows of evidence, moments and bits, and its part of the full-precision side
        manifest.json         number of ranks, step, unit of the evidence, sha256 of every file

Training stands still only while a rank copies its state; a thread writes it. No collective is needed: each rank leaves
its file and the file's hash in a hidden folder, and rank 0 completes the checkpoint when it has seen all of them. Any
number of ranks can read what any other has written (slices.py). A checkpoint with a missing or changed file is skipped
for the one before it.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kbop_core.checkpoint import folder_written_atomically, is_disk_full, sha256, sync, write_json
from kbop_core.engine import Engine, barrier
from kbop_core.errors import CheckpointError, DiskFull
from kbop_core.kbop import KBOP
from kbop_core.shard import Gang
from kbop_core.slices import Slice, SliceReader, copy_to_host, write_slices

#: Complete checkpoints kept.
KEEP = 2
#: Seconds that rank 0 waits for the files of the others, and how often it looks.
PEERS_S, LOOK_S = 600.0, 0.05


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, among those in `folder`."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps done in a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _parts_folder(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.parts"


def clear_unfinished(folder: Path) -> None:
    """Remove what attempts that died left half-written; one rank calls, before any of them saves."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class _Snapshot:
    """One rank's state at one moment, in host memory of its own."""

    step: int
    facts: dict[str, Any]
    slices: dict[str, Slice]


class StateWriter:
    """Writes checkpoints beside the training, one at a time.

    Args:
        folder: of all checkpoints of the run, on a file system that all ranks see.
        gang: the ranks; all of them save the same steps.
    """

    def __init__(self, folder: Path, gang: Gang) -> None:
        self._folder, self._gang = folder, gang
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, engine: Engine, kbop: KBOP) -> None:
        """Copy the state after `step` steps and begin to write it; waits for the write before, and for nothing else.

        Args:
            step: steps done.
            engine, kbop: what is saved.

        Raises:
            DiskFull: the write before this one met it.
            CheckpointError: another rank's file did not come.
        """
        self.wait()
        facts = {"step": step, "ranks": self._gang.size, "unit": kbop.unit}
        snapshot = _Snapshot(step, facts, copy_to_host(kbop.state() | engine.state()))
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is written; on rank 0: complete. Raises as `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: _Snapshot) -> None:
        try:
            parts = _parts_folder(self._folder, snapshot.step)
            parts.mkdir(parents=True, exist_ok=True)
            _write_rank(parts, self._gang.rank, snapshot.slices)
            if self._gang.rank == 0:
                final = checkpoint_folder(self._folder, snapshot.step)
                _await_ranks(parts, self._gang.size)
                _complete(parts, final, snapshot.facts)
                _prune(self._folder, final)
        except BaseException as error:  # raised again where training can hear it
            self._error = error


def save_state(folder: Path, step: int, engine: Engine, kbop: KBOP, gang: Gang) -> None:
    """Write one checkpoint and wait until it is complete; every rank calls. Raises as `StateWriter.save`."""
    writer = StateWriter(folder, gang)
    writer.save(step, engine, kbop)
    writer.wait()
    barrier(gang)


def _write_rank(parts: Path, rank: int, slices: dict[str, Slice]) -> None:
    path = parts / _rank_file(rank)
    try:
        write_slices(slices, path)
        sync(path)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise DiskFull("no space left while writing a training checkpoint", "free disk space and resume") from error
        raise
    write_json(parts / f"rank-{rank}.json", {path.name: sha256(path)})


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _await_ranks(parts: Path, size: int) -> None:
    """Until every rank has written its file and hash."""
    never = threading.Event()
    for _ in range(math.ceil(PEERS_S / LOOK_S)):
        missing = [rank for rank in range(size) if not (parts / f"rank-{rank}.json").is_file()]
        if not missing:
            return
        never.wait(LOOK_S)
    raise CheckpointError(
        f"rank {missing[0]} has not written its part of {parts.name} within {PEERS_S:.0f} s",
        "all ranks must see the job's folder; see the rank's log",
    )


def _complete(parts: Path, final: Path, facts: dict[str, Any]) -> None:
    files: dict[str, str] = {}
    with folder_written_atomically(final) as folder:
        for rank in range(facts["ranks"]):
            files |= json.loads((parts / f"rank-{rank}.json").read_text())
            (parts / _rank_file(rank)).rename(folder / _rank_file(rank))
        write_json(folder / "manifest.json", facts | {"files": files})
    shutil.rmtree(parts)


def _prune(folder: Path, newest: Path) -> None:
    """Keep the newest and those before it; later ones are damaged: the run went back behind them."""
    found = sorted(folder.glob("step-*"))
    kept = [checkpoint for checkpoint in found if checkpoint.name <= newest.name][-KEEP:]
    for other in set(found) - set(kept):
        shutil.rmtree(other)
    for left in folder.glob(".step-*"):  # of a full disk; another rank may have begun the next one
        if left.name < f".{newest.name}":
            shutil.rmtree(left, ignore_errors=True)


def newest_state(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; None when there is none.

    Args:
        warn: told of each that is skipped, and why.
    """
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(candidate)
        if problem is None:
            return candidate
        warn(f"checkpoint {candidate.name} skipped: {problem}")
    return None


def _problem(folder: Path) -> str | None:
    try:
        facts = read_facts(folder)
        changed = [name for name, digest in facts["files"].items() if sha256(folder / name) != digest]
        if {"step", "unit"} - facts.keys() or len(facts["files"]) != facts["ranks"]:
            return "its manifest is incomplete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable ({error})"
    return f"{changed[0]} is not what was written" if changed else None


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """The manifest: step, ranks, unit, files."""
    facts: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    return facts


def load_state(checkpoint: Path, engine: Engine, kbop: KBOP) -> int:
    """Take a checkpoint back, by whatever number of ranks it was written; every rank calls.

    Returns:
        Steps done.

    Raises:
        BadCheckpoint: of another model or with another kind of evidence.
    """
    facts = read_facts(checkpoint)
    saved = SliceReader(sorted(checkpoint.glob("rank-*.safetensors")))
    engine.load(saved, facts["step"])
    kbop.load(saved, facts["step"], facts["unit"])
    return int(facts["step"])
