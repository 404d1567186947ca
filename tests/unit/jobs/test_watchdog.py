"""When ranks that run count as getting nowhere."""

from __future__ import annotations

import pytest

from jobs.failures import stalled
from jobs.records import NewEvent
from jobs.watchdog import OTHERS, Stall, Watchdog


@pytest.fixture
def dog(clock):
    return Watchdog(100, clock)


def step(number):
    return NewEvent("progress", {"stage": "train", "step": number, "steps": 9})


def stage(name):
    return NewEvent("stage", {"stage": name, "state": "started"})


def test_training_that_has_begun_to_step_may_pause_for_the_limit_only(dog, clock):
    dog.saw(step(1))
    clock.now += 100
    assert dog.stall() is None
    clock.now += 1
    assert dog.stall() == Stall("train", 101, 100)


def test_every_step_starts_the_time_again(dog, clock):
    for number in (1, 2, 3):
        dog.saw(step(number))
        clock.now += 99
        assert dog.stall() is None


@pytest.mark.parametrize("event", [stage("prepare"), stage("train"), stage("evaluate"), step(9)])
def test_stages_that_say_little_and_the_save_after_training_get_longer(dog, clock, event):
    dog.saw(event)
    clock.now += OTHERS * 100
    assert dog.stall() is None
    clock.now += 1
    assert dog.stall().stage == event.data["stage"]


def test_ranks_that_never_say_anything_are_noticed_too(dog, clock):
    clock.now += OTHERS * 100 + 1
    assert dog.stall() == Stall("", OTHERS * 100 + 1, OTHERS * 100)


def test_a_note_is_progress_and_keeps_the_stage(dog, clock):
    dog.saw(step(1))
    clock.now += 60
    dog.saw(NewEvent("note", {"message": "checkpoint saved"}))
    clock.now += 60
    assert dog.stall() is None


def test_a_stall_names_its_stage_how_long_it_took_and_the_setting(tmp_path):
    failure = stalled(Stall("train", 101.2, 100), tmp_path)
    assert failure.message == "no progress for 101 s in stage train (allowed: 100 s)"
    assert "KBOP_WATCHDOG_S" in failure.hint and failure.may_retry and failure.counts
