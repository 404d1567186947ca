"""The events file of an attempt: its new lines, and how they become rows of the store.

Refuses to trust it: rank 0 may die in the middle of a line, and what a line says never moves a job backwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import StoreUnavailable
from jobs.records import JobStatus, Lease, NewEvent
from jobs.store import Store

#: Which status a job has while a stage runs, in the order in which they are reached.
STAGE_STATUS = {
    "prepare": JobStatus.PREPARING,
    "init": JobStatus.PREPARING,
    "train": JobStatus.RUNNING,
    "pack": JobStatus.EVALUATING,
    "evaluate": JobStatus.EVALUATING,
}
_ORDER = (JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.EVALUATING)


class EventTail:
    """Reads a growing file of JSON lines; each complete line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> list[NewEvent]:
        """Events of the lines completed since the last call; a line without its newline waits for it."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        return [_parse(line) for line in complete.splitlines() if line.strip()]


def _parse(line: bytes) -> NewEvent:
    """One line as an event; a line that is none becomes a note saying so."""
    try:
        # NaN and infinities are not JSON: no client could read them back.
        data = json.loads(line, parse_constant=lambda _name: None)
        kind, at = data.pop("kind"), data.pop("at")
        if kind in ("stage", "progress", "note") and isinstance(at, int | float):
            return NewEvent(kind, data, float(at))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    text = line[:200].decode(errors="replace")
    return NewEvent("note", {"message": f"unreadable line in events.jsonl: {text}"}, actor="runner")


@dataclass(frozen=True)
class EventBatch:
    """Events to store together, and what the last of them means for the job."""

    events: tuple[NewEvent, ...]
    progress: dict[str, Any] | None
    status: JobStatus | None
    reason: str


def batches(events: Iterable[NewEvent], status: JobStatus) -> Iterator[EventBatch]:
    """Cut events where the job's status, `status` at first, moves on, so that both are stored in order."""
    batch: list[NewEvent] = []
    progress: dict[str, Any] | None = None
    for event in events:
        batch.append(event)
        progress = progress_of(event) or progress
        reached = _reached(event)
        if reached is not None and _ORDER.index(reached) > _ORDER.index(status):
            status = reached
            yield EventBatch(tuple(batch), progress, status, f"stage {event.data['stage']} started")
            batch, progress = [], None
    if batch:
        yield EventBatch(tuple(batch), progress, None, "")


def _reached(event: NewEvent) -> JobStatus | None:
    if event.kind != "stage" or event.data.get("state") != "started":
        return None
    return STAGE_STATUS.get(str(event.data.get("stage")))


def progress_of(event: NewEvent) -> dict[str, Any] | None:
    """The job's progress after the event: {stage, step, steps, percent, eta_s, metrics}; None: unchanged."""
    data = event.data
    if event.kind == "stage" and data.get("state") == "started":
        data = {"stage": data.get("stage")}
    elif event.kind != "progress":
        return None
    step, steps = data.get("step"), data.get("steps")
    percent = None
    if isinstance(step, int | float) and isinstance(steps, int | float) and steps > 0:
        percent = round(100 * min(step / steps, 1.0), 1)
    return {
        "stage": data.get("stage"),
        "step": step,
        "steps": steps,
        "percent": percent,
        "eta_s": data.get("eta_s"),
        "metrics": data.get("metrics") or {},
    }


class EventForwarder:
    """Carries an attempt's events from the file to the store; keeps what the store could not take yet.

    `on_event` is told of each when it is read, before it is stored.
    """

    def __init__(
        self, store: Store, lease: Lease, path: Path, on_event: Callable[[NewEvent], None] = lambda event: None
    ) -> None:
        self._store = store
        self._lease = lease
        self._tail = EventTail(path)
        self._on_event = on_event
        self._pending: list[NewEvent] = []
        self._status = JobStatus.PREPARING

    def forward(self) -> bool:
        """Store what is new; False when the database did not answer and some is left for the next call.

        Raises LeaseLost.
        """
        for event in self._tail.read():
            self._on_event(event)
            self._pending.append(event)
        for batch in list(batches(self._pending, self._status)):
            try:
                self._store.append(
                    self._lease,
                    batch.events,
                    status=batch.status,
                    progress=batch.progress,
                    reason=batch.reason,
                )
            except StoreUnavailable:
                return False
            self._status = batch.status or self._status
            del self._pending[: len(batch.events)]
        return True
