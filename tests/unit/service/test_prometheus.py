"""`GET /metrics`: what Prometheus scrapes, read back with Prometheus' own parser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from jobs.errors import StoreUnavailable
from jobs.records import Failure, JobStatus
from jobs.store import Store
from service.exporter import StoreCollector
from service.routes.health import package_version

if TYPE_CHECKING:
    from tests.unit.service.conftest import MakeServer, Server

KEY = "k-0123456789abcdef"
Labels = Mapping[str, str]
PROGRESS: dict[str, Any] = {
    "stage": "train", "step": 3, "steps": 9, "eta_s": 1.5,
    "metrics": {
        "loss": 2.25, "flip_rate": 0.004, "reversal_rate": 0.001, "tokens_per_s": 2048.5,
        "peak_bytes": 2**20, "mfu": 0.5,
        "forward_s": 0.25, "backward_s": 0.5, "communication_s": 0.125, "flips_s": 0.0625, "optimizer_s": 0.03125,
    },
}  # fmt: skip


def families(server: Server) -> list[Metric]:
    answer = server.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    return list(text_string_to_metric_families(answer.text))


def samples(server: Server) -> dict[str, list[tuple[Labels, float]]]:
    """Every sample's labels and value, by its name."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in families(server):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(server: Server, name: str, **labels: str) -> float:
    (only,) = [number for found, number in samples(server)[name] if found == labels]
    return only


def test_the_text_has_prometheus_media_type_and_every_family_a_help(server: Server) -> None:
    assert server.http.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert all(family.documentation for family in families(server))


def test_jobs_are_counted_in_every_status(server: Server) -> None:
    server.submit()
    counted = {labels["status"]: number for labels, number in samples(server)["kbop_jobs"]}
    assert counted == dict.fromkeys(JobStatus, 0.0) | {"queued": 1.0}


def test_a_training_job_shows_its_progress(server: Server) -> None:
    job_id = server.submit()["id"]
    server.store.append(server.claim(), [], status=JobStatus.RUNNING, progress=PROGRESS)
    found = samples(server)
    expected = {
        "step": 3, "steps": 9, "eta_seconds": 1.5, "loss": 2.25, "flip_rate": 0.004, "reversal_rate": 0.001,
        "tokens_per_second": 2048.5, "peak_memory_bytes": 2**20, "mfu_ratio": 0.5,
    }  # fmt: skip
    assert {name: found[f"kbop_job_{name}"] for name in expected} == {
        name: [({"job_id": job_id}, number)] for name, number in expected.items()
    }
    info = {"job_id": job_id, "model": server.spec["model"], "status": "running", "stage": "train"}
    assert found["kbop_job_info"] == [(info, 1.0)]


def test_seconds_are_split_by_phase(server: Server) -> None:
    server.submit()
    server.store.append(server.claim(), [], status=JobStatus.RUNNING, progress=PROGRESS)
    split = {labels["phase"]: number for labels, number in samples(server)["kbop_job_phase_seconds"]}
    assert split == {"forward": 0.25, "backward": 0.5, "communication": 0.125, "flips": 0.0625, "optimizer": 0.03125}


@pytest.mark.parametrize("progress", [None, {}, {"stage": "init", "metrics": None}, {"metrics": {"loss": None}}])
def test_what_a_job_does_not_say_is_absent_not_zero(server: Server, progress: dict[str, Any] | None) -> None:
    server.submit()
    server.store.append(server.claim(), [], progress=progress)
    found = samples(server)
    assert "kbop_job_info" in found and not {"kbop_job_loss", "kbop_job_step", "kbop_job_mfu_ratio"} & found.keys()


def test_only_jobs_that_run_have_metrics_of_their_own(server: Server) -> None:
    done = server.finish()
    waiting = server.submit()["id"]
    text = server.http.get("/metrics").text
    assert done not in text and waiting not in text and 'kbop_jobs{status="succeeded"} 1.0' in text


def test_devices_and_those_in_use_are_counted(server: Server) -> None:
    assert (value(server, "kbop_devices"), value(server, "kbop_devices_in_use")) == (2, 0)
    server.submit()
    server.claim()
    assert value(server, "kbop_devices_in_use") == 1


def test_devices_of_another_process_are_not_guessed(server: Server) -> None:
    registry = CollectorRegistry()
    registry.register(StoreCollector(server.store, None, "1"))
    assert registry.get_sample_value("kbop_devices_in_use") == 0
    assert registry.get_sample_value("kbop_devices") is None


def test_failures_are_counted_by_code(server: Server) -> None:
    server.submit()
    failure = Failure("rank_killed", "rank 0 was killed by SIGKILL", retryable=False)
    server.store.fail(server.claim(), failure, max_attempts=1, retry_delay_s=1)
    assert value(server, "kbop_job_failures_total", code="rank_killed") == 1


def test_the_oldest_queued_job_says_how_long_it_waits(server: Server) -> None:
    assert value(server, "kbop_queue_oldest_wait_seconds") == 0
    server.submit()
    late = Store(server.store.database_url, lambda: server.store.now() + 600)
    registry = CollectorRegistry()
    registry.register(StoreCollector(late, None, "1"))
    waited = registry.get_sample_value("kbop_queue_oldest_wait_seconds")
    late.close()
    assert waited is not None and waited >= 600


def test_the_running_version_is_shown(server: Server) -> None:
    assert value(server, "kbop_build_info", version=package_version()) == 1


def test_requests_are_counted_by_route_and_never_by_path(server: Server) -> None:
    for path in ("/v1/jobs/a", "/v1/jobs/b", "/v1/jobs/c/artifacts/secret/name", "/no/such/place"):
        server.http.get(path)
    counted = {(labels["route"], labels["status"]): n for labels, n in samples(server)["kbop_http_requests_total"]}
    assert counted[("/v1/jobs/{job_id}", "404")] == 2 and counted[("other", "404")] == 1
    assert counted[("/v1/jobs/{job_id}/artifacts/{path}", "404")] == 1
    assert "secret" not in server.http.get("/metrics").text


def test_a_method_that_no_route_knows_is_no_label_of_its_own(server: Server) -> None:
    server.http.request("BREW", "/healthz")
    assert value(server, "kbop_http_requests_total", method="other", route="/healthz", status="405") == 1


def test_a_bug_of_ours_counts_as_a_500(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Store, "get", broken)
    server.http.get("/v1/jobs/x")
    assert value(server, "kbop_http_requests_total", method="GET", route="/v1/jobs/{job_id}", status="500") == 1


def test_answers_are_timed_by_route(server: Server) -> None:
    server.http.get("/healthz")
    assert value(server, "kbop_http_request_duration_seconds_count", method="GET", route="/healthz") == 1


def test_with_a_key_prometheus_needs_it(make_server: MakeServer) -> None:
    http = make_server(api_key=KEY).http
    assert (http.get("/metrics").status_code, http.get("/metrics").json()["code"]) == (401, "unauthorized")
    assert http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_database_that_does_not_answer_fails_the_scrape(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise StoreUnavailable("the database does not answer", "try again")

    monkeypatch.setattr(Store, "overview", away)
    answer = server.http.get("/metrics")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
