"""Owns what rank 0 tells the runner while it works: lines of `events.jsonl`. Refuses to know the store.

The other ranks hold a journal that writes nothing, so that stages need not ask which rank they are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

#: Least time between two progress lines of a stage, seconds; the last step of a stage is always written.
PROGRESS_EVERY_S = 0.5


class Journal:
    """Appends events to a file, one JSON object a line.

    Args:
        path: the attempt's events.jsonl; None writes nothing (ranks other than 0).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stage = ""
        self._stage_start = self._first_at = self._last_progress = 0.0
        self._first_step: int | None = None
        self._last = (0, 0)

    def stage(self, name: str, state: str, seconds: float | None = None) -> None:
        """A stage `started`, `finished` (with its seconds) or was `skipped` because it was done before."""
        self._stage, self._stage_start, self._last_progress, self._first_step = name, time.monotonic(), 0.0, None
        timing = {} if seconds is None else {"seconds": round(seconds, 3)}
        self._write({"kind": "stage", "stage": name, "state": state, **timing})

    def progress(self, step: int, steps: int, **metrics: float) -> None:
        """`step` of `steps` of the current stage are done; the time left follows from the pace since the first call.

        A stage may have several parts: one begins when `steps` changes or `step` goes back, and has a pace of its own.
        """
        now = time.monotonic()
        last_step, last_steps = self._last
        if self._first_step is None or steps != last_steps or step < last_step:
            self._first_step, self._first_at = step, now
        self._last = (step, steps)
        if now - self._last_progress < PROGRESS_EVERY_S and step < steps:
            return
        self._last_progress = now
        done = step - self._first_step
        eta = round((now - self._first_at) / done * (steps - step), 1) if done else None
        line = {"kind": "progress", "stage": self._stage, "step": step, "steps": steps}
        self._write({**line, "eta_s": eta, "metrics": metrics})

    def seconds_in_stage(self) -> float:
        """Seconds since the current stage began."""
        return time.monotonic() - self._stage_start

    def note(self, message: str) -> None:
        """Something a person may want to read."""
        self._write({"kind": "note", "message": message})

    def _write(self, event: dict[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**event, "at": time.time()}) + "\n")
