"""A real `kbop serve` process: everything over a socket, nothing scheduled; the test plays the runner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.artifacts import ArtifactStore
from jobs.records import ArtifactRecord, JobStatus, Lease, NewEvent
from jobs.spec import JobSpec
from jobs.store import Store
from service.client import KbopClient, WatchEvent
from service.sse import parse_stream

CONTENT = bytes(range(256)) * 1000
SPEC: dict[str, Any] = {"model": "hub/model", "data": [{"source": "builtin:python-docs"}]}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", *arguments]


def environment(data_dir: Path, **changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KBOP_")}
    return clean | {"KBOP_DATA_DIR": str(data_dir), "KBOP_HUB_OWNERS": "hub", "KBOP_DISK_FLOOR_BYTES": "0"} | changes


@dataclass
class Running:
    """A server process and the store behind it."""

    process: subprocess.Popen[str]
    url: str
    data_dir: Path
    store: Store

    def claim(self) -> Lease:
        lease = self.store.claim("test", ["cpu:0"], 60.0)
        assert lease is not None
        return lease

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Exit status, and the seconds it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(timeout=20), time.monotonic() - started


Start = Callable[..., Running]


def launch(folder: Path, *options: str, **env: str) -> Running:
    """A server on a free port with its data under `folder`, once it listens."""
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command("serve", "--port", "0", *(options or ("--no-scheduler",))),
            env=environment(folder / "data", **env),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("kbop is listening on "), (folder / "server.log").read_text()
    return Running(process, line.split()[-1], folder / "data", Store(f"sqlite:///{folder / 'data' / 'kbop.db'}"))


def end(server: Running) -> None:
    """Whatever the test left of a server is gone afterwards."""
    server.store.close()
    if server.process.poll() is None:
        server.process.kill()
    server.process.wait()
    assert server.process.stdout is not None
    server.process.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers that the test may stop, all on one data directory."""
    running: list[Running] = []

    def run(*options: str, **env: str) -> Running:
        running.append(launch(tmp_path, *options, **env))
        return running[-1]

    yield run
    for server in running:
        end(server)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests that leave it running: starting one takes seconds."""
    server = launch(tmp_path_factory.mktemp("server"))
    yield server
    end(server)


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """The shared server, without waiting jobs of another test."""
    yield shared
    for job in shared.store.list_jobs(status=JobStatus.QUEUED).jobs:
        shared.store.request_cancel(job.id)


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10, trust_env=False) as client:
        yield client


def test_the_server_gets_ready(http: httpx.Client) -> None:
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.get("/readyz").json()["status"] == "ready"


def test_twenty_submissions_at_once_with_one_key_make_one_job(http: httpx.Client, server: Running) -> None:
    def submit(_: int) -> str:
        answer = httpx.post(
            f"{server.url}/v1/jobs",
            json=SPEC,
            headers={"Idempotency-Key": "one"},
            timeout=20,
            trust_env=False,
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(submit, range(20)))) == 1
    assert len(http.get("/v1/jobs?status=queued").json()["data"]) == 1


def test_events_stream_as_they_happen_and_resume_behind_the_last_one(http: httpx.Client, server: Running) -> None:
    job_id = http.post("/v1/jobs", json=SPEC).json()["id"]
    lease = server.claim()
    headers = {"Accept": "text/event-stream"}
    seen: list[str] = []
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        for message in parse_stream(answer.iter_raw()):
            seen.append(message.id)
            if message.event == "note":
                break
            if len(seen) == 2:
                server.store.append(lease, [NewEvent("note", {"message": "live"})])
    server.store.append(lease, [NewEvent("note", {"message": "missed"})], status=JobStatus.PUBLISHING)
    server.store.finish(lease, JobStatus.SUCCEEDED)
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers | {"Last-Event-ID": seen[-1]}) as answer:
        rest = list(parse_stream(answer.iter_raw()))
    data = [json.loads(message.data) for message in rest]
    assert data[0]["data"]["message"] == "missed" and rest[-1].event == "done" and data[-1]["status"] == "succeeded"
    every = [str(event["id"]) for event in http.get(f"/v1/jobs/{job_id}/events").json()["data"]]
    assert seen + [message.id for message in rest[:-1]] == every


def test_a_slow_watcher_does_not_keep_others_waiting(http: httpx.Client, server: Running) -> None:
    job_id = http.post("/v1/jobs", json=SPEC).json()["id"]
    headers = {"Accept": "text/event-stream"}
    with httpx.Client(base_url=server.url, timeout=10, trust_env=False) as other:
        streams = [other.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) for _ in range(20)]
        for stream in streams:
            stream.__enter__()
        started = time.monotonic()
        assert http.get(f"/v1/jobs/{job_id}").status_code == 200 and time.monotonic() - started < 2
        for stream in streams:
            stream.__exit__(None, None, None)


def test_cancel_reaches_a_waiting_job(http: httpx.Client) -> None:
    job_id = http.post("/v1/jobs", json=SPEC).json()["id"]
    assert http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"


def test_artifacts_download_whole_in_part_and_not_again(http: httpx.Client, server: Running, tmp_path: Path) -> None:
    job_id = http.post("/v1/jobs", json=SPEC).json()["id"]
    source = tmp_path / "model.safetensors"
    source.write_bytes(CONTENT)
    blob = ArtifactStore(server.data_dir / "artifacts").put(source)
    lease = server.claim()
    server.store.append(lease, [], status=JobStatus.PUBLISHING)
    records = [ArtifactRecord(job_id, "model.safetensors", blob.size, blob.sha256)]
    server.store.finish(lease, JobStatus.SUCCEEDED, artifacts=records)
    url = f"/v1/jobs/{job_id}/artifacts/model.safetensors"
    head = http.head(url)
    assert (head.headers["etag"], head.headers["content-length"]) == (f'"{blob.sha256}"', str(len(CONTENT)))
    part = http.get(url, headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, CONTENT[1000:2000])
    assert http.get(url, headers={"If-None-Match": head.headers["etag"]}).status_code == 304
    assert http.get(url, headers={"Accept-Encoding": "gzip, br"}).content == CONTENT
    with KbopClient(server.url) as client:
        assert client.download(job_id, tmp_path / "out") == [tmp_path / "out/model.safetensors"]


def test_sigterm_ends_the_server_in_seconds_although_somebody_watches(start: Start) -> None:
    server = start()
    url = f"{server.url}/v1/jobs/{server.store.submit(JobSpec.model_validate(SPEC)).job.id}/events"
    with httpx.stream("GET", url, headers={"Accept": "text/event-stream"}, trust_env=False) as answer:
        next(answer.iter_raw())
        status, seconds = server.stop()
    assert status == 0 and seconds < 4


def test_a_watcher_survives_a_restart_of_the_server_and_misses_nothing(start: Start) -> None:
    first = start()
    port = first.url.rpartition(":")[2]
    seen: list[WatchEvent] = []

    def watch(job_id: str) -> None:
        with KbopClient(first.url) as client:
            seen.extend(client.watch(job_id))

    with KbopClient(first.url) as client:
        job_id = client.submit(SPEC)["id"]
    watcher = threading.Thread(target=watch, args=(job_id,), daemon=True)
    watcher.start()
    time.sleep(0.5)
    assert first.stop()[0] == 0
    lease = first.claim()
    first.store.append(lease, [NewEvent("note", {"message": "while away"})], status=JobStatus.PUBLISHING)
    second = start("--no-scheduler", "--port", port)
    second.store.finish(lease, JobStatus.SUCCEEDED)
    watcher.join(timeout=15)
    ids = [event.id for event in seen[:-1]]
    assert seen[-1].kind == "done" and ids == [event.id for event in second.store.events(job_id)]


def test_a_server_with_its_scheduler_ticks_and_stops_cleanly(start: Start) -> None:
    server = start("--scheduler", "--cpu-slots", "1")
    deadline = time.monotonic() + 10
    while httpx.get(f"{server.url}/readyz", trust_env=False).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status, seconds = server.stop()
    assert status == 0 and seconds < 5


def refusal(data_dir: Path, *arguments: str, **env: str) -> str:
    """What a command that ends at once with status 1 says."""
    ended = subprocess.run(
        command(*arguments),
        env=environment(data_dir, **env),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr.splitlines()[-1]


def test_listening_to_everybody_without_a_key_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "data", "serve", "--host", "0.0.0.0", "--port", "0")
    assert text.startswith("Error: refusing to listen on 0.0.0.0 without an API key") and "KBOP_API_KEY" in text
    assert not (tmp_path / "data").exists()


def test_a_taken_port_and_a_second_scheduler_are_refused_while_the_first_runs_on(start: Start) -> None:
    server = start("--scheduler")
    port = server.url.rpartition(":")[2]
    assert "cannot listen" in refusal(server.data_dir, "serve", "--port", port)
    assert "[scheduler_running]" in refusal(server.data_dir, "serve", "--port", "0")
    assert server.stop(signal.SIGINT)[0] == 0


def test_a_data_directory_that_cannot_be_made_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in refusal(tmp_path / "file" / "data", "serve", "--port", "0")


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "nodialect://user:secret-word@host/x"])
def test_a_database_url_that_cannot_work_is_refused_in_words(tmp_path: Path, url: str) -> None:
    text = refusal(tmp_path / "data", "serve", "--port", "0", KBOP_DATABASE_URL=url)
    assert "KBOP_DATABASE_URL" in text and "secret-word" not in text


def test_a_worker_ticks_for_a_server_without_scheduler_and_stops_cleanly(start: Start) -> None:
    server = start()
    worker = subprocess.Popen(command("worker"), env=environment(server.data_dir), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not (server.data_dir / "scheduler.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    worker.terminate()
    assert worker.wait(timeout=10) == 0


def test_with_a_key_the_command_needs_it_and_the_log_never_has_it(start: Start, tmp_path: Path) -> None:
    key = "a-long-enough-key-0123"
    server = start(KBOP_API_KEY=key)
    arguments = ("jobs", "--endpoint", server.url)
    assert "[unauthorized]" in refusal(tmp_path, *arguments)
    with_key = subprocess.run(
        command(*arguments),
        env=environment(tmp_path, KBOP_API_KEY=key),
        capture_output=True,
        text=True,
        check=True,
    )
    assert with_key.stdout == "no jobs\n" and key not in (tmp_path / "server.log").read_text()
