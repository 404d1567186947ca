"""A server application over a real store in a temporary folder, and sources it accepts."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import typer.testing
from fastapi.testclient import TestClient

from jobs.artifacts import ArtifactStore
from jobs.records import ArtifactRecord, JobStatus, Lease, NewEvent
from jobs.store import Store
from service import cli, client
from service.app import create_app
from service.settings import ServerSettings


def write_model(folder: Path) -> Path:
    """A folder that looks like a model: a config and one tensor of four bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    return folder


@dataclass
class Server:
    """The application under test and what is behind it."""

    http: TestClient
    store: Store
    data_dir: Path
    spec: dict[str, Any]
    roots: dict[str, Any]

    def submit(self, **changes: Any) -> dict[str, Any]:
        """A job through the API."""
        answer = self.http.post("/v1/jobs", json=self.spec | changes)
        assert answer.status_code == 202, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def claim(self) -> Lease:
        """The next job, as a scheduler would take it."""
        lease = self.store.claim("test", ["cpu:0", "cpu:1"], 60.0)
        assert lease is not None
        return lease

    def finish(self, files: dict[str, bytes] | None = None, *, events: int = 0) -> str:
        """A job that ran, said something, and published files."""
        job_id: str = self.submit()["id"]
        lease = self.claim()
        notes = [NewEvent("note", {"message": f"n{i}"}) for i in range(events)]
        self.store.append(lease, notes, status=JobStatus.PUBLISHING)
        records = []
        for path, content in (files or {}).items():
            source = self.data_dir / "source"
            source.write_bytes(content)
            blob = ArtifactStore(self.data_dir / "artifacts").put(source)
            records.append(ArtifactRecord(job_id, path, blob.size, blob.sha256))
        self.store.finish(lease, JobStatus.SUCCEEDED, artifacts=records)
        return job_id


MakeServer = Callable[..., Server]


@pytest.fixture(scope="session", autouse=True)
def quiet_log() -> None:
    """structlog's default prints tracebacks in colour, which takes seconds."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy: migrating takes longer than most tests."""
    file = tmp_path_factory.mktemp("database") / "kbop.db"
    Store.open(f"sqlite:///{file}").close()
    return file


@pytest.fixture
def make_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Iterator[MakeServer]:
    """Makes servers with chosen settings on one data directory."""
    monkeypatch.delenv("KBOP_API_KEY", raising=False)
    sources = tmp_path / "sources"
    write_model(sources / "model")
    (sources / "text.txt").write_text("some text")
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    shutil.copy(empty_database, data_dir / "kbop.db")
    opened = ExitStack()

    def make(**changes: Any) -> Server:
        roots = {"model_roots": (sources,), "data_roots": (sources,)}
        values: dict[str, Any] = {"data_dir": data_dir, "embed_scheduler": False, "disk_floor_bytes": 0}
        values |= roots | changes
        settings = ServerSettings(**values)
        store = Store(settings.resolved_database_url())
        opened.callback(store.close)
        http = opened.enter_context(TestClient(create_app(settings, store, ("cpu:0", "cpu:1"))))
        spec = {"model": str(sources / "model"), "data": [{"source": str(sources / "text.txt")}]}
        return Server(http, store, data_dir, spec, roots)

    with opened:
        yield make


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    """A server without a key."""
    return make_server()


class AppTransport(httpx.BaseTransport):
    """Carries the client's requests to an application in this process."""

    def __init__(self, http: TestClient) -> None:
        self._http = http

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        target = request.url.raw_path.decode()
        answer = self._http.request(request.method, target, headers=list(request.headers.raw), content=request.read())
        headers = [(k, v) for k, v in answer.headers.raw if k.lower() != b"transfer-encoding"]
        return httpx.Response(answer.status_code, headers=headers, stream=httpx.ByteStream(answer.content))


Kbop = Callable[..., "typer.testing.Result"]


@pytest.fixture
def kbop(server: Server, monkeypatch: pytest.MonkeyPatch) -> Kbop:
    """Runs the `kbop` command against the server fixture."""
    real = client.KbopClient

    def connect(endpoint: str, api_key: str | None = None) -> client.KbopClient:
        return real(endpoint, api_key, transport=AppTransport(server.http))

    monkeypatch.setattr(client, "KbopClient", functools.wraps(real)(connect))
    monkeypatch.delenv("KBOP_ENDPOINT", raising=False)
    return lambda *arguments: typer.testing.CliRunner().invoke(cli.app, [str(a) for a in arguments])
