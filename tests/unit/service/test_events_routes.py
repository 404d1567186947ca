"""Events as a list and as a stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from jobs.records import NewEvent
from service.sse import SseMessage, parse_stream

if TYPE_CHECKING:
    from tests.unit.service.conftest import Server

STREAM = {"Accept": "text/event-stream"}


def stream(server: Server, job_id: str, **headers: str) -> list[SseMessage]:
    answer = server.http.get(f"/v1/jobs/{job_id}/events", headers=STREAM | headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    return list(parse_stream([answer.content]))


def test_the_list_is_in_order_and_can_be_continued(server: Server) -> None:
    job_id = server.finish(events=3)
    first = server.http.get(f"/v1/jobs/{job_id}/events", params={"limit": 2}).json()
    rest = server.http.get(f"/v1/jobs/{job_id}/events", params={"after": first["last_id"]}).json()
    ids = [event["id"] for event in first["data"] + rest["data"]]
    assert first["has_more"] and not rest["has_more"] and ids == sorted(set(ids))
    assert [e["kind"] for e in rest["data"]][-1] == "status" and rest["data"][0]["job_id"] == job_id


def test_a_stream_has_every_event_and_ends_with_the_job(server: Server) -> None:
    job_id = server.finish({"a.bin": b"a"}, events=3)
    messages = stream(server, job_id)
    listed = server.http.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [json.loads(m.data) for m in messages[:-1]] == listed
    assert [m.id for m in messages[:-1]] == [str(e["id"]) for e in listed]
    assert messages[-1].event == "done"
    assert json.loads(messages[-1].data) == server.http.get(f"/v1/jobs/{job_id}").json()


def test_a_stream_resumes_behind_the_last_event_id(server: Server) -> None:
    job_id = server.finish(events=3)
    every = stream(server, job_id)
    assert stream(server, job_id, **{"Last-Event-ID": every[1].id})[:-1] == every[2:-1]
    assert [m.event for m in stream(server, job_id, **{"Last-Event-ID": every[-2].id})] == ["done"]


def test_a_stream_longer_than_one_batch_misses_nothing(server: Server) -> None:
    job_id = server.finish(events=1203)
    notes = [json.loads(m.data)["data"]["message"] for m in stream(server, job_id) if m.event == "note"]
    assert notes == [f"n{i}" for i in range(1203)]


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 19, "²"])
def test_a_last_event_id_that_is_no_id_is_refused(server: Server, value: str) -> None:
    headers = {k.encode(): v.encode("latin-1") for k, v in (STREAM | {"Last-Event-ID": value}).items()}
    answer = server.http.get(f"/v1/jobs/{server.submit()['id']}/events", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_event_id")


@pytest.mark.parametrize("query", ["after=-1", f"after={2**63}", "limit=0", "limit=1001"])
def test_bad_list_parameters_are_named(server: Server, query: str) -> None:
    assert server.http.get(f"/v1/jobs/{server.submit()['id']}/events?{query}").status_code == 422


def test_unicode_line_breaks_in_a_note_do_not_break_the_stream(server: Server) -> None:
    job_id = server.submit()["id"]
    text = "a\u2028b\r\nc\x85"
    server.store.append(server.claim(), [NewEvent("note", {"message": text})])
    server.http.post(f"/v1/jobs/{job_id}/cancel")
    lease = server.store.leases()[0]
    server.store.finish(lease, server.store.get(job_id).status.__class__.CANCELLED)
    notes = [json.loads(m.data) for m in stream(server, job_id) if m.event == "note"]
    assert [note["data"]["message"] for note in notes] == [text]


def test_numbers_that_json_lacks_do_not_break_the_list(server: Server) -> None:
    job_id = server.submit()["id"]
    server.store.append(server.claim(), [NewEvent("progress", {"metrics": {"loss": float("nan")}})])
    events = server.http.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert events[-1]["data"] == {"metrics": {"loss": None}}
