"""The ranks of an attempt on several nodes, through one agent on each (`jobs.node_agent`).

Refuses to know how a node is reached: the cluster's start command is. A node that cannot start its ranks, or is gone,
is a `ClusterError`; nothing is left running on the others then.

Every agent says that it is ready before any rank is started anywhere, and that of rank 0's node names a port that is
free there.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.errors import ClusterError, FolderNotShared, NodeLost, NodeStartFailed, NodeUnreachable
from jobs.failures import log_tail
from jobs.gang import RANK_COMMAND, Launch
from jobs.json_files import write_json
from jobs.layout import attempt_dir, node_log
from jobs.node_protocol import BEAT_S, Message, MessageReader, send
from jobs.nodes import Cluster, Node

#: Seconds an agent has to come up, and then to start its ranks.
START_S = 60.0
#: Seconds agents have to kill their ranks and say so, and then to end.
KILL_S = 10.0
POLL_S = 0.02
#: Of the runner's environment, what ranks on other nodes get too. (HF_TOKEN opens gated models.)
FORWARDED = ("HF_", "NCCL_", "GLOO_", "TORCH_")


class NodeGang:
    """The ranks of `launch`, whose devices are the cluster's; the same calls as `jobs.gang.LocalGang`.

    Args:
        launch: What the ranks are told, but for rank 0's address and port, which are found out at the start.
        cluster: How its nodes are reached.
        command: What starts a rank.
        silence_s: Seconds without a sign of life after which runner and agent give each other up.
    """

    def __init__(
        self, launch: Launch, cluster: Cluster, command: Sequence[str] = RANK_COMMAND, silence_s: float = 30.0
    ) -> None:
        self._launch = launch
        self._cluster = cluster
        # This machine's interpreter may be elsewhere there.
        self._command = [cluster.python if word == sys.executable else word for word in command]
        self._silence_s = silence_s
        self._agents: list[_Agent] = []

    def start(self) -> None:
        """Start every rank and write `launch.json`; when one cannot be started, none is left. Raises ClusterError."""
        try:
            for name in self._launch.nodes:
                self._agents.append(self._connect(self._cluster.node(name)))
            self._wait(lambda agent: agent.port is not None)
            first = self._agents[0]
            self._launch = replace(self._launch, master_address=first.node.address, master_port=first.port or 0)
            folder = attempt_dir(self._launch.job_dir, self._launch.attempt)
            write_json(folder / "launch.json", self._launch.as_dict())
            order = {"launch": self._launch.as_dict(), "command": self._command, "environment": forwarded(os.environ)}
            for agent in self._agents:
                agent.say("start", node=asdict(agent.node), **order)
            self._wait(lambda agent: agent.started)
        except BaseException:
            self.kill()
            raise

    def _connect(self, node: Node) -> _Agent:
        agent = [self._cluster.python, "-m", "jobs.node_agent", "--silence-s", str(self._silence_s)]
        command = self._cluster.command_on(node, agent)
        folder = attempt_dir(self._launch.job_dir, self._launch.attempt)
        return _Agent(node, self._launch.ranks_on(node.name), command, node_log(folder, node.name), self._silence_s)

    def _wait(self, reached: Callable[[_Agent], bool]) -> None:
        deadline = time.monotonic() + START_S
        while late := [agent for agent in self._agents if not reached(agent)]:
            for agent in self._agents:
                agent.listen()
            if time.monotonic() > deadline:
                raise late[0].unreachable(f"did not answer within {START_S:.0f} s")
            time.sleep(POLL_S)

    def poll(self) -> list[int | None]:
        """Exit code by rank: None while it runs, negative for a signal. Raises NodeLost."""
        codes: list[int | None] = [None] * self._launch.world_size
        for agent in self._agents:
            agent.listen()
            for rank, code in zip(agent.ranks, agent.codes, strict=True):
                codes[rank] = code
        return codes

    def terminate(self) -> None:
        """Ask the ranks that still run to stop (SIGTERM)."""
        for agent in self._agents:
            agent.say("terminate")

    def kill(self) -> None:
        """End the ranks and everything they started, and wait until all are gone or their node does not answer."""
        for agent in self._agents:
            agent.say("kill")
        deadline = time.monotonic() + KILL_S
        while (running := [agent for agent in self._agents if agent.runs]) and time.monotonic() < deadline:
            for agent in running:
                with suppress(ClusterError):
                    agent.listen()
            time.sleep(POLL_S)
        for agent in self._agents:
            agent.hang_up()
        for agent in self._agents:
            agent.reap()


class _Agent:
    """The connection to one node's agent, which is started with it. Raises NodeUnreachable when that is impossible.

    Attributes:
        node: Where it is.
        ranks: Global numbers of its ranks.
        codes: Their exit codes as far as they are known.
        port: One that is free there; None until the agent is ready.
        started: Its ranks were started.
    """

    def __init__(self, node: Node, ranks: list[int], command: list[str], log: Path, silence_s: float) -> None:
        self.node, self.ranks = node, ranks
        self.codes: list[int | None] = [None] * len(ranks)
        self.port: int | None = None
        self.started = False
        self._lost = False
        self._command, self._log, self._silence_s = command, log, silence_s
        self._process = self._spawn()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._reader = self._process.stdin, MessageReader(self._process.stdout.fileno())
        self._heard = self._beat_at = time.monotonic()

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            with self._log.open("ab") as log:
                # Its own process group: a terminal's Ctrl-C is for the runner to handle.
                return subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0, process_group=0
                )
        except OSError as error:
            raise self.unreachable(f"could not be run: {error}") from error

    @property
    def runs(self) -> bool:
        """Whether its ranks were started, are not known to have ended, and may still be heard of."""
        return self.started and None in self.codes and not self._lost and not self._stdin.closed

    def say(self, say: str, **content: Any) -> None:
        """Send a message; that the connection is closed is for `listen` to find out."""
        if not self._stdin.closed:
            send(self._stdin.fileno(), say, **content)

    def listen(self) -> None:
        """Take in what the agent said, and show it that we live. Raises ClusterError."""
        if None not in self.codes:
            return
        if self._stdin.closed:
            raise NodeLost(self.node.name, "it did not say how its ranks ended")
        for message in self._reader.read():
            self._heard = time.monotonic()
            self._take(message)
        silent = time.monotonic() - self._heard
        self._lost = None in self.codes and (self._reader.closed or silent > self._silence_s)
        if self._lost and self._reader.closed:
            raise self._gone()
        if self._lost:
            raise NodeLost(self.node.name, f"nothing was heard of it for {silent:.0f} s")
        if time.monotonic() - self._beat_at > BEAT_S:
            self._beat_at = time.monotonic()
            self.say("beat")

    def _take(self, message: Message) -> None:
        if message["say"] == "ready":
            self.port = int(message["port"])
        elif message["say"] == "started":
            self.started = True
        elif message["say"] == "ranks" and len(message["codes"]) == len(self.ranks):
            self.codes = message["codes"]
        elif message["say"] == "refused" and message["code"] == FolderNotShared.code:
            raise FolderNotShared(self.node.name, message["reason"])
        elif message["say"] == "refused":
            raise NodeStartFailed(self.node.name, message["reason"])

    def _gone(self) -> ClusterError:
        """The pipe is closed, so the agent, or what connects to it, has ended or is about to."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        words = f"ended with status {self._process.poll()}: {log_tail(self._log, 1) or 'it said nothing'}"
        return self.unreachable(words) if self.port is None else NodeLost(self.node.name, f"its agent {words}")

    def unreachable(self, reason: str) -> NodeUnreachable:
        """The agent did not come up."""
        return NodeUnreachable(self.node.name, shlex.join(self._command), reason)

    def hang_up(self) -> None:
        """Close the agent's standard input, at which it kills what it has left and ends."""
        self._stdin.close()

    def reap(self) -> None:
        """Wait for the end of the start command; one that hangs, as ssh to a dead node does, is killed."""
        try:
            self._process.wait(0.0 if self._lost else KILL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other nodes get of an environment; never a KBOP_ setting."""
    return {name: value for name, value in environment.items() if name.startswith(FORWARDED)}
