"""The table of transitions."""

from __future__ import annotations

import pytest

from jobs.records import ACTIVE, TERMINAL, TRANSITIONS, Failure, JobStatus


def test_every_status_has_a_row_of_transitions():
    assert set(TRANSITIONS) == set(JobStatus)


def test_the_terminal_statuses_are_succeeded_cancelled_and_failed():
    assert {JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.FAILED} == TERMINAL


@pytest.mark.parametrize("status", sorted(set(JobStatus) - TERMINAL))
def test_every_other_status_leads_to_an_end(status):
    reached, frontier = set(), {status}
    while frontier:
        reached |= frontier
        frontier = {to for one in frontier for to in TRANSITIONS[one]} - reached
    assert reached & TERMINAL


@pytest.mark.parametrize("status", sorted(ACTIVE - {JobStatus.CANCELLING}))
def test_every_active_status_can_be_cancelled_retried_and_failed(status):
    assert {JobStatus.CANCELLING, JobStatus.RETRYING, JobStatus.FAILED} <= TRANSITIONS[status]


def test_a_user_error_is_not_retried_whatever_it_says_of_itself():
    assert not Failure("no_data", "empty", origin="user", retryable=True).may_retry


@pytest.mark.parametrize(
    ("failure", "counts"),
    [
        (Failure("rank_killed", "x"), True),
        (Failure("interrupted", "x"), False),
        (Failure("out_of_memory", "x", retryable=True), False),
        (Failure("out_of_memory", "x", retryable=False), True),
    ],
)
def test_what_uses_up_an_attempt(failure, counts):
    assert failure.counts is counts
