"""A rank without torch: keeps the runner's contract and misbehaves as its job's name says.

Refuses to compute anything. Names: `succeeds`, `killed-once`, `killed-always`, `user-error`, `waits`,
`waits-once`, `damaged`, `port-taken-once`, `memory-once`, `hangs-in-training-once`, `ignores-sigterm`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from jobs.process import die_with_parent

STAGES = ("prepare", "init", "train", "pack", "evaluate")


def main() -> int:
    die_with_parent(int(os.environ["KBOP_PARENT_PID"]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    parser = argparse.ArgumentParser()
    parser.add_argument("--job-dir", type=Path)
    parser.add_argument("--attempt", type=int)
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    folder = options.job_dir / "attempts" / str(options.attempt)
    (folder / f"env{rank}.json").write_text(json.dumps(dict(os.environ)))
    print(f"rank {rank} of attempt {options.attempt} is up", flush=True)
    name = json.loads((options.job_dir / "spec.json").read_text())["name"]
    if name.endswith("-once") and options.attempt > 1:
        name = "succeeds"
    return behave(name.removesuffix("-once"), rank, options.job_dir, folder)


def behave(name: str, rank: int, job_dir: Path, folder: Path) -> int:
    if name in ("succeeds", "damaged"):
        return work(job_dir, folder, damaged=name == "damaged") if rank == 0 else 0
    last = int(os.environ["WORLD_SIZE"]) - 1
    if name in ("killed", "killed-always") and rank == last:
        while last > 0 and not (folder / "waiting0").exists():
            time.sleep(0.02)
        print("about to be killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "user-error" and rank == last:
        return explain(folder, code="no_linears", message="nothing to binarize", origin="user", retryable=False)
    if name == "port-taken" and rank == last:
        return explain(folder, code="port_taken", message="address already in use", retryable=True)
    if name == "memory" and rank == last:
        return explain(folder, code="out_of_memory", message="the GPU is full", retryable=True)
    if name == "hangs-in-training" and rank == 0:
        emit(folder, kind="stage", stage="train", state="started")
        emit(folder, kind="progress", stage="train", step=1, steps=2)
    if name in ("ignores-sigterm", "hangs-in-training"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"waiting{rank}").touch()
    while True:
        time.sleep(0.02)


def explain(folder: Path, **error: object) -> int:
    (folder / "error.json").write_text(json.dumps({"hint": "", "origin": "system"} | error))
    return 1


def work(job_dir: Path, folder: Path, damaged: bool) -> int:
    """Every stage, as rank 0: events, the packed folder, the report."""
    for stage in STAGES:
        emit(folder, kind="stage", stage=stage, state="started")
        if stage == "train":
            emit(folder, kind="progress", stage=stage, step=1, steps=2, eta_s=1.5, metrics={"loss": 1.25})
        if stage == "pack":
            pack(job_dir / "work" / "packed", damaged)
        emit(folder, kind="stage", stage=stage, state="finished", seconds=0.1)
    report = job_dir / "work" / "report"
    report.mkdir(parents=True, exist_ok=True)
    (report / "report.json").write_text("{}")
    (report / "report.html").write_text("<p>report</p>")
    return 0


def pack(folder: Path, damaged: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"signs")
    digest = hashlib.sha256(b"other signs" if damaged else b"signs").hexdigest()
    files = [{"path": "model.safetensors", "size": 5, "sha256": digest}]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def emit(folder: Path, **event: object) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"at": time.time()} | event) + "\n")


if __name__ == "__main__":
    sys.exit(main())
