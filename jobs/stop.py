"""Owns what SIGTERM does to a rank: end it at once, or let training save its state first. Saves nothing itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Exit status of a rank that was stopped; nothing is lost, since the stage starts again or resumes.
EXIT_STOPPED = 75


class StopAsked(Exception):
    """The runner asked for a stop, and what had to be saved first is saved."""


class Stop:
    """Whether a stop was asked for.

    Attributes:
        asked: SIGTERM has arrived.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False

    def listen(self) -> None:
        """Take over SIGTERM in this process."""
        signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block SIGTERM only sets `asked`; outside it ends the process."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if not self._deferred:
            os._exit(EXIT_STOPPED)
