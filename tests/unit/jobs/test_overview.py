"""The store at a glance: counts, failures, what runs, and who waits longest."""

from __future__ import annotations

from jobs.records import Failure, JobStatus


def test_an_empty_store_counts_every_status_as_zero(store):
    found = store.overview()
    assert found.jobs == dict.fromkeys(JobStatus, 0)
    assert (found.failures, found.active, found.devices_in_use, found.waiting_since) == ({}, (), 0, None)


def test_a_running_job_is_active_and_holds_its_devices(store, running):
    found = store.overview()
    assert [job.id for job in found.active] == [running.job_id] and found.devices_in_use == 1
    assert found.jobs[JobStatus.PREPARING] == 1 and sum(found.jobs.values()) == 1


def test_the_longest_wait_counts_from_the_oldest_queued_job(store, submit, clock):
    submit()
    clock.now += 10
    submit()
    assert store.overview().waiting_since == 1_000_000.0


def test_a_job_between_attempts_waits_from_the_end_of_its_pause(store, running, clock):
    store.finish(running, JobStatus.RETRYING, retry_at=clock.now + 5)
    assert store.overview().waiting_since == clock.now + 5


def test_failed_jobs_are_counted_by_code(store, submit):
    for code in ("rank_killed", "rank_killed", "out_of_disk"):
        submit()
        lease = store.claim("tester", ["cpu:0"], 30)
        store.fail(lease, Failure(code, "it broke", retryable=False), max_attempts=3, retry_delay_s=5)
    found = store.overview()
    assert found.failures == {"rank_killed": 2, "out_of_disk": 1} and found.jobs[JobStatus.FAILED] == 3
    assert found.active == () and found.devices_in_use == 0


def test_a_failure_without_a_record_counts_as_unknown(store, running):
    store.finish(running, JobStatus.FAILED)
    assert store.overview().failures == {"unknown": 1}
