"""The agent of a runner on one node: starts the node's ranks, says how they end, and ends them with its runner.

Refuses to outlive the runner: when its standard input is closed (the runner or the connection is gone), or nothing is
heard for `--silence-s` seconds, every rank is killed. When the agent is killed itself, its ranks die with it
(`jobs.process.die_with_parent`).

It is started by `jobs.node_gang` through ssh or the like; messages as in `jobs.node_protocol`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from typing import Any

import psutil

from jobs.errors import FolderNotShared, NodeStartFailed
from jobs.gang import Launch, LocalGang
from jobs.layout import attempt_dir, attempt_tag
from jobs.node_protocol import BEAT_S, Message, MessageReader, send
from jobs.nodes import Node
from jobs.process import become_subreaper, free_port, sweep

#: Seconds between two looks at the ranks.
POLL_S = 0.05

_log = logging.getLogger("jobs.node_agent")


class Agent:
    """One runner's hand on this node.

    Args:
        orders: Where messages come from.
        answers: File descriptor they are answered on.
        silence_s: Seconds without a message after which the runner counts as dead.
    """

    def __init__(self, orders: MessageReader, answers: int, silence_s: float) -> None:
        self._orders = orders
        self._answers = answers
        self._silence_s = silence_s
        self._heard = time.monotonic()
        self._told_at = 0.0
        self._told: list[int | None] = []
        self._broken = False
        self._gang: LocalGang | None = None

    def run(self) -> None:
        """Serve until the runner is gone; returns when no rank is left."""
        self._say("ready", port=free_port(""))
        try:
            while self._runner_lives():
                for message in self._orders.read(POLL_S):
                    self._heard = time.monotonic()
                    self._obey(message)
                self._report()
        finally:
            if self._gang is not None:
                self._gang.kill()

    def _runner_lives(self) -> bool:
        silent = time.monotonic() - self._heard
        if silent > self._silence_s:
            _log.error("nothing heard of the runner for %.0f s", silent)
        return not self._orders.closed and not self._broken and silent <= self._silence_s

    def _obey(self, message: Message) -> None:
        if message["say"] == "start":
            self._start(message)
        elif message["say"] == "terminate" and self._gang is not None:
            self._gang.terminate()
        elif message["say"] == "kill" and self._gang is not None:
            self._gang.kill()

    def _start(self, order: Message) -> None:
        launch, node = Launch.from_dict(order["launch"]), Node(**order["node"])
        folder = attempt_dir(launch.job_dir, launch.attempt)
        if not folder.is_dir():
            self._say("refused", code=FolderNotShared.code, reason=str(folder))
            return
        # An earlier attempt's ranks are left only where its agent was killed, or was cut off and has not noticed yet.
        for earlier in range(1, launch.attempt):
            sweep(attempt_tag(launch.job_id, earlier))
        gang = LocalGang(launch, order["command"], node.name, rank_base(node, order["environment"]))
        try:
            gang.start()
        except OSError as error:
            self._say("refused", code=NodeStartFailed.code, reason=str(error))
            return
        self._gang = gang
        self._say("started")

    def _report(self) -> None:
        """Tell exit codes when one is new, and once a beat."""
        codes = [] if self._gang is None else self._gang.poll()
        if codes != self._told or time.monotonic() - self._told_at > BEAT_S:
            self._told, self._told_at = codes, time.monotonic()
            self._say("ranks", codes=codes)

    def _say(self, say: str, **content: Any) -> None:
        self._broken = not send(self._answers, say, **content) or self._broken


def rank_base(node: Node, forwarded: dict[str, str]) -> dict[str, str]:
    """The environment ranks begin with: this process's, the runner's share, and the interface of their traffic.

    The host list's interface wins over a variable that is there already, the one found by the address does not.
    """
    found = network_variables(node.interface or interface_of(node.address))
    named = network_variables(node.interface)
    return found | dict(os.environ) | forwarded | named


def network_variables(interface: str) -> dict[str, str]:
    """What binds gloo and NCCL to a network interface (NCCL's `=`: that name, not all that begin so)."""
    if not interface:
        return {}
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def interface_of(address: str) -> str:
    """Name of this machine's interface with that name or IP address; empty when there is none (as behind NAT)."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(address, None)}
    except OSError:
        return ""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] in addresses for entry in entries):
            return str(name)
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Entry of `python -m jobs.node_agent`."""
    parser = argparse.ArgumentParser(prog="python -m jobs.node_agent", description="Run a job's ranks on this node.")
    parser.add_argument("--silence-s", type=float, required=True, help="seconds after which a silent runner is dead")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    become_subreaper()
    # Whoever stops this machine tells the ranks too; the agent stays to say how they ended. (Ranks inherit SIG_IGN.)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    Agent(MessageReader(sys.stdin.fileno()), sys.stdout.fileno(), options.silence_s).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
