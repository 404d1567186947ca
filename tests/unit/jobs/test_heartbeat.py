"""The heartbeat: cancels, lost leases, a database that does not answer."""

from __future__ import annotations

import pytest

from jobs.errors import LeaseLost, StoreUnavailable
from jobs.heartbeat import Heartbeat
from jobs.records import JobStatus


def test_a_cancel_request_is_noticed(store, running, until):
    with Heartbeat(store, running, 30, every_s=0.01) as heartbeat:
        store.request_cancel(running.job_id)
        until(lambda: heartbeat.cancel_requested)
        heartbeat.check()


def test_a_lease_that_was_taken_away_is_noticed(store, running, until):
    with Heartbeat(store, running, 30, every_s=0.01) as heartbeat:
        store.finish(running, JobStatus.FAILED)
        until(lambda: heartbeat.lost)
        with pytest.raises(LeaseLost):
            heartbeat.check()


def test_a_lease_that_could_not_be_renewed_in_time_counts_as_lost(store, running, until, monkeypatch):
    def no_answer(*_):
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(store, "renew", no_answer)
    with Heartbeat(store, running, 0.3, every_s=0.01) as heartbeat:
        assert not heartbeat.lost
        until(lambda: heartbeat.lost)


def test_the_lease_is_renewed_again_and_again(store, running, clock, until):
    with Heartbeat(store, running, 30, every_s=0.01):
        clock.now += 1000
        until(lambda: store.leases()[0].expires_at == clock.now + 30)


def test_a_heartbeat_that_fails_in_an_unforeseen_way_gives_up_the_lease(store, running, until, monkeypatch):
    def broken(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(store, "renew", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with Heartbeat(store, running, 30, every_s=0.01) as heartbeat:
        until(lambda: heartbeat.lost)
