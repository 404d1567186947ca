"""`GET /v1/jobs/{id}/metrics` and `kbop metrics`: the training series of one job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from jobs.layout import job_dir, training_metrics
from service.client import KbopClient

if TYPE_CHECKING:
    from tests.unit.service.conftest import Kbop, Server

SECONDS = {"forward": 0.25, "backward": 0.5, "communication": 0.125, "flips": 0.0625, "optimizer": 0.03125}


def trained(server: Server, steps: int, tail: str = "") -> str:
    """A job with a series, as its ranks write it."""
    job_id: str = server.submit()["id"]
    path = training_metrics(job_dir(server.data_dir, job_id))
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        for step in range(steps):
            numbers = {"loss": 4.0 - step / steps, "flip_rate": 0.004, "reversal_rate": 0.001, "tokens_per_s": 2048.5}
            layers = {"flips": {"layers.0": 40}, "reversals": {"layers.0": 10}}
            more = {"seconds": SECONDS, "peak_bytes": 2**20, "mfu": None}
            file.write(json.dumps({"step": step} | numbers | layers | more) + "\n")
        file.write(tail)
    return job_id


def series(server: Server, job_id: str, query: str = "") -> dict[str, Any]:
    answer = server.http.get(f"/v1/jobs/{job_id}/metrics{query}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_job_without_training_has_an_empty_series(server: Server) -> None:
    job = server.submit()
    empty = {"object": "metrics", "job_id": job["id"], "every": 1, "next_since": 0, "data": []}
    assert server.http.get(job["links"]["metrics"]).json() == empty


def test_a_step_has_every_number_that_was_recorded_and_no_layers(server: Server) -> None:
    step = series(server, trained(server, 1))["data"][0]
    assert step == {
        "step": 0, "loss": 4.0, "flip_rate": 0.004, "reversal_rate": 0.001, "tokens_per_s": 2048.5,
        "seconds": SECONDS, "peak_bytes": 2**20,
    }  # fmt: skip


def test_layers_are_there_when_asked_for(server: Server) -> None:
    step = series(server, trained(server, 2), "?layers=true")["data"][1]
    assert (step["flips"], step["reversals"]) == ({"layers.0": 40}, {"layers.0": 10})


def test_a_reader_goes_on_where_it_stopped(server: Server) -> None:
    job_id = trained(server, 5)
    following = series(server, job_id)["next_since"]
    assert following == 5 and series(server, job_id, f"?since={following}")["data"] == []
    assert [s["step"] for s in series(server, job_id, "?since=3")["data"]] == [3, 4]


def test_a_long_series_is_thinned_and_says_how(server: Server) -> None:
    body = series(server, trained(server, 100), "?limit=10")
    assert body["every"] == 16 and [s["step"] for s in body["data"]] == [0, 16, 32, 48, 64, 80, 96, 99]


def test_the_line_being_written_is_left_out(server: Server) -> None:
    body = series(server, trained(server, 2, tail='{"step": 2, "loss"'))
    assert body["next_since"] == 2 and len(body["data"]) == 2


def test_a_loss_that_diverged_is_absent_and_the_answer_is_json(server: Server) -> None:
    body = series(server, trained(server, 0, tail='{"step": 0, "loss": NaN, "seconds": {"forward": Infinity}}\n'))
    assert body["data"] == [{"step": 0, "seconds": {}}]


def test_an_unknown_job_is_404(server: Server) -> None:
    answer = server.http.get("/v1/jobs/x/metrics")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")


@pytest.mark.parametrize("query", ["since=-1", "every=0", "limit=0", "limit=5001", "until=x", "layers=perhaps"])
def test_parameters_outside_their_range_are_refused_by_name(server: Server, query: str) -> None:
    answer = server.http.get(f"/v1/jobs/x/metrics?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")
    assert answer.json()["errors"][0]["pointer"] == f"?{query.partition('=')[0]}"


def test_the_client_passes_its_query_on(server: Server) -> None:
    def forward(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=server.http.get(request.url.raw_path.decode()).content)

    job_id = trained(server, 9)
    with KbopClient("http://kbop.test", transport=httpx.MockTransport(forward)) as client:
        body = client.metrics(job_id, since=2, every=4, layers=True)
    assert [s["step"] for s in body["data"]] == [4, 8] and body["data"][0]["flips"]


def test_the_command_shows_numbers_with_their_curves(kbop: Kbop, server: Server) -> None:
    job_id = trained(server, 8)
    lines = kbop("metrics", job_id).stdout.splitlines()
    rows = {line.split("  ")[0]: line for line in lines}
    assert lines[0] == f"{job_id}  steps 0 to 7"
    assert rows["loss, nats per token"].split()[-5:] == ["4", "3.125", "3.125", "4", "█▇▆▅▄▃▂▁"]
    assert "1.00 MiB" in rows["peak memory"] and "250 ms" in rows["forward time"] and "MFU" not in rows


def test_the_command_prints_the_series_as_json(kbop: Kbop, server: Server) -> None:
    job_id = trained(server, 3)
    assert json.loads(kbop("metrics", job_id, "--json").stdout) == series(server, job_id)


def test_the_command_shows_layers_on_request(kbop: Kbop, server: Server) -> None:
    job_id = trained(server, 3)
    assert "layers.0 flips" in kbop("metrics", job_id, "--layers").stdout
    assert "layers.0" not in kbop("metrics", job_id).stdout


def test_the_command_says_that_there_is_nothing(kbop: Kbop, server: Server) -> None:
    job_id = server.submit()["id"]
    assert kbop("metrics", job_id).stdout == f"{job_id} has no training steps to show\n"
    assert kbop("metrics", "x").exit_code == 1
