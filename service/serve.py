"""The server and the worker as processes: settings, store, scheduler thread, listening socket, orderly end.

Refuses to stop jobs: when this process ends, runners go on, and the next scheduler finds them again.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from pydantic import ValidationError
from sqlalchemy.exc import ArgumentError

from jobs.devices import discover_devices
from jobs.errors import JobsError
from jobs.executors.local import LocalExecutor
from jobs.nodes import Cluster, read_hostfile
from jobs.runner_settings import RunnerSettings
from jobs.scheduler import Scheduler, SchedulerSettings
from jobs.store import Store
from service.json_logs import configure_json_logs
from service.settings import ServerSettings, visible_gpus

Fail = Callable[[str, str, str], NoReturn]

#: A stream that does not notice the end of the server by itself is cut after this many seconds.
GRACEFUL_S = 5
SCHEDULER_PAUSE_S = 5.0

_log = logging.getLogger(__name__)


def run_server(overrides: Mapping[str, Any], fail: Fail) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        overrides: Settings from the command line; None leaves one to the environment.
        fail: Ends the command with a message, a hint and a code.
    """
    settings = load_settings(overrides, fail)
    with explained(fail), listening(settings, fail) as listener, opened_store(settings, fail) as store:
        if not settings.embed_scheduler:
            _serve(settings, store, None, listener)
            return
        cluster = cluster_of(settings)
        devices = devices_of(settings, cluster)
        with make_scheduler(settings, store, devices, cluster) as scheduler, scheduler_thread(scheduler):
            _serve(settings, store, devices, listener)


def run_worker(overrides: Mapping[str, Any], fail: Fail) -> None:
    """Schedules until SIGTERM or Ctrl-C; arguments as for `run_server`."""
    settings = load_settings(overrides, fail)
    with explained(fail), opened_store(settings, fail) as store:
        cluster = cluster_of(settings)
        devices = devices_of(settings, cluster)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with make_scheduler(settings, store, devices, cluster) as scheduler:
            _log.info("scheduling on %s for %s", ", ".join(devices), settings.data_dir)
            run_scheduler(scheduler, stop)


def load_settings(overrides: Mapping[str, Any], fail: Fail) -> ServerSettings:
    """Settings from the command line, then the environment, then defaults."""
    try:
        return ServerSettings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            name = f"KBOP_{str(detail['loc'][0]).upper()}: " if detail["loc"] else ""
            lines.append(name + str(detail["msg"]).removeprefix("Value error, "))
        fail("; ".join(lines), "", "bad_settings")


@contextmanager
def explained(fail: Fail) -> Iterator[None]:
    """Ends the command in words when the data directory, database or scheduler cannot be had."""
    try:
        yield
    except JobsError as error:
        fail(error.message, error.hint, error.code)
    except OSError as error:
        fail(f"{error.filename or 'the data directory'}: {error.strerror or error}", "", "os_error")


@contextmanager
def opened_store(settings: ServerSettings, fail: Fail) -> Iterator[Store]:
    """The store at its newest schema, with the log going to JSON from here on."""
    configure_json_logs()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    try:
        store = Store.open(settings.resolved_database_url())
    except (ValueError, ImportError, ArgumentError) as error:
        hint = "use sqlite:////absolute/path/kbop.db or an URL whose driver is installed"
        fail(f"KBOP_DATABASE_URL cannot be used: {error}", hint, "bad_settings")
    try:
        yield store
    finally:
        store.close()


@contextmanager
def listening(settings: ServerSettings, fail: Fail) -> Iterator[socket.socket]:
    """A bound socket, before anything else is started: a taken port is the most common mistake."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    address = (settings.host.strip("[]"), settings.port)
    try:
        listener = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        hint = "choose another --port, or stop the program that uses this one"
        fail(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}",
            hint,
            "cannot_listen",
        )
    with listener:
        yield listener


def cluster_of(settings: ServerSettings) -> Cluster | None:
    """The nodes of the host list; None without one: jobs run on this machine. Raises BadHostfile."""
    if settings.hosts is None:
        return None
    return Cluster(read_hostfile(settings.hosts), settings.node_command, settings.node_python)


def devices_of(settings: ServerSettings, cluster: Cluster | None) -> tuple[str, ...]:
    """Every device jobs may run on."""
    if cluster is not None:
        return cluster.devices
    return tuple(discover_devices(settings.cpu_slots, visible_gpus()))


def make_scheduler(
    settings: ServerSettings, store: Store, devices: tuple[str, ...], cluster: Cluster | None = None
) -> Scheduler:
    """A scheduler with the local executor. Raises SchedulerRunning."""
    runner = RunnerSettings(
        lease_s=settings.lease_s,
        grace_s=settings.grace_s,
        max_attempts=settings.max_attempts,
        watchdog_s=settings.watchdog_s,
        cluster=cluster,
    )
    executor = LocalExecutor(settings.data_dir, settings.resolved_database_url(), runner)
    return Scheduler(
        store,
        executor,
        SchedulerSettings(
            data_dir=settings.data_dir,
            devices=devices,
            lease_s=settings.lease_s,
            max_attempts=settings.max_attempts,
            disk_floor_bytes=settings.disk_floor_bytes,
        ),
    )


def run_scheduler(scheduler: Scheduler, stop: threading.Event) -> None:
    """Ticks until `stop` is set; an unexpected error is logged and, after a pause, tried again.

    The alternative, a dead thread in a living server, would leave jobs queued for ever.
    """
    while not stop.is_set():
        try:
            scheduler.run_forever(stop)
        except Exception:  # top of a thread
            _log.exception("the scheduler failed, trying again in %.0f s", SCHEDULER_PAUSE_S)
            stop.wait(SCHEDULER_PAUSE_S)


@contextmanager
def scheduler_thread(scheduler: Scheduler) -> Iterator[None]:
    """The scheduler in the background while the block runs."""
    stop = threading.Event()
    thread = threading.Thread(target=run_scheduler, args=(scheduler, stop), name="scheduler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _serve(settings: ServerSettings, store: Store, devices: tuple[str, ...] | None, listener: socket.socket) -> None:
    """Runs uvicorn on the socket until a signal, and returns after the answers under way are out."""
    import uvicorn

    from service.app import create_app

    # uvicorn raises the signal again when it is done; by default that would end us before the scheduler has
    # stopped.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        create_app(settings, store, devices),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_S,
    )
    host, port = listener.getsockname()[:2]
    print(f"kbop is listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
