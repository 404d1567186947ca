"""Owns the split of a step's time into named phases. Refuses to read a clock: it is given one.

A phase inside another counts for itself alone: the wait for a collective during backward is communication.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Phases of a training step: the student's and teacher's forward pass, the backward pass, waiting for other ranks, the
#: flip rule, and the optimizer of the full-precision side (DeepSpeed's own collectives included).
PHASES = ("forward", "backward", "communication", "flips", "optimizer")


def no_clock() -> float:
    """A clock that stands still: nothing is measured."""
    return 0.0


def no_device() -> None:
    """Waits for nothing: the work of a CPU is done when it was asked for."""


class Phases:
    """Seconds spent in each phase since they were last taken.

    Args:
        clock: seconds, monotonic.
        settle: waits until the device has done what it was asked for, so that a phase is charged with its own work.
            Not called within backward, where transfers overlap with it: there only the host's wait is communication.
    """

    def __init__(self, clock: Callable[[], float] = no_clock, settle: Callable[[], None] = no_device) -> None:
        self._clock, self._settle = clock, settle
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for `name`."""
        self._turn(nested=bool(self._open))
        self._open.append(name)
        try:
            yield
        finally:
            self._turn(nested=len(self._open) > 1)
            self._open.pop()

    def _turn(self, nested: bool) -> None:
        """Give what has passed since the last change to the innermost open phase; `nested`: another stays open."""
        if not (nested and self._open[0] == "backward"):
            self._settle()
        now = self._clock()
        if self._open:
            self._spent[self._open[-1]] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Seconds by phase, those of PHASES always among them; counting starts anew."""
        taken = dict.fromkeys(PHASES, 0.0) | dict(self._spent)
        self._spent.clear()
        return taken
