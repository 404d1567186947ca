"""The heartbeat of an attempt: a thread that keeps the lease and learns of cancel requests.

Refuses to act on what it learns: it sets flags, the runner's loop reads them.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from jobs.errors import LeaseLost, StoreUnavailable
from jobs.records import Lease
from jobs.store import Store

_log = logging.getLogger(__name__)


class Heartbeat:
    """Renews `lease` while the `with` block runs.

    Args:
        lease_s: Seconds a renewal lasts. When none has succeeded for that long, the lease counts as lost:
            somebody else may hold the job by then.
        every_s: Seconds between renewals, which is also how late a cancel request may be noticed.
    """

    def __init__(self, store: Store, lease: Lease, lease_s: float, every_s: float = 1.0) -> None:
        self._store = store
        self._lease = lease
        self._lease_s = lease_s
        self._every_s = min(every_s, lease_s / 3)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._renewed = time.monotonic()
        self.cancel_requested = False
        self.lost = False

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raise LeaseLost when the lease is."""
        if self.lost:
            raise LeaseLost(self._lease.job_id, self._lease.attempt)

    def _run(self) -> None:
        try:
            while not self.lost and not self._stop.is_set():
                self._beat()
                self._stop.wait(self._every_s)
        except BaseException:
            self.lost = True  # nobody renews from here on
            raise

    def _beat(self) -> None:
        asked = time.monotonic()
        try:
            view = self._store.renew(self._lease, self._lease_s)
        except LeaseLost:
            self.lost = True
        except StoreUnavailable as error:
            self.lost = time.monotonic() - self._renewed > self._lease_s
            _log.warning("lease not renewed: %s", error)
        else:
            self._renewed = asked
            self.cancel_requested = view.cancel_requested
