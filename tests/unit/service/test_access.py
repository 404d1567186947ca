"""The API key, health and readiness, and what is logged."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import structlog

from jobs.store import Store
from service.json_logs import configure_json_logs

if TYPE_CHECKING:
    from tests.unit.service.conftest import MakeServer, Server

KEY = "k-0123456789abcdef"
ROUTES = ["", "/x", "/x/events", "/x/logs", "/x/metrics", "/x/report", "/x/artifacts", "/x/artifacts/y"]


@pytest.mark.parametrize("path", ROUTES)
def test_with_a_key_every_v1_route_wants_it(make_server: MakeServer, path: str) -> None:
    http = make_server(api_key=KEY).http
    answer = http.get(f"/v1/jobs{path}")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert http.get(f"/v1/jobs{path}", headers={"Authorization": f"Bearer {KEY}"}).status_code in (200, 404)


@pytest.mark.parametrize("header", ["Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer", "Bearer \xff"])
def test_anything_but_the_key_is_refused(make_server: MakeServer, header: str) -> None:
    http = make_server(api_key=KEY).http
    assert http.get("/v1/jobs", headers={b"Authorization": header.encode("latin-1")}).status_code == 401


def test_a_submission_without_the_key_is_refused_before_its_body_is_judged(make_server: MakeServer) -> None:
    http = make_server(api_key=KEY).http
    assert http.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"}).status_code == 401


def test_health_is_open_to_everybody(make_server: MakeServer) -> None:
    http = make_server(api_key=KEY).http
    assert http.get("/healthz").json()["status"] == "ok" and http.get("/readyz").status_code == 200


def test_a_disk_below_its_floor_is_not_ready(make_server: MakeServer) -> None:
    answer = make_server(disk_floor_bytes=2**62).http.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert "floor" in answer.json()["checks"]["disk"] and answer.json()["checks"]["database"] == "ok"


def test_a_scheduler_that_does_not_tick_is_not_ready(make_server: MakeServer) -> None:
    server = make_server(embed_scheduler=True)
    assert "not ticked" in server.http.get("/readyz").json()["checks"]["scheduler"]
    lock = server.data_dir / "scheduler.lock"
    lock.touch()
    assert server.http.get("/readyz").json() == {
        "status": "ready",
        "checks": {"database": "ok", "scheduler": "ok", "disk": "ok"},
    }
    os.utime(lock, (time.time() - 60, time.time() - 60))
    assert server.http.get("/readyz").status_code == 503


def test_a_database_without_tables_is_not_ready(server: Server) -> None:
    for file in server.data_dir.glob("kbop.db*"):
        file.unlink()
    server.store.close()
    assert server.http.get("/readyz").json()["checks"]["database"] in ("schema_mismatch", "store_unavailable")


@pytest.fixture
def json_logs() -> Iterator[None]:
    """Whatever logging the test sets up is undone afterwards."""
    root = logging.getLogger()
    handlers, level, quiet = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**quiet)


@pytest.mark.usefixtures("json_logs")
def test_the_log_is_json_with_the_request_id_and_never_the_key(
    make_server: MakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    http = make_server(api_key=KEY).http
    configure_json_logs()
    http.get("/v1/jobs?token=abc", headers={"Authorization": f"Bearer {KEY}", "X-Request-Id": "r1"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    ours = [line for line in lines if line["logger"].startswith("service")]
    seen = [(line["event"], line["path"], line["status"], line["request_id"]) for line in ours]
    assert seen == [("request", "/v1/jobs", 200, "r1")] and KEY not in str(ours) and "abc" not in str(ours)


@pytest.mark.usefixtures("json_logs")
def test_a_bug_is_logged_with_its_place_but_without_local_values(
    make_server: MakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    http = make_server(api_key=KEY).http

    def broken(*_: object) -> None:
        local = KEY
        raise RuntimeError(f"broken {len(local)}")

    monkeypatch.setattr(Store, "get", broken)
    configure_json_logs()
    http.get("/v1/jobs/x", headers={"Authorization": f"Bearer {KEY}"})
    text = capsys.readouterr().err
    assert "request_failed" in text and "RuntimeError" in text and "test_access" in text and KEY not in text
