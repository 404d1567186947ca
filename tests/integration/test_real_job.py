"""Whole jobs on real parts: a `kbop serve` process, its scheduler and runners, and DeepSpeed ranks that train."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
import safetensors.torch
import torch

from jobs.training_series import PHASES
from kbop_core.reversals import SAMPLE

pytestmark = pytest.mark.timeout(480)

KINDS = ("teacher", "plain", "init", "kbop")
STAGES = ("prepare", "init", "train", "pack", "evaluate")

#: Run in a new process: perplexity of a checkpoint on one text, summed window by window, without perplexity.py.
RELOAD = """
import json, math, sys
from pathlib import Path
import torch
import kbop_core
from kbop_core.documents import read_documents
from kbop_core.text import evaluation_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text, context = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
windows = evaluation_windows(read_documents(text), AutoTokenizer.from_pretrained(folder).encode, context, text.name)
nll, count = 0.0, 0
with torch.no_grad():
    for ids, length in zip(windows.ids_NT, windows.lengths_N.tolist()):
        logits = model(input_ids=ids[None, :length]).logits[0, :-1].double()
        nll += torch.nn.functional.cross_entropy(logits, ids[1:length], reduction="sum").item()
        count += length - 1
kinds = sorted({type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")})
print(json.dumps({"perplexity": math.exp(nll / count), "tokens": count, "kinds": kinds}))
"""


@pytest.fixture(scope="module")
def server(serve, tiny):
    return serve(tiny.folder)


@pytest.fixture(scope="module")
def finished(server, tiny):
    """The id of a job of 2 ranks that nothing disturbed."""
    job_id = server.submit(tiny.spec(name="undisturbed"))
    server.succeeded(job_id)
    return job_id


@pytest.fixture(scope="module")
def report(server, finished):
    return server.report(finished)


@pytest.fixture(scope="module")
def downloaded(server, finished, tmp_path_factory):
    """The published files, fetched over HTTP."""
    folder = tmp_path_factory.mktemp("downloaded")
    for path in server.artifacts(finished):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(server.content(finished, path))
    return folder


def stage_events(server, job_id: str) -> list[tuple[str, str]]:
    return [(e["data"]["stage"], e["data"]["state"]) for e in server.events(job_id) if e["kind"] == "stage"]


def notes(server, job_id: str) -> list[str]:
    return [e["data"]["message"] for e in server.events(job_id) if e["kind"] == "note"]


def assert_ids_grow(events: list[dict[str, Any]]) -> None:
    ids = [event["id"] for event in events]
    assert ids == sorted(set(ids))


def assert_finite(report: dict[str, Any]) -> None:
    assert all(math.isfinite(row[kind]) for row in report["perplexity"] for kind in KINDS)


def test_every_stage_is_told_in_order_with_growing_event_ids(server, finished):
    events = server.events(finished)
    assert_ids_grow(events)
    assert stage_events(server, finished) == [(s, state) for s in STAGES for state in ("started", "finished")]
    statuses = [e["data"]["to"] for e in events if e["kind"] == "status"]
    assert statuses == ["queued", "preparing", "running", "evaluating", "publishing", "succeeded"]


def test_training_progress_ends_at_the_last_step_with_its_metrics(server, finished):
    progress = [e["data"] for e in server.events(finished) if e["kind"] == "progress" and e["data"]["stage"] == "train"]
    assert (progress[-1]["step"], progress[-1]["steps"], progress[-1]["eta_s"]) == (40, 40, 0)
    told = {"loss", "flip_rate", "reversal_rate", "tokens_per_s", "peak_bytes"}
    assert progress[-1]["metrics"].keys() == told | {f"{phase}_s" for phase in PHASES}
    assert [p["step"] for p in progress] == sorted({p["step"] for p in progress})


def test_perplexities_are_ordered_as_quality_is(report, tiny):
    assert [row["set"] for row in report["perplexity"]] == [tiny.stories.name, tiny.page.name]
    assert_finite(report)
    for row in report["perplexity"]:
        assert row["kbop"] < row["init"] < row["plain"] and row["teacher"] < row["init"]
        assert row["teacher"] < 1.02 * row["kbop"]  # on held-out text a student may be ahead by a hair
        assert 0 < row["kl_to_teacher"] < 2 and 0 < row["teacher_top1_agreement"] <= 1


def test_training_lowers_the_divergence_from_the_teacher(report):
    losses = [point["loss"] for point in report["training"]["curve"]]
    assert len(losses) == report["training"]["steps"] == 40
    assert sum(losses[-10:]) < sum(losses[:10])


def test_bits_are_counted_as_the_plan_says(report, downloaded):
    # 64-wide and 128-wide rows in groups of 32: one bit a weight, one 16-bit scale a group.
    layers = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert report["bits"]["binary_weights"] == layers
    assert report["bits"]["bits_per_binary_weight"] == 1 + 16 / 32
    size = (downloaded / "model.safetensors").stat().st_size
    assert report["size"]["packed_bytes"] == size
    parameters = layers + 300 * 64 + 5 * 64  # the tied embedding once, and the norms
    assert report["size"]["teacher_bytes"] == 4 * parameters
    assert report["bits"]["bits_per_parameter_file"] == pytest.approx(8 * size / parameters)


def test_training_holds_no_latent_weights(report):
    # All bits, half of a two-byte evidence, a float for each row of that half and for every column, and the first signs
    # of the half's sampled rows.
    shapes = [(64, 64)] * 2 + [(32, 64)] * 2 + [(128, 64)] * 2 + [(64, 128)]
    weights = sum(rows * columns for rows, columns in shapes)
    moments = sum(4 * (rows / 2 + columns) for rows, columns in shapes) / weights
    watched = sum(len(range(0, rows // 2, max(1, rows // SAMPLE))) * columns for rows, columns in shapes) / weights
    held = report["memory"]["training_state_bytes_per_binary_weight"]
    assert held == pytest.approx(1 / 8 + 2 / 2 + moments + watched / 8)


def test_the_training_series_is_what_the_ranks_wrote(server, finished, report):
    series = server.http.get(f"/v1/jobs/{finished}/metrics?layers=true").raise_for_status().json()
    assert [step["step"] for step in series["data"]] == list(range(40)) and series["next_since"] == 40
    assert [step["loss"] for step in series["data"]] == [point["loss"] for point in report["training"]["curve"]]
    assert len(series["data"][-1]["flips"]) == 14


def test_the_report_says_how_it_came_about(report, finished, tiny):
    assert (report["job_id"], report["ranks"], report["device"], report["attempts"]) == (finished, 2, "cpu", 1)
    assert report["spec"]["data"] == [{"source": str(tiny.train), "split": "all", "weight": None}]
    assert report["time"]["stages"].keys() == set(STAGES)
    assert report["time"]["total_s"] == pytest.approx(sum(report["time"]["stages"].values()))
    assert report["samples"] and all(s["teacher"].strip() and s["kbop"].strip() for s in report["samples"])


def test_downloaded_files_are_those_of_the_manifest(downloaded):
    manifest = json.loads((downloaded / "manifest.json").read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {entry["path"] for entry in manifest["files"]}
    for entry in manifest["files"]:
        content = (downloaded / entry["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])


def test_a_new_process_loads_the_checkpoint_and_measures_what_the_report_says(downloaded, report, tiny):
    row = next(row for row in report["perplexity"] if row["set"] == tiny.stories.name)
    command = [sys.executable, "-c", RELOAD, str(downloaded), str(tiny.stories), "64"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    measured = json.loads(out.splitlines()[-1])
    assert measured["kinds"] == ["BinaryLinear"] and measured["tokens"] == row["tokens"]
    assert measured["perplexity"] == pytest.approx(row["kbop"], rel=1e-4)


class Page(HTMLParser):
    """What a page draws inline and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.svgs, self.fetched = 0, []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        for name, value in attrs:
            local = (value or "").startswith(("#", "data:"))
            if name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"} and not local:
                self.fetched.append((tag, name, value))
            if name == "style" and "url(" in (value or "") and "url(#" not in (value or ""):
                self.fetched.append((tag, name, value))


def test_the_report_page_draws_its_plots_and_fetches_nothing(server, finished):
    answer = server.http.get(f"/v1/jobs/{finished}/report", headers={"Accept": "text/html"})
    assert answer.headers["content-type"].startswith("text/html")
    page = Page(answer.text)
    assert page.svgs == 3 and page.fetched == []
    assert "@import" not in answer.text and "<script" not in answer.text
    assert answer.text == server.content(finished, "report/report.html").decode()


@pytest.fixture(scope="module")
def resumed(server, finished, tiny):
    """The same spec in every field, but rank 1 is killed once there is a training checkpoint."""
    job_id = server.submit(tiny.spec(name="undisturbed"))
    server.until_trained(job_id)
    (rank,) = [process for process in server.ranks(job_id) if process.environ()["RANK"] == "1"]
    rank.send_signal(signal.SIGKILL)
    server.succeeded(job_id)
    return job_id


def test_a_job_whose_rank_is_killed_resumes_in_a_second_attempt(server, resumed):
    assert server.job(resumed)["attempt"] == 2
    (note,) = [note for note in notes(server, resumed) if note.startswith("resumed after step ")]
    assert int(note.split()[-1]) in range(5, 40, 5)
    assert [stage for stage, state in stage_events(server, resumed) if state == "skipped"] == ["prepare", "init"]
    assert_ids_grow(server.events(resumed))


def test_a_resumed_job_ends_with_the_bytes_of_an_undisturbed_one(server, finished, resumed):
    files, expected = server.artifacts(resumed), server.artifacts(finished)
    for path in ("model.safetensors", "config.json", "tokenizer.json", "manifest.json"):
        assert files[path]["sha256"] == expected[path]["sha256"], path


def test_a_resumed_job_reports_one_unbroken_curve(server, finished, resumed):
    assert server.report(resumed)["training"]["curve"] == server.report(finished)["training"]["curve"]
    assert server.report(resumed)["perplexity"] == server.report(finished)["perplexity"]
    assert server.report(resumed)["attempts"] == 2


def test_two_ranks_on_two_nodes_end_with_the_bytes_of_two_on_one(serve, server, finished, tiny):
    """Each node, named after its cores, gets half of them, as two ranks on one machine do: sums depend on threads."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    names = ("a" + "_".join(map(str, cores[:half])), "b" + "_".join(map(str, cores[-half:])))
    hosts = tiny.folder / "hosts"
    hosts.write_text("".join(f"{name} slots=1 address=127.0.0.1 device=cpu\n" for name in names))
    on_its_cores = """sh -c 'exec taskset -c $(echo ${1#?} | tr _ ,) sh -c "$2"' start {host} {command}"""
    nodes = serve(tiny.folder, KBOP_HOSTS=str(hosts), KBOP_NODE_COMMAND=on_its_cores)
    job_id = nodes.submit(tiny.spec(name="undisturbed"))
    nodes.succeeded(job_id)
    assert nodes.attempts(job_id) == ["1"]
    files, expected = nodes.artifacts(job_id), server.artifacts(finished)
    assert files["model.safetensors"]["sha256"] == expected["model.safetensors"]["sha256"]
    assert nodes.report(job_id)["training"]["curve"] == server.report(finished)["training"]["curve"]


@dataclass(frozen=True)
class Survivor:
    """A job of one rank, with the global batch of `finished`, whose server was killed and started again meanwhile."""

    job_id: str
    pids: list[int]
    pids_after: list[int]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def survivor(server, finished, tiny):
    job_id = server.submit(tiny.spec(resources={"gpus": 1}))
    server.until(lambda: server.ranks(job_id) and stage_events(server, job_id), job_id)
    pids, events = [process.pid for process in server.ranks(job_id)], server.events(job_id)
    server.kill()
    server.start()
    seen = Survivor(job_id, pids, [process.pid for process in server.ranks(job_id)], events)
    server.succeeded(job_id)
    return seen


def test_a_job_whose_server_is_killed_goes_on_and_is_launched_once(server, survivor):
    assert len(survivor.pids) == 1 and survivor.pids_after == survivor.pids
    assert server.job(survivor.job_id)["attempt"] == 1 and server.attempts(survivor.job_id) == ["1"]
    events = server.events(survivor.job_id)
    assert_ids_grow(events)
    assert events[: len(survivor.events)] == survivor.events
    assert stage_events(server, survivor.job_id) == [(s, state) for s in STAGES for state in ("started", "finished")]


def test_one_rank_and_two_ranks_with_one_global_batch_learn_alike(server, survivor, report):
    alone = server.report(survivor.job_id)
    assert_finite(alone)
    assert (alone["ranks"], report["ranks"]) == (1, 2)
    assert (alone["training"]["steps"], alone["training"]["tokens"]) == (40, report["training"]["tokens"])
    for one, two in zip(alone["training"]["curve"], report["training"]["curve"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.2)
    for one, two in zip(alone["perplexity"], report["perplexity"], strict=True):
        assert one["teacher"] == pytest.approx(two["teacher"], rel=1e-5)
        assert one["kbop"] == pytest.approx(two["kbop"], rel=0.05)


@pytest.fixture(scope="module")
def cancelled(server, finished, tiny):
    """(cancelled while it trained, submitted behind it while it held both slots: effort quick)"""
    job_id = server.submit(tiny.spec(method={"tokens": 10**8}))
    behind = tiny.spec(method={"effort": "quick"}, eval=[{"source": str(tiny.page)}])
    quick_id = server.submit(behind)
    server.until_trained(job_id)
    assert server.job(quick_id)["waiting_reason"]
    server.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
    server.ended(job_id)
    return job_id, quick_id


def test_a_cancel_in_training_ends_every_rank_and_publishes_nothing(server, cancelled):
    job_id, _ = cancelled
    job = server.job(job_id)
    assert (job["status"], job["error"], job["artifacts"]) == ("cancelled", None, 0)
    assert server.ranks(job_id) == []
    exit_codes = json.loads((server.folder_of(job_id) / "attempts/1/exit.json").read_text())["exit_codes"]
    assert exit_codes == [75, 75]  # both saved their state: nobody had to be killed
    assert server.http.get(f"/v1/jobs/{job_id}/report").status_code == 404


def test_the_devices_of_a_cancelled_job_go_to_the_next(server, cancelled):
    server.succeeded(cancelled[1])


def test_effort_quick_trains_nothing_and_packs_bnn_init(server, cancelled):
    server.succeeded(cancelled[1])
    report = server.report(cancelled[1])
    assert (report["training"]["steps"], report["training"]["curve"]) == (0, [])
    assert report["memory"]["training_state_bytes_per_binary_weight"] is None
    (row,) = report["perplexity"]
    assert row["kbop"] == pytest.approx(row["init"], rel=1e-2)  # scales are stored as float16
    page = Page(server.content(cancelled[1], "report/report.html").decode())
    assert page.svgs == 1 and page.fetched == []


def test_a_job_from_random_signs_learns_something(server, finished, tiny):
    job_id = server.submit(tiny.spec(init="random", resources={"gpus": 1}, method={"tokens": 20 * 8 * 64}))
    server.succeeded(job_id)
    report = server.report(job_id)
    assert_finite(report)
    assert all(row["kbop"] < row["init"] for row in report["perplexity"])


def test_no_process_is_left_behind(server, finished):
    jobs = [job["id"] for job in server.http.get("/v1/jobs").json()["data"]]
    assert jobs and not any(server.ranks(job_id, attempt) for job_id in jobs for attempt in (1, 2))


def test_a_model_whose_blocks_stay_on_disk_gives_the_same_checkpoint(server, tiny):
    """The teacher's continuations are left out: each of their tokens would read the whole model again."""
    tensors, reports = [], []
    for offload in ("none", "blocks"):
        method = {"effort": "quick", "calibration_tokens": 2048, "blockwise_steps": 10}
        job_id = server.submit(tiny.spec(method=method, resources={"gpus": 2, "offload": offload}))
        server.succeeded(job_id)
        tensors.append(safetensors.torch.load(server.content(job_id, "model.safetensors")))
        reports.append(server.report(job_id))
    whole, lazy = tensors
    assert whole.keys() == lazy.keys() and all(torch.equal(whole[name], lazy[name]) for name in whole)
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    assert "teacher" in reports[0]["samples"][0] and "teacher" not in reports[1]["samples"][0]


def test_ranks_that_divide_the_teacher_and_the_parameters_between_them_finish_a_job(server, tiny):
    """What the largest models need together; after training the later stages load the teacher again."""
    saving = {"teacher": "sharded", "zero_stage": 3, "activation_checkpointing": True}
    job_id = server.submit(tiny.spec(init="random", method={"tokens": 4 * 8 * 64}, resources=saving))
    server.succeeded(job_id)
    report = server.report(job_id)
    assert_finite(report)
    assert (report["attempts"], report["training"]["steps"]) == (1, 4)
    assert all(row["kbop"] != row["init"] for row in report["perplexity"])
