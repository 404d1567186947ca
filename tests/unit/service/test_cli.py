"""The `kbop` command against a server in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from jobs.records import JobStatus, NewEvent
from service import client
from service.cli import conclude

if TYPE_CHECKING:
    from tests.unit.service.conftest import Kbop, Server

REPORT: dict[str, Any] = {
    "job_id": "job_1",
    "model": "builtin:[bold]demo",
    "perplexity": [
        {"set": "docs", "tokens": 4096, "teacher": 3.7421, "plain": 1234.5, "init": 98.7, "kbop": 9.87,
         "kl_to_teacher": None, "teacher_top1_agreement": 0.731}
    ],
    "bits": {"bits_per_binary_weight": 1.125, "bits_per_parameter_file": 4.2, "binary_weights": 200_000},
    "size": {"teacher_bytes": 1_000_000, "packed_bytes": 250_000, "ratio": 4.0},
    "time": {"stages": {"prepare": 1.5, "train": 75.0}, "total_s": 76.5},
    "memory": {"peak_rss_bytes": 2**30, "peak_cuda_bytes": None},
    "training": {"steps": 100, "tokens": 204_800},
}  # fmt: skip


def spec_options(server: Server) -> list[str]:
    return ["--model", server.spec["model"], "--data", server.spec["data"][0]["source"]]


def published(server: Server) -> str:
    return server.finish({"model.bin": b"weights", "report/report.json": json.dumps(REPORT).encode()})


def test_submit_from_options_prints_the_id(kbop: Kbop, server: Server) -> None:
    result = kbop("submit", *spec_options(server), "--tokens", 5000, "--seed", 7, "--set", "group_size=64")
    (job,) = server.store.list_jobs().jobs
    assert result.exit_code == 0 and result.stdout == f"{job.id} queued\n"
    assert (job.spec["method"]["tokens"], job.spec["seed"], job.spec["group_size"]) == (5000, 7, 64)


def test_submit_from_a_file_prints_json_on_request(kbop: Kbop, server: Server, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(server.spec))
    result = kbop("submit", tmp_path / "spec.json", "--json")
    assert json.loads(result.stdout)["status"] == "queued"


def test_a_refused_spec_is_one_paragraph_with_pointer_and_hint(kbop: Kbop, server: Server) -> None:
    result = kbop("submit", *spec_options(server), "--set", "method.flip_rate=7")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: /method/flip_rate:") and result.stderr.count("\n") == 1
    assert "Hint:" in result.stderr and "Traceback" not in result.stderr


def test_missing_options_are_a_usage_error(kbop: Kbop) -> None:
    result = kbop("submit", "--model", "builtin:demo")
    assert result.exit_code == 2 and "--data" in result.stderr


def test_no_server_is_exit_code_5_with_advice(kbop: Kbop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused", request=request)

    real = client.KbopClient.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(client, "KbopClient", lambda *a: real(*a, transport=httpx.MockTransport(refuse)))
    monkeypatch.setattr(client, "RETRY_WAITS_S", (0.0,))
    result = kbop("jobs")
    assert result.exit_code == 5 and "kbop serve" in result.stderr


def test_an_endpoint_that_is_no_address_is_refused(kbop: Kbop) -> None:
    assert "not a server address" in kbop("jobs", "--endpoint", "localhost:8700").stderr


def test_watch_prints_a_line_per_stage_and_succeeds(kbop: Kbop, server: Server) -> None:
    job_id = server.submit()["id"]
    events = [
        NewEvent("stage", {"stage": "train", "state": "started"}),
        *(NewEvent("progress", {"stage": "train", "step": i, "steps": 9, "metrics": {"loss": 1.5}}) for i in range(9)),
        NewEvent("stage", {"stage": "train", "state": "finished", "seconds": 75.2}),
    ]
    lease = server.claim()
    server.store.append(lease, events, status=JobStatus.PUBLISHING)
    server.store.finish(lease, JobStatus.SUCCEEDED)
    result = kbop("watch", job_id)
    assert result.exit_code == 0 and result.stdout.count("0/9") == 1 and "4/9" not in result.stdout
    assert "train    started\n" in result.stdout
    assert "train    8/9  loss 1.5\ntrain    finished in 1 m 15 s\n" in result.stdout
    assert result.stdout.endswith(f"{job_id} succeeded\n")


def test_watch_of_a_failed_job_exits_with_3_and_explains(kbop: Kbop, server: Server) -> None:
    job_id = server.submit()["id"]
    error = {
        "code": "no_linears",
        "message": "nothing to binarize",
        "hint": "use a decoder",
        "log_tail": "last\n",
    }
    server.store.finish(server.claim(), JobStatus.FAILED, error=error)
    result = kbop("watch", job_id)
    assert result.exit_code == 3 and "the log ended with:\nlast\n" in result.stderr
    assert f"Error: job {job_id} failed: nothing to binarize. Hint: use a decoder. [no_linears]" in result.stderr


def test_watch_of_a_cancelled_job_exits_with_4(kbop: Kbop, server: Server) -> None:
    job_id = server.submit()["id"]
    assert kbop("cancel", job_id).stdout == f"{job_id} cancelled\n"
    assert kbop("watch", job_id).exit_code == 4
    again = kbop("cancel", job_id)
    assert again.exit_code == 1 and "[already_finished]" in again.stderr


def test_watch_as_json_prints_one_event_per_line_and_the_job_last(kbop: Kbop, server: Server) -> None:
    job_id = server.finish(events=2)
    lines = [json.loads(line) for line in kbop("watch", job_id, "--json").stdout.splitlines()]
    assert [line.get("kind") for line in lines].count("note") == 2 and lines[-1]["object"] == "job"


def test_jobs_lists_what_there_is(kbop: Kbop, server: Server) -> None:
    assert kbop("jobs").stdout == "no jobs\n"
    job_id = server.submit(name="mine")["id"]
    assert job_id in kbop("jobs").stdout and "mine" in kbop("jobs").stdout
    assert json.loads(kbop("jobs", "--json", "--status", "failed").stdout)["data"] == []


def test_an_unknown_state_is_named_by_the_server(kbop: Kbop) -> None:
    result = kbop("jobs", "--status", "asleep")
    assert result.exit_code == 1 and "?status" in result.stderr


def test_report_shows_every_number_and_dashes_for_none(kbop: Kbop, server: Server) -> None:
    text = kbop("report", published(server)).stdout
    for part in ("builtin:[bold]demo", "4,096", "3.742", "1234", "98.7", "9.87", "73.1 %"):
        assert part in text, part
    for part in ("1.125", "4.2", "976.56 KiB", "244.14 KiB", "4.00 times", "1.5 s", "1 m 15 s", "1.00 GiB"):
        assert part in text, part
    assert "peak GPU memory" in text and " - " in text


def test_report_as_json_is_what_the_server_sent(kbop: Kbop, server: Server) -> None:
    assert json.loads(kbop("report", published(server), "--json").stdout) == REPORT


def test_report_of_an_unfinished_job_is_refused(kbop: Kbop, server: Server) -> None:
    result = kbop("report", server.submit()["id"])
    assert result.exit_code == 1 and "[no_report]" in result.stderr


def test_report_as_a_page_goes_to_a_file(kbop: Kbop, server: Server, tmp_path: Path) -> None:
    job_id = server.finish({"report/report.html": b"<h1>x</h1>"})
    assert kbop("report", job_id, "--html", tmp_path / "r.html").exit_code == 0
    assert (tmp_path / "r.html").read_bytes() == b"<h1>x</h1>"
    assert "cannot be written" in kbop("report", job_id, "--html", tmp_path / "no/r.html").stderr


def test_download_puts_files_in_place_and_twice_is_fine(kbop: Kbop, server: Server, tmp_path: Path) -> None:
    job_id = published(server)
    for _ in range(2):
        result = kbop("download", job_id, tmp_path / "out")
        assert result.exit_code == 0 and "2 files" in result.stdout
    assert (tmp_path / "out/model.bin").read_bytes() == b"weights"


def test_download_keeps_a_different_file_unless_forced(kbop: Kbop, server: Server, tmp_path: Path) -> None:
    job_id = published(server)
    (tmp_path / "model.bin").write_text("mine")
    result = kbop("download", job_id, tmp_path)
    assert result.exit_code == 1 and "--force" in result.stderr and (tmp_path / "model.bin").read_text() == "mine"
    assert kbop("download", job_id, tmp_path, "--force").exit_code == 0


def test_help_names_the_exit_codes_and_what_happens_to_running_jobs(kbop: Kbop) -> None:
    text = " ".join(kbop("--help").stdout.split())
    assert "3 the job failed" in text and "5 the server does not answer" in text
    assert "running jobs go on" in " ".join(kbop("serve", "--help").stdout.split())


def test_a_failure_without_a_reason_still_ends_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="3"):
        conclude({"id": "job_1", "status": "failed", "error": None})
    assert "no reason was recorded" in capsys.readouterr().err
