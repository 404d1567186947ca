"""Submitting, listing, reading and cancelling over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient

from jobs.records import JobStatus
from service.app import create_app
from service.settings import ServerSettings

if TYPE_CHECKING:
    from tests.unit.service.conftest import Server


def test_a_submission_answers_202_with_its_place_and_the_job(server: Server) -> None:
    answer = server.http.post("/v1/jobs", json=server.spec | {"name": "first"})
    job = answer.json()
    assert answer.status_code == 202 and answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["object"], job["status"], job["name"], job["method"]) == (
        "job",
        "queued",
        "first",
        "standard",
    )
    assert job["created_at"].endswith("Z") and job["artifacts"] == 0 and job["attempt"] == 0
    assert job["spec"]["group_size"] == 128 and server.http.get(job["links"]["self"]).json() == job


def test_the_same_key_and_body_give_the_same_job(server: Server) -> None:
    headers = {"Idempotency-Key": "k1"}
    first, second = (server.http.post("/v1/jobs", json=server.spec, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202) and first.json() == second.json()
    assert second.headers["idempotency-replayed"] == "true" and len(server.store.list_jobs().jobs) == 1


def test_the_same_key_with_another_body_is_refused(server: Server) -> None:
    headers = {"Idempotency-Key": "k1"}
    server.http.post("/v1/jobs", json=server.spec, headers=headers)
    answer = server.http.post("/v1/jobs", json=server.spec | {"seed": 1}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")


@pytest.mark.parametrize(
    ("key", "status"), [("a" * 255, 202), ("a" * 256, 400), ("", 400), ("a b", 400), ("\xe9", 400)]
)
def test_keys_are_1_to_255_visible_characters(server: Server, key: str, status: int) -> None:
    headers = {b"Idempotency-Key": key.encode("latin-1")}
    assert server.http.post("/v1/jobs", json=server.spec, headers=headers).status_code == status


def test_a_bad_field_is_named_by_its_pointer(server: Server) -> None:
    answer = server.http.post("/v1/jobs", json=server.spec | {"method": {"flip_rate": 2.0}})
    body = answer.json()
    assert (answer.status_code, body["code"]) == (422, "invalid_spec")
    assert [e["pointer"] for e in body["errors"]] == ["/method/flip_rate"] and "0.5" in body["errors"][0]["detail"]


def test_an_unknown_field_is_named(server: Server) -> None:
    answer = server.http.post("/v1/jobs", json=server.spec | {"learning_rate": 1})
    assert answer.status_code == 422 and answer.json()["errors"][0]["pointer"] == "/learning_rate"


@pytest.mark.parametrize("text", ["", "{", "[1", "\x00", '{"a": 1}}', "nan"])
def test_text_that_is_not_json_is_400(server: Server, text: str) -> None:
    answer = server.http.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400])
@pytest.mark.parametrize("field", ["momentum", "tokens"])
def test_numbers_beyond_all_limits_are_never_a_server_error(server: Server, field: str, value: str) -> None:
    text = json.dumps(server.spec)[:-1] + f', "method": {{"{field}": {value}}}}}'
    answer = server.http.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["code"] in ("invalid_json", "invalid_spec")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_415_with_advice(server: Server, media_type: str) -> None:
    answer = server.http.post("/v1/jobs", content=b"{}", headers={"Content-Type": media_type})
    assert answer.status_code == 415 and "application/json" in answer.json()["hint"]


def test_a_charset_beside_the_content_type_is_fine(server: Server) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.http.post("/v1/jobs", content=json.dumps(server.spec), headers=headers).status_code == 202


def refused(server: Server, **changes: Any) -> tuple[int, str, str]:
    body = server.http.post("/v1/jobs", json=server.spec | changes).json()
    assert server.store.list_jobs().jobs == [], "nothing may be stored"
    return body["status"], body["code"], body["errors"][0]["pointer"]


@pytest.mark.parametrize("name", ["builtin:nothing", "not a model", "", "..", "model"])
def test_an_unknown_model_is_refused(server: Server, name: str) -> None:
    assert refused(server, model=name)[0] == 422 and refused(server, model=name)[2] == "/model"


def test_a_path_outside_the_roots_is_refused_also_through_a_link(server: Server, tmp_path: Path) -> None:
    (tmp_path / "sources/link").symlink_to("/etc")
    for path in ("/etc", str(tmp_path / "sources/link"), str(tmp_path / "sources/../../..")):
        assert refused(server, model=path) == (422, "path_not_allowed", "/model")


@pytest.mark.parametrize("name", ["/a\0b", "/" + "a" * 4000, "~no-such-user/x", "./model", "/a/" + "../" * 1000])
def test_paths_the_system_chokes_on_are_refused_not_crashed_on(server: Server, name: str) -> None:
    assert refused(server, model=name)[0] == 422
    assert refused(server, data=[{"source": name}])[2] == "/data/0/source"


def test_a_path_under_the_root_the_system_chokes_on_is_refused(server: Server, tmp_path: Path) -> None:
    for bad in ("a" * 300, "a\0b"):
        assert refused(server, model=f"{tmp_path}/sources/{bad}")[2] == "/model"


def test_the_second_data_source_is_blamed_when_it_is_the_bad_one(server: Server, tmp_path: Path) -> None:
    (tmp_path / "sources/empty.txt").touch()
    data = [*server.spec["data"], {"source": str(tmp_path / "sources/empty.txt")}]
    assert refused(server, data=data) == (422, "empty_data", "/data/1/source")
    assert refused(server, eval=data) == (422, "empty_data", "/eval/1/source")


def test_a_hub_owner_that_is_not_listed_is_refused(server: Server) -> None:
    assert refused(server, model="someone/model") == (422, "owner_not_allowed", "/model")


def test_more_devices_than_there_are_is_refused(server: Server) -> None:
    assert refused(server, resources={"gpus": 3}) == (422, "not_enough_devices", "/resources/gpus")


def test_without_a_scheduler_here_the_number_of_devices_is_not_judged(server: Server) -> None:
    settings = ServerSettings(data_dir=server.data_dir, embed_scheduler=False, **server.roots)
    answer = TestClient(create_app(settings, server.store)).post(
        "/v1/jobs", json=server.spec | {"resources": {"gpus": 1024}}
    )
    assert answer.status_code == 202


def test_the_list_is_newest_first_and_pages_meet(server: Server) -> None:
    made = [server.submit(seed=i)["id"] for i in range(5)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = server.http.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]


def test_the_list_can_be_filtered_by_status(server: Server) -> None:
    first, second = server.submit()["id"], server.submit()["id"]
    server.http.post(f"/v1/jobs/{first}/cancel")
    queued = server.http.get("/v1/jobs", params={"status": "queued"}).json()["data"]
    assert [job["id"] for job in queued] == [second]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "status=sleeping", "cursor=" + "A" * 25])
def test_a_bad_parameter_is_422_and_named(server: Server, query: str) -> None:
    answer = server.http.get(f"/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")
    assert answer.json()["errors"][0]["pointer"] == "?" + query.partition("=")[0]


@pytest.mark.parametrize("cursor", ["x", "OTk5OTk5OTk5OTk5OTk5OTk5", "%00", "LTE"])
def test_a_foreign_cursor_is_never_a_server_error(server: Server, cursor: str) -> None:
    assert server.http.get(f"/v1/jobs?cursor={cursor}").status_code in (200, 400)


@pytest.mark.parametrize("path", ["", "/cancel", "/events", "/logs", "/report", "/artifacts", "/artifacts/x"])
@pytest.mark.parametrize("job_id", ["job_nothing", "%00", "..%2f.."])
def test_an_unknown_job_is_404_everywhere(server: Server, path: str, job_id: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    answer = server.http.request(method, f"/v1/jobs/{job_id}{path}")
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"


def test_cancelling_a_waiting_job_ends_it_at_once_and_once(server: Server) -> None:
    job_id = server.submit()["id"]
    answer = server.http.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    again = server.http.post(f"/v1/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "already_finished")


def test_cancelling_a_running_job_is_a_request(server: Server) -> None:
    job_id = server.submit()["id"]
    lease = server.claim()
    answer = server.http.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")
    server.store.finish(lease, JobStatus.CANCELLED)
    assert server.http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"


def test_progress_is_shown_with_percent(server: Server) -> None:
    job_id = server.submit()["id"]
    progress = {
        "stage": "train",
        "step": 1,
        "steps": 4,
        "percent": 25.0,
        "eta_s": 3.0,
        "metrics": {"loss": 2.0},
    }
    server.store.append(server.claim(), [], status=JobStatus.RUNNING, progress=progress)
    assert server.http.get(f"/v1/jobs/{job_id}").json()["progress"] == progress


def test_a_replayed_submission_is_answered_although_its_model_has_gone(server: Server) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = server.http.post("/v1/jobs", json=server.spec, headers=headers)
    (Path(server.spec["model"]) / "config.json").unlink()
    again = server.http.post("/v1/jobs", json=server.spec, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
