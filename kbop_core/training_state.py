"""Owns resumable training checkpoints: what ranks write, when one counts as complete, which is the newest.

Layout of a folder of checkpoints:

    step-00000050/            complete by construction: it was renamed after all ranks had written and synced
        rank-0.safetensors …  each rank's evidence and bits
        engine/               DeepSpeed's files
        manifest.json         number of ranks, step, sha256 of every file

Refuses to load a checkpoint with a missing or changed file: it is skipped for the one before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from kbop_core.checkpoint import folder_written_atomically, is_disk_full, sha256, write_json, write_tensors
from kbop_core.engine import Engine, barrier
from kbop_core.errors import DiskFull
from kbop_core.kbop import KBOP
from kbop_core.shard import Gang

KEEP = 2
"""Complete checkpoints kept."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, among those in `folder`."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps done in a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def save_state(folder: Path, step: int, engine: Engine, kbop: KBOP, gang: Gang) -> None:
    """Write one checkpoint; every rank calls. On return it is complete.

    Args:
        folder: of all checkpoints of the run.
        step: steps done.

    Raises:
        DiskFull: on the ranks that met it; no checkpoint with this name exists then.
    """
    final = checkpoint_folder(folder, step)
    temporary = folder / f".{final.name}.parts"
    if gang.rank == 0:
        for left in folder.glob(".step-*"):  # of an attempt that died, or of a full disk
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(gang)
    try:
        _write_rank(temporary, kbop, gang)
        engine.save(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_disk_full(error):
            raise DiskFull("no space left while writing a training checkpoint", "free disk space and resume") from error
        raise
    barrier(gang)
    if gang.rank == 0:
        _complete(temporary, final, step, gang.size)
        _prune(folder)
    barrier(gang)


def _write_rank(folder: Path, kbop: KBOP, gang: Gang) -> None:
    state = kbop.state_dict()
    tensors = {n: t.contiguous() for n, t in state["tensors"].items()}
    header = {"rows": json.dumps(state["rows"]), "steps_done": str(state["steps_done"]), "unit": repr(state["unit"])}
    write_tensors(tensors, folder / f"rank-{gang.rank}.safetensors", header)


def _complete(temporary: Path, final: Path, step: int, ranks: int) -> None:
    with folder_written_atomically(final) as folder:
        for path in list(temporary.iterdir()):
            path.rename(folder / path.name)
        files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        write_json(folder / "manifest.json", {"step": step, "ranks": ranks, "files": files})
    shutil.rmtree(temporary)


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def newest_state(folder: Path, ranks: int, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint that this many ranks can load; None when there is none.

    Args:
        warn: told of each that is skipped, and why.
    """
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(candidate, ranks)
        if problem is None:
            return candidate
        warn(f"checkpoint {candidate.name} skipped: {problem}")
    return None


def _problem(folder: Path, ranks: int) -> str | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        if manifest["ranks"] != ranks:
            return f"written by {manifest['ranks']} ranks, this run has {ranks}"
        changed = [name for name, digest in manifest["files"].items() if sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable ({error})"
    return f"{changed[0]} is not what was written" if changed else None


def load_state(folder: Path, engine: Engine, kbop: KBOP, gang: Gang) -> int:
    """Take one checkpoint back; every rank calls.

    Returns:
        Steps done.
    """
    path = folder / f"rank-{gang.rank}.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    engine.load(folder)
    kbop.load_state_dict(
        {
            "steps_done": int(header["steps_done"]),
            "rows": {n: tuple(r) for n, r in json.loads(header["rows"]).items()},
            "unit": float(header["unit"]),
            "tensors": tensors,
        }
    )
    return int(header["steps_done"])
