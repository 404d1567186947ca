"""Fixtures for the torch-free part of jobs: a store on a clock that the test turns, and specs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs
from jobs.records import JobRecord, JobStatus, Lease
from jobs.spec import JobSpec
from jobs.store import Store


class Clock:
    """Unix seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def make_spec(**fields: Any) -> JobSpec:
    gpus = fields.pop("gpus", 1)
    wire = {"model": "builtin:demo", "data": [{"source": "builtin:python-docs"}], "resources": {"gpus": gpus}}
    return JobSpec.model_validate(wire | fields)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without jobs, to be copied."""
    path = tmp_path_factory.mktemp("database") / "kbop.db"
    Store.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(empty_database: Path, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    path = tmp_path / "kbop.db"
    shutil.copy(empty_database, path)
    store = Store(f"sqlite:///{path}", clock)
    yield store
    store.close()


@pytest.fixture
def spec() -> Callable[..., JobSpec]:
    return make_spec


@pytest.fixture
def submit(store: Store) -> Callable[..., JobRecord]:
    """Submit a job with the given spec fields."""
    return lambda **fields: store.submit(make_spec(**fields)).job


@pytest.fixture
def running(store: Store, submit: Callable[..., JobRecord]) -> Lease:
    """The lease of a job that has just been claimed on cpu:0 of two CPU slots."""
    submit()
    lease = store.claim("tester", ["cpu:0", "cpu:1"], 30)
    assert lease is not None
    return lease


@pytest.fixture
def statuses(store: Store) -> Callable[[str], list[JobStatus]]:
    """Every status a job has had, in order, from its events."""
    return lambda job_id: [e.data["to"] for e in store.events(job_id) if e.kind == "status"]


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait until something is true, at most 20 s."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "did not happen within 20 s"
            time.sleep(0.01)

    return wait


@pytest.fixture
def project_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find this checkout's packages."""
    monkeypatch.setenv("PYTHONPATH", str(Path(jobs.__file__).parents[1]))
