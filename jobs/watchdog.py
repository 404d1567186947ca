"""Notices ranks that run but get nowhere: no event of rank 0 for longer than its stage may be silent.

Refuses to end them, and to guess progress from processor time: ranks that wait for each other may burn all of it.

Training tells of every step, and no collective of a step may hang longer than ten minutes. Preparation and packing are
silent while one large file is read or written, so they get as long as the ranks wait for each other there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.records import NewEvent

#: How much longer than a training step another stage, or the start of training, may be silent.
OTHERS = 4


@dataclass(frozen=True)
class Stall:
    """No progress: in which stage (empty: before the first), for how many seconds, and how many are allowed."""

    stage: str
    seconds: float
    limit_s: float


class Watchdog:
    """Sees the events of one attempt.

    Args:
        limit_s: Seconds between two steps of training; `OTHERS` times that at any other time.
        clock: Monotonic seconds.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._stage, self._stepping = "", False
        self._seen = clock()

    def saw(self, event: NewEvent) -> None:
        """An event of rank 0 was read: a sign of progress, whatever it says."""
        self._seen = self._clock()
        if event.kind in ("stage", "progress"):
            self._stage = str(event.data.get("stage") or "")
            step, steps = event.data.get("step"), event.data.get("steps")
            # After the last step the result is saved, which says nothing of itself.
            self._stepping = event.kind == "progress" and self._stage == "train" and step != steps

    def stall(self) -> Stall | None:
        """Why the attempt should end; None while there is progress."""
        limit = self._limit_s if self._stepping else OTHERS * self._limit_s
        seconds = self._clock() - self._seen
        return Stall(self._stage, seconds, limit) if seconds > limit else None
