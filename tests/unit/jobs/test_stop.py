"""What SIGTERM does to a rank, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from jobs.stop import EXIT_STOPPED

SCRIPT = """
import os, signal, sys
from jobs.stop import Stop
stop = Stop()
stop.listen()
{body}
print("asked" if stop.asked else "not asked", flush=True)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True, timeout=30)


def test_outside_training_it_ends_the_rank_at_once() -> None:
    done = run("os.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stdout) == (EXIT_STOPPED, "")


def test_while_it_is_deferred_it_is_only_remembered() -> None:
    done = run("with stop.deferred():\n    os.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stdout) == (0, "asked\n")


def test_after_a_deferred_block_it_ends_the_rank_again() -> None:
    done = run("with stop.deferred():\n    pass\nos.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stdout) == (EXIT_STOPPED, "")
