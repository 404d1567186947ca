"""Scheduler, local executor, runner and store as they are, on SQLite, with ranks that pretend to train."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest

import jobs
from jobs.artifacts import ArtifactStore
from jobs.errors import LeaseLost, SchedulerRunning
from jobs.layout import artifacts_dir
from jobs.records import JobStatus
from tests.integration.fake_ranks_server import DEVICES, HARD, QUICK, FakeRanksServer, ranks, read

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRanksServer]:
    monkeypatch.setenv("PYTHONPATH", str(Path(jobs.__file__).parents[1]))
    monkeypatch.setenv("KBOP_API_KEY", "secret")
    server = FakeRanksServer(tmp_path)
    yield server
    server.close()


def test_a_job_goes_through_every_status_and_is_published(server):
    job = server.until_ended(server.submit("succeeds"))
    assert job.status is JobStatus.SUCCEEDED, job.error
    active = ["preparing", "running", "evaluating", "publishing"]
    assert server.statuses(job.id) == ["queued", *active, "succeeded"]
    paths = ["manifest.json", "model.safetensors", "report/report.html", "report/report.json"]
    assert [a.path for a in server.store.artifacts(job.id)] == paths
    blob = server.store.artifact(job.id, "model.safetensors")
    assert ArtifactStore(artifacts_dir(server.data_dir)).path(blob.sha256).read_bytes() == b"signs"
    assert server.store.leases() == []


def test_progress_and_the_runners_facts_are_kept(server):
    job_id = server.submit("succeeds")
    server.until_ended(job_id)
    folder = server.folder(job_id)
    progress = [e.data for e in server.store.events(job_id) if e.kind == "progress"]
    assert [p["metrics"] for p in progress] == [{"loss": 1.25}]
    facts = read(folder / "exit.json")
    assert (facts["status"], facts["exit_codes"], facts["error"]) == ("succeeded", [0, 0], None)
    assert read(folder / "launch.json")["world_size"] == 2


def test_ranks_get_their_place_but_no_credentials(server):
    job_id = server.submit("succeeds")
    server.until_ended(job_id)
    launch = read(server.folder(job_id) / "launch.json")
    for rank in range(2):
        env = read(server.folder(job_id) / f"env{rank}.json")
        assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_PORT"]) == (
            str(rank),
            "2",
            str(launch["master_port"]),
        )
        kept = {"KBOP_DEVICE", "KBOP_ATTEMPT_TAG", "KBOP_PARENT_PID"}
        assert {name for name in env if name.startswith("KBOP_")} == kept


def test_no_secret_is_on_the_runners_command_line(server):
    job_id = server.submit("waits")
    folder = server.until_ranks_wait(job_id)
    command = " ".join(psutil.Process(read(folder / "runner.json")["pid"]).cmdline())
    assert server.store.leases()[0].token not in command and "sqlite" not in command


def test_a_rank_that_is_killed_ends_its_gang_and_the_job_is_retried(server):
    job_id = server.submit("killed-once")
    job = server.until_ended(job_id)
    assert (job.status, job.attempt, job.error) == (JobStatus.SUCCEEDED, 2, None)
    first = server.store.attempts(job_id)[0]
    assert (first.outcome, first.error["code"]) == (JobStatus.RETRYING, "rank_killed")
    assert first.error["log_tail"].endswith("about to be killed")
    assert read(server.folder(job_id) / "exit.json")["exit_codes"] == [75, -9]


def test_a_job_whose_ranks_are_always_killed_fails_after_its_attempts(server):
    job = server.until_ended(server.submit("killed-always"))
    assert (job.status, job.attempt, job.error["origin"]) == (JobStatus.FAILED, 2, "system")


def test_a_user_error_fails_the_job_without_another_attempt(server):
    job = server.until_ended(server.submit("user-error"))
    assert (job.status, job.attempt) == (JobStatus.FAILED, 1)
    assert (job.error["code"], job.error["origin"]) == ("no_linears", "user")
    assert "rank 1 of attempt 1 is up" in job.error["log_tail"]


def test_a_port_that_was_taken_is_tried_again_with_another(server):
    job_id = server.submit("port-taken-once")
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED
    ports = {read(server.folder(job_id, n) / "launch.json")["master_port"] for n in (1, 2)}
    assert len(ports) == 2


def test_ranks_that_can_do_with_less_memory_get_another_attempt_although_none_is_left(server):
    server.scheduler.close()
    server.start(replace(QUICK, max_attempts=1))
    job_id = server.submit("memory-once")
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED
    assert server.store.attempts(job_id)[0].error["code"] == "out_of_memory"


def test_a_cancel_lets_the_ranks_stop_and_frees_the_devices(server):
    job_id = server.submit("waits")
    folder = server.until_ranks_wait(job_id)
    server.store.request_cancel(job_id)
    assert server.until_ended(job_id).status is JobStatus.CANCELLED
    assert read(folder / "exit.json")["exit_codes"] == [75, 75]
    assert server.until_ended(server.submit("succeeds")).status is JobStatus.SUCCEEDED


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace_period(tmp_path, server):
    server.scheduler.close()
    server.start(HARD)
    job_id = server.submit("ignores-sigterm")
    folder = server.until_ranks_wait(job_id)
    server.store.request_cancel(job_id)
    assert server.until_ended(job_id).status is JobStatus.CANCELLED
    assert read(folder / "exit.json")["exit_codes"] == [-9, -9]


def test_when_the_runner_is_killed_its_ranks_die_and_the_job_is_retried(server):
    job_id = server.submit("waits-once")
    folder = server.until_ranks_wait(job_id)
    os.kill(read(folder / "runner.json")["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while ranks(job_id):  # nobody ticks here: it is the kernel that ends them
        assert time.monotonic() < deadline
    job = server.until_ended(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    assert server.store.attempts(job_id)[0].error["code"] == "runner_lost"


def test_a_runner_that_is_told_to_stop_sends_its_job_back_without_using_up_an_attempt(server):
    job_id = server.submit("waits-once")
    folder = server.until_ranks_wait(job_id)
    os.kill(read(folder / "runner.json")["pid"], signal.SIGTERM)
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED
    assert server.store.attempts(job_id)[0].error["code"] == "interrupted"
    assert read(folder / "exit.json")["exit_codes"] == [75, 75]


def test_a_restarted_server_leaves_a_living_runner_alone(server):
    job_id = server.submit("waits")
    folder = server.until_ranks_wait(job_id)
    runner, before = read(folder / "runner.json"), {process.pid for process in ranks(job_id)}
    server.scheduler.close()
    server.start()
    for _ in range(5):
        server.scheduler.tick()
    assert {process.pid for process in ranks(job_id)} == before
    assert read(folder / "runner.json") == runner and server.store.get(job_id).attempt == 1
    server.store.request_cancel(job_id)
    assert server.until_ended(job_id).status is JobStatus.CANCELLED


def test_a_job_that_ends_while_no_server_runs_is_published_all_the_same(server):
    job_id = server.submit("succeeds")
    server.scheduler.tick()
    server.scheduler.close()
    deadline = time.monotonic() + 30
    while not server.store.get(job_id).status.terminal:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.start().tick()
    assert server.store.get(job_id).status is JobStatus.SUCCEEDED and len(server.store.attempts(job_id)) == 1


def test_a_runner_that_lost_its_lease_kills_its_ranks_and_writes_nothing_more(server):
    job_id = server.submit("waits")
    lease = server.claim()
    folder = server.folder(job_id)

    def take_away() -> None:
        while not all((folder / f"waiting{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        server.store.finish(lease, JobStatus.FAILED, error={"code": "taken"})

    thief = threading.Thread(target=take_away)
    thief.start()
    with pytest.raises(LeaseLost):
        server.run_here(lease)
    thief.join()
    assert ranks(job_id) == [] and not (folder / "exit.json").exists()
    assert server.store.get(job_id).error == {"code": "taken"}


def test_an_attempt_runs_in_this_process_without_a_server(server):
    job_id = server.submit("succeeds")
    assert server.run_here(server.claim()) is JobStatus.SUCCEEDED
    assert len(server.store.artifacts(job_id)) == 4


def test_a_stop_set_by_the_caller_sends_the_job_back(server):
    server.submit("waits")
    stop = threading.Event()
    stop.set()
    assert server.run_here(server.claim(), stop=stop) is JobStatus.QUEUED


def test_a_disk_that_fills_up_while_publishing_leaves_no_artifact_and_is_retried(server, monkeypatch):
    job_id = server.submit("succeeds")

    def full(_source: object, target: BinaryIO) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("jobs.artifacts._copy", full)
        assert server.run_here(server.claim()) is JobStatus.QUEUED
    assert server.store.attempts(job_id)[0].error["code"] == "disk_full"
    assert [p for p in artifacts_dir(server.data_dir).rglob("*") if p.is_file()] == []
    assert server.store.artifacts(job_id) == []
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED


def test_a_checkpoint_that_is_not_what_its_manifest_says_fails_the_job(server):
    job = server.until_ended(server.submit("damaged"))
    assert (job.status, job.attempt, job.error["code"]) == (JobStatus.FAILED, 1, "hash_mismatch")
    assert server.store.artifacts(job.id) == []


def test_a_runner_that_cannot_start_its_ranks_says_so(server):
    server.scheduler.close()
    server.start(replace(QUICK, rank_command=("/no/such/program",)))
    job = server.until_ended(server.submit("succeeds"))
    assert (job.status, job.error["code"]) == (JobStatus.FAILED, "runner_crashed")
    assert "/no/such/program" in job.error["message"]


def test_ranks_that_get_nowhere_are_ended_and_the_job_is_retried(server):
    server.scheduler.close()
    server.start(replace(QUICK, watchdog_s=2, peer_grace_s=0.2))
    job_id = server.submit("hangs-in-training-once")
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED
    error = server.store.attempts(job_id)[0].error
    assert error["code"] == "stalled" and "in stage train (allowed: 2 s)" in error["message"]
    assert ranks(job_id) == []


def test_two_schedulers_on_one_data_directory_are_refused(server):
    with pytest.raises(SchedulerRunning):
        server.start()


def test_two_small_jobs_run_at_the_same_time_on_different_devices(server):
    ids = [server.submit("waits", gpus=1), server.submit("waits", gpus=1)]
    server.until(lambda: all((server.folder(job_id) / "waiting0").exists() for job_id in ids))
    devices = [device for lease in server.store.leases() for device in lease.devices]
    assert sorted(devices) == sorted(DEVICES)
    for job_id in ids:
        server.store.request_cancel(job_id)
    assert all(server.until_ended(job_id).status is JobStatus.CANCELLED for job_id in ids)
