"""The scheduler's decisions, with a fake place to run attempts."""

from __future__ import annotations

import pytest

from jobs.errors import SchedulerRunning
from jobs.executors.base import RunnerState
from jobs.layout import attempt_dir, job_dir
from jobs.records import JobStatus
from jobs.scheduler import Scheduler, SchedulerSettings, last_tick


class FakeExecutor:
    """Remembers what it was asked to do; `states` says what becomes of the runners."""

    def __init__(self):
        self.launched, self.stopped, self.state_of_all = [], [], RunnerState.ALIVE

    def launch(self, lease, job_dir):
        self.launched.append(lease)

    def state(self, lease, job_dir):
        return self.state_of_all

    def stop(self, lease, job_dir):
        self.stopped.append(lease)

    def reap(self):
        pass


@pytest.fixture
def executor():
    return FakeExecutor()


@pytest.fixture
def make_scheduler(store, executor, tmp_path):
    made = []

    def make(**fields):
        settings = {
            "data_dir": tmp_path,
            "devices": ("cpu:0", "cpu:1"),
            "disk_floor_bytes": 0,
            "retry_delay_s": 5,
        }
        made.append(Scheduler(store, executor, SchedulerSettings(**settings | fields)))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def test_a_tick_starts_everything_that_fits(make_scheduler, executor, submit):
    jobs = [submit() for _ in range(3)]
    make_scheduler().tick()
    assert [lease.job_id for lease in executor.launched] == [job.id for job in jobs[:2]]


def test_a_living_runner_is_left_alone_even_with_an_expired_lease(make_scheduler, executor, store, submit, clock):
    submit()
    scheduler = make_scheduler()
    scheduler.tick()
    clock.now += 10_000
    scheduler.tick()
    assert executor.stopped == [] and len(executor.launched) == 1


def test_a_living_runner_that_does_not_renew_while_we_watch_is_killed(
    make_scheduler, executor, submit, clock, monkeypatch
):
    submit()
    scheduler = make_scheduler(lease_s=30)
    scheduler.tick()
    clock.now += 31
    for watched, kills in ((500.0, 0), (529.0, 0), (531.0, 1)):
        monkeypatch.setattr("jobs.scheduler.monotonic", lambda watched=watched: watched)
        scheduler.tick()
        assert len(executor.stopped) == kills


def test_a_dead_runner_is_swept_and_its_job_retried_later(make_scheduler, executor, store, submit, clock):
    job = submit()
    scheduler = make_scheduler()
    scheduler.tick()
    executor.state_of_all = RunnerState.GONE
    scheduler.tick()
    assert store.get(job.id).status is JobStatus.QUEUED and len(executor.stopped) == 1
    clock.now += 5
    scheduler.tick()
    assert [lease.attempt for lease in executor.launched] == [1, 2]


def test_a_runner_without_a_trace_is_given_until_its_lease_ends(make_scheduler, executor, store, submit, clock):
    job = submit()
    scheduler = make_scheduler()
    scheduler.tick()
    executor.state_of_all = RunnerState.UNKNOWN
    scheduler.tick()
    assert store.get(job.id).status is JobStatus.PREPARING
    clock.now += 31
    scheduler.tick()
    assert store.get(job.id).status is JobStatus.QUEUED


def test_a_job_whose_runner_keeps_dying_fails_with_the_runners_log(make_scheduler, executor, store, submit, tmp_path):
    job = submit()
    scheduler = make_scheduler(max_attempts=1)
    scheduler.tick()
    folder = attempt_dir(job_dir(tmp_path, job.id), 1)
    folder.mkdir(parents=True)
    (folder / "runner.log").write_text("Killed\n")
    executor.state_of_all = RunnerState.GONE
    scheduler.tick()
    error = store.get(job.id).error
    assert (error["code"], error["log_tail"]) == ("runner_lost", "Killed")


def test_a_cancelled_job_whose_runner_died_is_cancelled(make_scheduler, executor, store, submit):
    job = submit()
    scheduler = make_scheduler()
    scheduler.tick()
    store.request_cancel(job.id)
    executor.state_of_all = RunnerState.GONE
    scheduler.tick()
    assert store.get(job.id).status is JobStatus.CANCELLED


def test_a_runner_that_cannot_be_started_is_a_system_error(make_scheduler, executor, store, submit, monkeypatch):
    def no_launch(*_):
        raise OSError("too many processes")

    monkeypatch.setattr(executor, "launch", no_launch)
    job = submit()
    make_scheduler(max_attempts=1).tick()
    assert store.get(job.id).error["code"] == "launch_failed"


def test_below_the_disk_floor_nothing_starts_and_jobs_say_why(make_scheduler, executor, store, submit):
    job = submit()
    make_scheduler(disk_floor_bytes=1 << 60).tick()
    assert executor.launched == []
    assert "below the floor" in store.get(job.id).waiting_reason


def test_a_second_scheduler_on_the_same_data_is_refused_until_the_first_closes(make_scheduler, tmp_path):
    first = make_scheduler()
    with pytest.raises(SchedulerRunning):
        make_scheduler()
    first.close()
    make_scheduler()


def test_the_last_tick_can_be_read_from_outside(make_scheduler, tmp_path):
    assert last_tick(tmp_path) is None
    make_scheduler().tick()
    assert last_tick(tmp_path) > 1_000_000
