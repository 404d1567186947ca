"""One job run here, without a server, through the same store, queue and runner.

Refuses to leave half a result: files appear in the output folder only when the job has succeeded.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from jobs.artifacts import ArtifactStore
from jobs.devices import check_feasible, discover_devices
from jobs.errors import AlreadyFinished, JobsError
from jobs.layout import artifacts_dir, job_dir
from jobs.process import become_subreaper
from jobs.records import ArtifactRecord, JobRecord
from jobs.runner import run_attempt
from jobs.runner_settings import RunnerSettings
from jobs.sources import SourcePolicy, resolve_data, resolve_model
from jobs.spec import JobSpec
from jobs.store import Store
from service.display import JobView
from service.settings import visible_gpus
from service.spec_errors import InvalidSpec, parse_spec

Fail = Callable[..., NoReturn]

POLL_S = 0.2
#: Everything the user running the command may read anyway.
EVERYTHING = SourcePolicy(model_roots=(Path("/"),), data_roots=(Path("/"),), hub_owners=("*",))


@dataclass(frozen=True)
class BinarizeRequest:
    """What `kbop binarize` was asked for.

    Attributes:
        spec: The spec as JSON values.
        out: Folder for the published files.
        work_dir: Where the run's files stay; None: a temporary folder beside `out`, removed at the end.
        force: Write into `out` although it is not empty.
        runner: How attempts are run.
    """

    spec: dict[str, Any]
    out: Path
    work_dir: Path | None = None
    force: bool = False
    runner: RunnerSettings = field(default_factory=lambda: RunnerSettings(grace_s=10.0, retry_delay_s=1.0))


def run_here(request: BinarizeRequest, fail: Fail) -> JobRecord:
    """Runs the job to its end, shows its progress and, when it succeeded, puts its files in place.

    Args:
        request: What to do.
        fail: Ends the command with a message, a hint and a code.

    Returns:
        The job as it ended. Ctrl-C cancels it.
    """
    # What the job system logs is either shown as progress or part of the final error.
    logging.getLogger("jobs").setLevel(logging.CRITICAL)
    try:
        spec = parse_spec(json.dumps(request.spec))
        devices = discover_devices(os.cpu_count() or 1, visible_gpus())
        _check(spec, devices)
        _check_empty(request.out, request.force, "--force")
        with data_folder(request) as data_dir:
            return _run(request, spec, devices, data_dir)
    except InvalidSpec as error:
        fail(str(error), "the fields are described in jobs/spec.py", "invalid_spec")
    except JobsError as error:
        fail(error.message, error.hint, error.code)
    except OSError as error:
        fail(f"{error.filename or request.out}: {error.strerror or error}", "", "os_error")


def _check(spec: JobSpec, devices: list[str]) -> None:
    resolve_model(spec.model, EVERYTHING)
    for source in (*spec.data, *spec.eval):
        resolve_data(source.source, EVERYTHING)
    check_feasible(spec, devices)


def _check_empty(folder: Path, force: bool, option: str) -> None:
    if folder.exists() and not force and (not folder.is_dir() or any(folder.iterdir())):
        raise JobsError(f"{folder} is not an empty folder", f"choose another one, or use {option}")


@contextmanager
def data_folder(request: BinarizeRequest) -> Iterator[Path]:
    """The run's data directory: the one to keep, or a temporary one on the output's file system."""
    if request.work_dir is not None:
        if request.work_dir.exists() and any(request.work_dir.iterdir()):
            raise JobsError(f"{request.work_dir} is not an empty folder", "choose another --work-dir")
        request.work_dir.mkdir(parents=True, exist_ok=True)
        yield request.work_dir.resolve()
        return
    parent = request.out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kbop-", dir=parent) as folder:
        yield Path(folder)


def _run(request: BinarizeRequest, spec: JobSpec, devices: list[str], data_dir: Path) -> JobRecord:
    become_subreaper()
    store = Store.open(f"sqlite:///{data_dir / 'kbop.db'}")
    job_id = store.submit(spec).job.id
    attempts = _Attempts(store, data_dir, job_id, devices, request.runner)
    try:
        with interrupts() as interrupted:
            attempts.start()
            _show(store, job_id, attempts, interrupted)
    finally:
        # Also when showing failed: the data directory must not be removed under running ranks.
        if attempts.is_alive():
            _cancel(store, job_id)
            attempts.join()
    if attempts.error is not None:
        raise attempts.error
    blobs = ArtifactStore(artifacts_dir(data_dir))
    for record in store.artifacts(job_id):
        _place(blobs, record, request.out)
    job = store.get(job_id)
    store.close()
    return job


def _cancel(store: Store, job_id: str) -> None:
    with suppress(AlreadyFinished):
        store.request_cancel(job_id)


class _Attempts(threading.Thread):
    """Claims and runs attempts until the job has ended. The ranks live and die with this thread."""

    def __init__(self, store: Store, data_dir: Path, job_id: str, devices: list[str], settings: RunnerSettings) -> None:
        super().__init__(name="attempts")
        self._store, self._data_dir, self._job_id = store, data_dir, job_id
        self._devices, self._settings = devices, settings
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._store.get(self._job_id).status.terminal:
                lease = self._store.claim("kbop binarize", self._devices, self._settings.lease_s)
                if lease is None:
                    time.sleep(POLL_S)
                    continue
                blobs = ArtifactStore(artifacts_dir(self._data_dir))
                run_attempt(self._store, blobs, lease, job_dir(self._data_dir, self._job_id), self._settings)
        except BaseException as error:  # top of a thread; raised again by its starter
            self.error = error


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of ending this process under its ranks."""
    event = threading.Event()
    previous = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show(store: Store, job_id: str, attempts: threading.Thread, interrupted: threading.Event) -> None:
    """Shows events until the attempts are over and none is left; cancels the job when interrupted."""
    after, cancelled = 0, False
    with JobView() as view:
        while True:
            if interrupted.is_set() and not cancelled:
                cancelled = True
                _cancel(store, job_id)
            over = not attempts.is_alive()
            events = store.events(job_id, after)
            for event in events:
                after = event.id
                view.show(event.kind, event.data)
            if over and not events:
                return
            if not events:
                time.sleep(POLL_S)


def _place(blobs: ArtifactStore, record: ArtifactRecord, out: Path) -> None:
    """Copies one published file into the output folder under a temporary name first."""
    target = out / record.path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(blobs.path(record.sha256), part)
    part.replace(target)
