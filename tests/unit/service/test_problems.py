"""Every error answer has the same form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from jobs import errors as domain
from jobs.store import Store
from service.problems import DOMAIN_PROBLEMS, HTTP_PROBLEMS

if TYPE_CHECKING:
    from tests.unit.service.conftest import MakeServer, Server

MEMBERS = {"type", "title", "status", "detail", "instance", "code", "hint", "request_id", "errors"}


def every_error(cls: type[domain.JobsError] = domain.JobsError) -> Iterator[type[domain.JobsError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == domain.__name__:
            yield from every_error(child)


def test_every_domain_error_is_mapped_and_no_other() -> None:
    assert set(every_error()) == set(DOMAIN_PROBLEMS)


def test_no_two_kinds_of_problem_share_a_code() -> None:
    codes = [cls.code for cls in DOMAIN_PROBLEMS] + list(HTTP_PROBLEMS)
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_route"),
        ("GET", "/v1/jobs/", 404, "unknown_route"),
        ("DELETE", "/v1/jobs", 405, "method_not_allowed"),
        ("PUT", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/jobs/x", 404, "unknown_job"),
        ("GET", "/v1/jobs?limit=x", 422, "invalid_parameter"),
        ("POST", "/v1/jobs", 415, "unsupported_media_type"),
    ],
)
def test_every_refusal_is_a_problem(server: Server, method: str, path: str, status: int, code: str) -> None:
    answer = server.http.request(method, path)
    body = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code)
    assert answer.headers["content-type"] == "application/problem+json" and set(body) == MEMBERS
    assert body["type"] == f"urn:kbop:problem:{code}" and body["instance"] == path.partition("?")[0]
    assert body["request_id"] == answer.headers["x-request-id"] and body["detail"] and body["title"]


def test_a_405_names_the_allowed_methods(server: Server) -> None:
    assert server.http.delete("/healthz").headers["allow"] == "GET"


def test_a_bug_of_ours_is_a_500_that_tells_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret in the message")

    monkeypatch.setattr(Store, "get", broken)
    answer = server.http.get("/v1/jobs/x", headers={"X-Request-Id": "abc"})
    assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text
    assert (answer.json()["code"], answer.json()["request_id"]) == ("internal_error", "abc")


def test_a_database_that_does_not_answer_is_a_503_to_try_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise domain.StoreUnavailable("the database does not answer", "try again")

    monkeypatch.setattr(Store, "submit", away)
    answer = server.http.post("/v1/jobs", json=server.spec)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "2"


def test_a_large_body_is_refused_by_its_announced_length(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=2048)
    answer = server.http.post("/v1/jobs", json=server.spec | {"keep": ["x" * 3000]})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert "2048" in answer.json()["detail"]


def test_a_large_body_in_chunks_is_refused_while_it_comes(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=2048)
    chunks = (b" " * 1000 for _ in range(10))
    answer = server.http.post("/v1/jobs", content=chunks, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_body_of_exactly_the_limit_is_read(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=2048)
    text = json.dumps(server.spec).encode().ljust(2048)
    headers = {"Content-Type": "application/json"}
    assert server.http.post("/v1/jobs", content=text, headers=headers).status_code == 202
    assert server.http.post("/v1/jobs", content=text + b" ", headers=headers).status_code == 413


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 128])
def test_a_sane_request_id_is_echoed(server: Server, given: str) -> None:
    assert server.http.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "a{b}"])
def test_any_other_request_id_is_replaced(server: Server, given: str) -> None:
    answer = server.http.get("/healthz", headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"].startswith("req_")


def test_the_openapi_page_documents_bodies_examples_and_problems(server: Server) -> None:
    page = server.http.get("/openapi.json").json()
    schemas = page["components"]["schemas"]
    assert {"JobSpec", "MethodSpec", "Problem", "Job", "EventList", "ArtifactList"} <= set(schemas)
    submit = page["paths"]["/v1/jobs"]["post"]
    assert submit["requestBody"]["content"]["application/json"]["example"]["model"] == "builtin:demo"
    assert submit["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"].endswith("Problem")
    assert schemas["Job"]["examples"] and "HTTPValidationError" not in json.dumps(page)


def test_every_reference_of_the_openapi_page_leads_somewhere(server: Server) -> None:
    page = server.http.get("/openapi.json").json()
    names = {part.split('"')[0] for part in json.dumps(page).split("#/components/schemas/")[1:]}
    assert names <= set(page["components"]["schemas"])
