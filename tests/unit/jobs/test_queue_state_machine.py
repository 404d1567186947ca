"""Random histories of a small server: whatever happens in whatever order, the queue's promises hold."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from jobs.errors import AlreadyFinished, IllegalTransition, LeaseLost
from jobs.records import ACTIVE, TERMINAL, TRANSITIONS, Failure, JobStatus
from jobs.spec import JobSpec
from jobs.store import Store

DEVICES = ("cpu:0", "cpu:1", "cpu:2")
WIRE = {"model": "builtin:demo", "data": [{"source": "builtin:python-docs"}]}


class QueueMachine(RuleBasedStateMachine):
    """Users, runners and a scheduler acting on one store, stale runners included."""

    template: Path
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "kbop.db"
        shutil.copy(self.template, path)
        self.store = Store(f"sqlite:///{path}", lambda: self.now)
        self.ended: dict[str, JobStatus] = {}

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def jobs(self):
        return self.store.list_jobs(limit=100).jobs

    @rule(gpus=st.integers(1, 4), priority=st.integers(-1, 1))
    def submit(self, gpus, priority):
        wire = WIRE | {"resources": {"gpus": gpus}, "priority": priority}
        self.store.submit(JobSpec.model_validate(wire))

    @rule(seconds=st.sampled_from([1, 10, 100]))
    def wait(self, seconds):
        self.now += seconds

    @rule(target=leases)
    def claim(self):
        lease = self.store.claim("machine", DEVICES, 30)
        return multiple() if lease is None else lease

    @rule(index=st.integers(0, 99))
    def cancel(self, index):
        jobs = self.jobs()
        if not jobs:
            return
        job = jobs[index % len(jobs)]
        try:
            self.store.request_cancel(job.id)
        except AlreadyFinished:
            assert job.status in TERMINAL

    @rule(lease=leases, status=st.sampled_from(sorted(ACTIVE - {JobStatus.CANCELLING})))
    def advance(self, lease, status):
        try:
            self.store.append(lease, [], status=status)
        except (LeaseLost, IllegalTransition):
            return

    @rule(lease=leases, failure=st.sampled_from([
        Failure("rank_killed", "x"), Failure("interrupted", "x"), Failure("bad", "x", origin="user"),
    ]))  # fmt: skip
    def fail(self, lease, failure):
        try:
            self.store.fail(lease, failure, max_attempts=3, retry_delay_s=5)
        except LeaseLost:
            return

    @rule(lease=consumes(leases), end=st.sampled_from([JobStatus.SUCCEEDED, JobStatus.CANCELLED]))
    def finish(self, lease, end):
        try:
            self.store.finish(lease, end)
        except (LeaseLost, IllegalTransition):
            return

    @invariant()
    def every_recorded_change_is_in_the_table(self):
        for job in self.jobs():
            changes = [e.data for e in self.store.events(job.id) if e.kind == "status"]
            assert all(after["from"] == before["to"] for before, after in itertools.pairwise(changes))
            assert all(c["to"] in TRANSITIONS[JobStatus(c["from"])] for c in changes[1:])
            assert changes[-1]["to"] == job.status

    @invariant()
    def leases_belong_to_active_jobs_and_share_no_device(self):
        leases = self.store.leases()
        devices = [device for lease in leases for device in lease.devices]
        assert len(devices) == len(set(devices)) and set(devices) <= set(DEVICES)
        assert {lease.job_id for lease in leases} == {job.id for job in self.jobs() if job.status in ACTIVE}

    @invariant()
    def an_end_is_for_ever_and_waiting_has_a_reason(self):
        for job in self.jobs():
            assert self.ended.get(job.id, job.status) is job.status
            assert bool(job.waiting_reason) == (job.status is JobStatus.QUEUED)
            assert (job.finished_at is not None) == job.status.terminal
            if job.status.terminal:
                self.ended[job.id] = job.status

    @invariant()
    def at_most_three_attempts_that_count_end_badly(self):
        for job in self.jobs():
            bad = [a for a in self.store.attempts(job.id) if (a.error or {}).get("code") == "rank_killed"]
            assert len(bad) <= 3


@pytest.mark.timeout(120)
def test_random_histories_keep_the_promises(empty_database):
    QueueMachine.template = empty_database
    few = settings(
        max_examples=20,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(QueueMachine, settings=few)
