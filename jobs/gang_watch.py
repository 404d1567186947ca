"""One gang from its start to its last exit: carry its events, stop it when there is a reason to, say how it ended.

Refuses to write to the store (but for the events it forwards) and to judge the end: the runner does.

The stop ladder: SIGTERM, so that the ranks may write a checkpoint; SIGKILL when their grace is over.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import ClusterError
from jobs.events import EventForwarder
from jobs.failures import EXIT_STOPPED, GangEnd
from jobs.gang import Gang
from jobs.heartbeat import Heartbeat
from jobs.records import Lease
from jobs.runner_settings import RunnerSettings
from jobs.store import Store
from jobs.watchdog import Stall, Watchdog

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """What is watched beside the ranks.

    Attributes:
        store: Where events go.
        lease: Of the attempt.
        folder: The attempt's.
        heartbeat: Knows of cancel requests and of a lost lease.
        stop: Set when the runner is to stop while its job goes on.
        settings: Pauses, graces and the watchdog's limit.
    """

    store: Store
    lease: Lease
    folder: Path
    heartbeat: Heartbeat
    stop: threading.Event
    settings: RunnerSettings

    @property
    def stopping(self) -> bool:
        """Whether somebody asked the attempt to stop."""
        return self.stop.is_set() or self.heartbeat.cancel_requested


def watch(gang: Gang, watched: Watched) -> GangEnd:
    """Start the ranks and return when every one has ended and its events are stored. Raises LeaseLost or OSError."""
    dog = Watchdog(watched.settings.watchdog_s)
    forwarder = EventForwarder(watched.store, watched.lease, watched.folder / "events.jsonl", dog.saw)
    try:
        gang.start()
        end = _until_ended(gang, watched, forwarder, dog)
    except ClusterError as error:
        gang.kill()
        end = GangEnd(lost=error)
    while not forwarder.forward():
        watched.heartbeat.check()
        time.sleep(watched.settings.poll_s)
    return end


def _until_ended(gang: Gang, watched: Watched, forwarder: EventForwarder, dog: Watchdog) -> GangEnd:
    first_failed: tuple[int, ...] = ()
    stall: Stall | None = None
    kill_at: float | None = None
    while None in (codes := gang.poll()):
        watched.heartbeat.check()
        forwarder.forward()
        if kill_at is None:
            first_failed, stall = _failed(codes, watched), dog.stall()
            grace = _grace(bool(first_failed or stall), watched)
            if grace is not None:
                _log.info("stopping the ranks within %.0f s", grace)
                gang.terminate()
                kill_at = time.monotonic() + grace
        elif time.monotonic() > kill_at:
            gang.kill()
        time.sleep(watched.settings.poll_s)
    if kill_at is None:
        first_failed = _failed(codes, watched)
    return GangEnd(tuple(code for code in codes if code is not None), first_failed, stall)


def _failed(codes: Sequence[int | None], watched: Watched) -> tuple[int, ...]:
    """Ranks that failed by themselves.

    While the attempt is being stopped, obeying SIGTERM is no failure: whoever stops a whole machine or
    container sends it to the ranks at the same time as to us.
    """
    fine = (None, 0, EXIT_STOPPED, -signal.SIGTERM) if watched.stopping else (None, 0)
    return tuple(rank for rank, code in enumerate(codes) if code not in fine)


def _grace(failed: bool, watched: Watched) -> float | None:
    """Seconds the ranks get when they are to stop now; None: they go on."""
    if failed:
        return watched.settings.peer_grace_s
    return watched.settings.grace_s if watched.stopping else None
