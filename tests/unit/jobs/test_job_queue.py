"""The queue's rules: order, gangs, leases, retries. Each test pins one race or one promise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.errors import IllegalTransition, LeaseLost
from jobs.job_queue import MOST_HALVINGS
from jobs.records import Failure, JobStatus, NewEvent

CPUS = ("cpu:0", "cpu:1")
CRASH = Failure("rank_killed", "rank 1 was killed by SIGKILL")


def fail(store, lease, failure=CRASH, max_attempts=3):
    return store.fail(lease, failure, max_attempts=max_attempts, retry_delay_s=10)


def test_a_higher_priority_goes_first_and_then_the_older(store, submit):
    submit(seed=1)
    older = submit(seed=2, priority=5)
    submit(seed=3, priority=5)
    assert store.claim("me", CPUS, 30).job_id == older.id


def test_a_claim_takes_the_job_and_its_devices_together(store, running):
    job = store.get(running.job_id)
    assert (job.status, job.attempt, job.waiting_reason) == (JobStatus.PREPARING, 1, None)
    assert running.devices == ("cpu:0",)
    assert store.leases() == [running] and store.lease(running.job_id, running.token) == running


def test_no_device_is_given_to_two_jobs(store, submit, running):
    submit()
    second = store.claim("me", CPUS, 30)
    assert second.devices == ("cpu:1",)
    submit()
    assert store.claim("me", CPUS, 30) is None


def test_a_gang_waits_until_all_its_devices_are_free(store, submit, running):
    gang = submit(gpus=2)
    assert store.claim("me", CPUS, 30) is None
    assert store.get(gang.id).waiting_reason == "needs 2 devices, 1 of 2 free"


def test_nobody_is_let_past_a_gang_that_waits(store, submit, running):
    gang, small = submit(gpus=2), submit()
    assert store.claim("me", CPUS, 30) is None
    assert store.get(small.id).waiting_reason == f"behind {gang.id}, which needs 2 devices"


def test_a_job_too_large_for_this_server_says_so_and_holds_nobody_up(store, submit):
    large, small = submit(gpus=4), submit()
    assert store.claim("me", CPUS, 30).job_id == small.id
    assert store.get(large.id).waiting_reason == "needs 4 devices, this server has 2"


def test_holding_gives_every_waiting_job_the_reason(store, submit, running):
    waiting = submit()
    store.hold("the disk is full")
    assert store.get(waiting.id).waiting_reason == "the disk is full"
    assert store.get(running.job_id).waiting_reason is None


def test_renewing_moves_the_end_and_reports_a_cancel(store, running, clock):
    clock.now += 20
    assert not store.renew(running, 30).cancel_requested
    assert store.leases()[0].expires_at == clock.now + 30
    store.request_cancel(running.job_id)
    assert store.renew(running, 30).cancel_requested


def test_after_the_attempt_was_closed_its_holder_can_write_nothing(store, running):
    fail(store, running)
    for write in (
        lambda: store.renew(running, 30),
        lambda: store.append(running, [NewEvent("note", {})]),
        lambda: store.finish(running, JobStatus.FAILED),
        lambda: fail(store, running),
        lambda: store.lease(running.job_id, running.token),
    ):
        with pytest.raises(LeaseLost):
            write()


def test_an_old_holder_cannot_write_into_the_next_attempt(store, running, clock):
    fail(store, running)
    clock.now += 60
    second = store.claim("me", CPUS, 30)
    with pytest.raises(LeaseLost):
        store.append(running, [], status=JobStatus.RUNNING)
    assert second.attempt == 2 and store.get(second.job_id).status is JobStatus.PREPARING


def test_a_refused_write_leaves_no_event_behind(store, running):
    before = store.events(running.job_id)
    with pytest.raises(IllegalTransition):
        store.append(running, [NewEvent("note", {})], status=JobStatus.SUCCEEDED)
    assert store.events(running.job_id) == before


def test_a_job_that_is_being_cancelled_takes_no_other_status(store, running):
    store.request_cancel(running.job_id)
    store.append(running, [], status=JobStatus.RUNNING)
    assert store.get(running.job_id).status is JobStatus.CANCELLING


@pytest.mark.parametrize("end", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.RETRYING, JobStatus.CANCELLED])
def test_a_cancel_that_comes_before_the_end_wins(store, running, end):
    store.append(running, [], status=JobStatus.PUBLISHING)
    store.request_cancel(running.job_id)
    assert store.finish(running, end) is JobStatus.CANCELLED
    assert store.artifacts(running.job_id) == []


def test_the_end_of_an_attempt_frees_its_devices(store, submit, running):
    submit(gpus=2)
    fail(store, running, Failure("bad_data", "empty", origin="user"))
    assert store.claim("me", CPUS, 30).devices == CPUS


def test_a_crash_is_retried_after_a_delay_that_doubles(store, running, clock, statuses):
    assert fail(store, running) is JobStatus.QUEUED
    assert store.claim("me", CPUS, 30) is None
    assert "attempt 1 ended early" in store.get(running.job_id).waiting_reason
    clock.now += 10
    fail(store, store.claim("me", CPUS, 30))
    assert store.get(running.job_id).not_before == clock.now + 20
    assert statuses(running.job_id)[-2:] == [JobStatus.RETRYING, JobStatus.QUEUED]


def test_the_last_attempt_that_crashes_fails_the_job(store, running, clock):
    fail(store, running, max_attempts=2)
    clock.now += 100
    assert fail(store, store.claim("me", CPUS, 30), max_attempts=2) is JobStatus.FAILED
    job = store.get(running.job_id)
    assert job.error == CRASH.as_dict() and job.finished_at == clock.now
    assert [a.outcome for a in store.attempts(job.id)] == [JobStatus.RETRYING, JobStatus.FAILED]


def test_a_user_error_fails_the_job_at_the_first_attempt(store, running):
    assert fail(store, running, Failure("no_linears", "nothing to do", origin="user")) is JobStatus.FAILED


def test_interruptions_use_up_no_attempt_and_are_retried_at_once(store, running):
    lease = running
    for _ in range(5):
        assert fail(store, lease, Failure("interrupted", "stopped"), max_attempts=1) is JobStatus.QUEUED
        lease = store.claim("me", CPUS, 30)
    assert lease.attempt == 6


def test_ranks_that_run_out_of_memory_are_retried_at_once_as_long_as_they_can_do_with_less(store, running):
    lease, failure = running, Failure("out_of_memory", "the GPU is full", retryable=True)
    for _ in range(MOST_HALVINGS):
        assert fail(store, lease, failure, max_attempts=1) is JobStatus.QUEUED
        lease = store.claim("me", CPUS, 30)
    assert fail(store, lease, replace(failure, retryable=False), max_attempts=3) is JobStatus.FAILED


def test_ranks_that_never_do_with_less_memory_are_not_retried_for_ever(store, running):
    lease, failure = running, Failure("out_of_memory", "the GPU is full", retryable=True)
    for _ in range(MOST_HALVINGS):
        fail(store, lease, failure, max_attempts=1)
        lease = store.claim("me", CPUS, 30)
    assert fail(store, lease, failure, max_attempts=1) is JobStatus.FAILED


def test_a_success_after_a_retry_shows_no_error(store, running, clock):
    fail(store, running)
    clock.now += 10
    lease = store.claim("me", CPUS, 30)
    store.append(lease, [], status=JobStatus.PUBLISHING)
    store.finish(lease, JobStatus.SUCCEEDED)
    job = store.get(lease.job_id)
    assert (job.status, job.error, job.started_at) == (JobStatus.SUCCEEDED, None, clock.now - 10)
