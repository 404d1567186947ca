"""How an attempt is run, as the server tells its runner. Refuses to read the environment: the server's settings do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TypedDict

from jobs.gang import RANK_COMMAND
from jobs.nodes import Cluster


class Retries(TypedDict):
    """How often and how late an attempt is followed by another."""

    max_attempts: int
    retry_delay_s: float


@dataclass(frozen=True)
class RunnerSettings:
    """How an attempt is run.

    Attributes:
        lease_s: Seconds a lease lasts without renewal.
        grace_s: Seconds ranks have to write a checkpoint after a cancel or stop, before they are killed.
        peer_grace_s: The same after another rank failed: there is nothing worth waiting for.
        max_attempts: Attempts of a job that end in system errors before it fails.
        retry_delay_s: Seconds before the second attempt; doubles with each further one.
        poll_s: Seconds between two looks at the ranks.
        watchdog_s: Seconds training may go without a step; the other stages, which say less of themselves, get
            four times as long (`jobs.watchdog`).
        cluster: The nodes that the leases' devices are on; None: they are this machine's.
        rank_command: What starts a rank; `--job-dir J --attempt N` follows.
    """

    lease_s: float = 30.0
    grace_s: float = 30.0
    peer_grace_s: float = 3.0
    max_attempts: int = 3
    retry_delay_s: float = 5.0
    poll_s: float = 0.1
    watchdog_s: float = 1800.0
    cluster: Cluster | None = None
    rank_command: tuple[str, ...] = RANK_COMMAND

    def to_json(self) -> str:
        """The form in which they are passed to `python -m jobs.runner`."""
        return json.dumps(asdict(self))

    def retries(self) -> Retries:
        """The arguments of `Store.fail`."""
        return {"max_attempts": self.max_attempts, "retry_delay_s": self.retry_delay_s}

    @classmethod
    def from_json(cls, text: str) -> RunnerSettings:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        cluster = fields["cluster"] and Cluster.from_dict(fields["cluster"])
        return cls(**fields | {"rank_command": tuple(fields["rank_command"]), "cluster": cluster})
