"""What rank 0 writes into events.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import journal as journal_module
from jobs.journal import Journal


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ranks_without_a_file_write_nothing() -> None:
    silent = Journal(None)
    silent.stage("train", "started")
    silent.progress(1, 2, loss=1.0)


def test_progress_is_thinned_out_but_the_last_step_is_always_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    journal.stage("train", "started")
    for step in range(1, 101):
        journal.progress(step, 100, loss=float(step))
    steps = [e["step"] for e in written(tmp_path / "events.jsonl") if e["kind"] == "progress"]
    assert steps[-1] == 100 and len(steps) < 50


def test_the_time_left_follows_from_the_pace_since_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 100.0, 104.0])  # the stage loads for 100 s, then four steps take 4 s
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: next(clock))
    journal = Journal(tmp_path / "events.jsonl")
    journal.stage("train", "started")
    journal.progress(1, 9)
    journal.progress(5, 9)
    assert [e.get("eta_s") for e in written(tmp_path / "events.jsonl")][1:] == [None, 4.0]


@pytest.mark.parametrize("steps", [50, 9])
def test_a_part_of_a_stage_has_a_pace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    clock = iter([0.0, 1.0, 1001.0, 1002.0, 1006.0])  # what comes first takes 500 s a step, the rest 1 s
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: next(clock))
    journal = Journal(tmp_path / "events.jsonl")
    journal.stage("train", "started")
    for step, of in ((7, 9), (9, 9), (2, steps), (6, steps)):
        journal.progress(step, of)
    assert written(tmp_path / "events.jsonl")[-1]["eta_s"] == steps - 6


def test_a_finished_stage_says_its_seconds(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    journal.stage("pack", "finished", 1.23456)
    (event,) = written(tmp_path / "events.jsonl")
    assert (event["stage"], event["state"], event["seconds"]) == ("pack", "finished", 1.235)
