"""What users of the store see: submissions, lists, cancels, events, artifacts."""

from __future__ import annotations

import base64

import pytest

from jobs.errors import (
    AlreadyFinished,
    BadCursor,
    IdempotencyMismatch,
    SchemaMismatch,
    UnknownArtifact,
    UnknownJob,
)
from jobs.records import ArtifactRecord, JobStatus, NewEvent
from jobs.store import Store


def test_a_submitted_job_waits_and_says_why(store, spec):
    job = store.submit(spec(name="first")).job
    assert (job.status, job.attempt, job.name) == (JobStatus.QUEUED, 0, "first")
    assert job.waiting_reason


def test_the_stored_spec_has_every_default_filled_in(store, spec):
    asked = spec()
    assert store.submit(asked).job.spec == asked.model_dump(mode="json")


def test_the_same_key_and_request_find_the_first_job(store, spec):
    first = store.submit(spec(), idempotency_key="k")
    again = store.submit(spec(), idempotency_key="k")
    assert first.created and not again.created and again.job.id == first.job.id
    assert len(store.list_jobs().jobs) == 1


def test_the_same_key_with_another_request_is_refused(store, spec):
    store.submit(spec(seed=1), idempotency_key="k")
    with pytest.raises(IdempotencyMismatch):
        store.submit(spec(seed=2), idempotency_key="k")


def test_the_callers_request_hash_decides_what_the_same_request_is(store, spec):
    store.submit(spec(seed=1), idempotency_key="k", request_hash="h")
    assert not store.submit(spec(seed=2), idempotency_key="k", request_hash="h").created


def test_pages_are_newest_first_and_stable_while_jobs_arrive(store, submit):
    ids = [submit().id for _ in range(5)]
    first = store.list_jobs(limit=2)
    submit()
    second = store.list_jobs(limit=2, cursor=first.next_cursor)
    third = store.list_jobs(limit=2, cursor=second.next_cursor)
    assert [job.id for page in (first, second, third) for job in page.jobs] == ids[::-1]
    assert third.next_cursor is None


def test_a_list_can_be_limited_to_one_status(store, submit, running):
    waiting = submit()
    assert [job.id for job in store.list_jobs(status=JobStatus.QUEUED).jobs] == [waiting.id]


@pytest.mark.parametrize("cursor", ["", "!", "bm90IGEgbnVtYmVy", "é", "a"])
def test_a_foreign_cursor_is_refused(store, cursor):
    with pytest.raises(BadCursor):
        store.list_jobs(cursor=cursor)


def test_a_waiting_job_is_cancelled_at_once(store, submit, clock):
    job = store.request_cancel(submit().id)
    assert (job.status, job.finished_at, job.waiting_reason) == (JobStatus.CANCELLED, clock.now, None)


def test_a_running_job_is_asked_to_stop_and_asking_twice_is_asking_once(store, running, statuses):
    store.request_cancel(running.job_id)
    job = store.request_cancel(running.job_id)
    assert job.status is JobStatus.CANCELLING and job.cancel_requested
    assert statuses(running.job_id).count(JobStatus.CANCELLING) == 1


def test_a_finished_job_cannot_be_cancelled(store, submit):
    job = store.request_cancel(submit().id)
    with pytest.raises(AlreadyFinished):
        store.request_cancel(job.id)


def test_a_cancel_names_its_actor_in_the_event(store, submit):
    job = store.request_cancel(submit().id, actor="ada")
    assert store.events(job.id)[-1].actor == "ada"


def test_events_after_an_id_are_the_later_ones(store, running):
    store.append(running, [NewEvent("note", {"message": str(i)}) for i in range(3)])
    every = store.events(running.job_id)
    assert [e.id for e in every] == sorted({e.id for e in every})
    assert store.events(running.job_id, after=every[1].id) == every[2:]
    assert store.events(running.job_id, limit=1) == every[:1]


def test_artifacts_are_found_by_path_and_counted(store, running):
    record = ArtifactRecord(running.job_id, "model.safetensors", 3, "ab" * 32)
    store.append(running, [], status=JobStatus.PUBLISHING)
    store.finish(running, JobStatus.SUCCEEDED, artifacts=[record])
    assert store.artifact(running.job_id, record.path) == record
    assert store.artifacts(running.job_id) == [record]
    assert store.artifact_counts([running.job_id, "job_x"]) == {running.job_id: 1, "job_x": 0}


def test_an_artifact_that_is_not_there_is_unknown(store, submit):
    with pytest.raises(UnknownArtifact):
        store.artifact(submit().id, "model.safetensors")


@pytest.mark.parametrize("ask", ["get", "events", "artifacts", "attempts", "request_cancel"])
def test_every_question_about_an_unknown_job_says_so(store, ask):
    with pytest.raises(UnknownJob):
        getattr(store, ask)("job_0")


def test_ping_accepts_the_current_schema_and_refuses_an_empty_database(store, tmp_path):
    store.ping()
    with pytest.raises(SchemaMismatch):
        Store(f"sqlite:///{tmp_path}/other.db").ping()


def test_a_store_in_memory_is_refused():
    with pytest.raises(ValueError, match="names no file"):
        Store("sqlite://")


def test_a_cursor_beyond_any_row_number_is_refused_and_not_a_crash(store: Store) -> None:
    cursor = base64.urlsafe_b64encode(str(2**70).encode()).decode()
    with pytest.raises(BadCursor):
        store.list_jobs(cursor=cursor)
