"""`kbop binarize`: one job through the real store and runner, with a small script in place of the ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from jobs.records import JobRecord, JobStatus
from jobs.runner_settings import RunnerSettings
from service import binarize
from service.binarize import BinarizeRequest, run_here

SPEC = {"model": "hub/model", "data": [{"source": "builtin:python-docs"}]}
RANK = """
import hashlib, json, pathlib, sys, time
job, attempt = pathlib.Path(sys.argv[2]), sys.argv[4]
mode = json.loads((job / "spec.json").read_text())["name"]
log = (job / "attempts" / attempt / "events.jsonl").open("a", buffering=1)
say = lambda **event: log.write(json.dumps(event | {"at": time.time()}) + "\\n")
say(kind="stage", stage="train", state="started")
if mode == "slow":
    time.sleep(60)
if mode == "bad":
    error = {"code": "no_linears", "message": "nothing", "hint": "", "retryable": False, "origin": "user"}
    (job / "attempts" / attempt / "error.json").write_text(json.dumps(error))
    sys.exit(1)
if mode == "flaky" and attempt == "1":
    sys.exit(9)
packed, report = job / "work/packed", job / "work/report"
packed.mkdir(parents=True); report.mkdir()
(packed / "model.safetensors").write_bytes(b"bits")
digest = hashlib.sha256(b"bits").hexdigest()
files = [{"path": "model.safetensors", "size": 4, "sha256": digest}]
(packed / "manifest.json").write_text(json.dumps({"files": files}))
(report / "report.json").write_text("{}")
(report / "report.html").write_text("<p>")
"""


class Failed(Exception):
    """What the command line turns into an error and an exit status."""


def fail(message: str, hint: str = "", code: str = "") -> NoReturn:
    raise Failed(f"{message} {hint} [{code}]")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobRecord]:
    monkeypatch.setattr(binarize, "become_subreaper", lambda: None)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    settings = RunnerSettings(rank_command=(sys.executable, str(script)), grace_s=2.0, retry_delay_s=0.1, poll_s=0.02)

    def go(mode: str, *, work_dir: Path | None = None, force: bool = False) -> JobRecord:
        return run_here(BinarizeRequest(SPEC | {"name": mode}, tmp_path / "out", work_dir, force, settings), fail)

    return go


def test_a_job_that_succeeds_leaves_its_files_and_nothing_else(run: Callable[..., JobRecord], tmp_path: Path) -> None:
    assert run("good").status is JobStatus.SUCCEEDED
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["manifest.json", "model.safetensors", "report/report.html", "report/report.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rank.py"]


def test_a_crash_is_tried_again(run: Callable[..., JobRecord], tmp_path: Path) -> None:
    job = run("flaky", work_dir=tmp_path / "work")
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2) and (tmp_path / "work/kbop.db").exists()


def test_a_job_that_fails_leaves_no_output(run: Callable[..., JobRecord], tmp_path: Path) -> None:
    job = run("bad")
    assert job.status is JobStatus.FAILED and job.error is not None and job.error["code"] == "no_linears"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank.py"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_the_job_and_leaves_nothing(run: Callable[..., JobRecord], tmp_path: Path, number: int) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    started = time.monotonic()
    assert run("slow").status is JobStatus.CANCELLED and time.monotonic() - started < 15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank.py"]


def test_folders_with_something_in_them_are_kept_unless_forced(run: Callable[..., JobRecord], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(Failed, match="--force"):
        run("good")
    with pytest.raises(Failed, match="--work-dir"):
        run("good", force=True, work_dir=tmp_path / "out")
    assert run("good", force=True).status is JobStatus.SUCCEEDED and (tmp_path / "out/mine").read_text() == "mine"


def test_a_bad_spec_is_refused_before_anything_is_made(run: Callable[..., JobRecord], tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"/name.*\[invalid_spec\]"):
        run("not a name!")
    with pytest.raises(Failed, match=r"\[unknown_model\]"):
        run_here(BinarizeRequest(SPEC | {"model": "/nothing/here"}, tmp_path / "out"), fail)
    assert not (tmp_path / "out").exists()


def test_the_report_is_valid_json(run: Callable[..., JobRecord], tmp_path: Path) -> None:
    run("good")
    assert json.loads((tmp_path / "out/report/report.json").read_text()) == {}
