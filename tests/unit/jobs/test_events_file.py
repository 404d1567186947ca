"""The events file: torn lines, damaged lines, and what events mean for the job."""

from __future__ import annotations

import json

import pytest

from jobs.errors import StoreUnavailable
from jobs.events import EventForwarder, EventTail, batches, progress_of
from jobs.records import JobStatus, NewEvent


def stage(name, state="started"):
    return NewEvent("stage", {"stage": name, "state": state})


def line(kind, **data):
    return json.dumps({"kind": kind, "at": 1.0, **data}) + "\n"


def test_each_complete_line_is_read_once(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.read() == []
    whole = line("note", message="one")
    path.write_text(whole + whole[:10])
    assert [e.data["message"] for e in tail.read()] == ["one"]
    path.write_text(whole + whole)
    assert len(tail.read()) == 1 and tail.read() == []


@pytest.mark.parametrize("text", ["nonsense", "[]", "3", '{"kind": "note"}', '{"kind": "status", "at": 1}', "\x00"])
def test_a_line_that_is_no_event_becomes_a_note(tmp_path, text):
    (tmp_path / "e").write_text(text + "\n" + line("note", message="next"))
    bad, good = EventTail(tmp_path / "e").read()
    assert bad.kind == "note" and "unreadable" in bad.data["message"]
    assert good.data == {"message": "next"}


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    (tmp_path / "e").write_text('{"kind": "progress", "at": 1, "metrics": {"loss": NaN}}\n')
    assert EventTail(tmp_path / "e").read()[0].data["metrics"] == {"loss": None}


def test_statuses_follow_the_stages_and_never_go_back():
    events = [
        stage("prepare"),
        stage("init"),
        stage("train"),
        stage("init"),
        stage("pack"),
        stage("evaluate"),
    ]
    found = [batch.status for batch in batches(events, JobStatus.PREPARING)]
    assert found == [JobStatus.RUNNING, JobStatus.EVALUATING, None]


def test_skipped_stages_change_nothing():
    assert [b.status for b in batches([stage("train", "skipped")], JobStatus.PREPARING)] == [None]


@pytest.mark.parametrize(
    ("step", "steps", "percent"),
    [(0, 400, 0.0), (10, 400, 2.5), (5, 4, 100.0), (1, 0, None), (None, 4, None)],
)
def test_progress_has_a_percentage_when_the_steps_are_known(step, steps, percent):
    progress = progress_of(NewEvent("progress", {"stage": "train", "step": step, "steps": steps}))
    assert progress["percent"] == percent and progress["metrics"] == {}


def test_events_reach_the_store_in_order_with_status_and_progress(store, running, tmp_path):
    text = line("stage", stage="train", state="started") + line("progress", stage="train", step=1, steps=4)
    (tmp_path / "e").write_text(text)
    EventForwarder(store, running, tmp_path / "e").forward()
    job = store.get(running.job_id)
    assert job.status is JobStatus.RUNNING and job.progress["percent"] == 25.0
    assert [e.kind for e in store.events(job.id)][-3:] == ["stage", "status", "progress"]


def test_events_wait_while_the_store_does_not_answer(store, running, tmp_path, monkeypatch):
    (tmp_path / "e").write_text(line("note", message="kept"))
    forwarder = EventForwarder(store, running, tmp_path / "e")
    with monkeypatch.context() as patch:
        patch.setattr(store, "append", lambda *_, **__: (_ for _ in ()).throw(StoreUnavailable("locked")))
        assert not forwarder.forward()
    assert forwarder.forward() and forwarder.forward()
    assert [e.data for e in store.events(running.job_id) if e.kind == "note"] == [{"message": "kept"}]
