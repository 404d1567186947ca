"""What a runner and its agent on a node say to each other: JSON objects, one a line, over the agent's pipes.

Refuses to act on any of it.

    runner → agent (stdin)    start      launch, node, command, environment: start the node's ranks
                              terminate  SIGTERM to the ranks
                              kill       SIGKILL to the ranks and all they started
                              beat       the runner lives
    agent → runner (stdout)   ready      port: one that is free there
                              started    the ranks run
                              refused    code, reason: they do not
                              ranks      codes: exit code by rank of the node, null while it runs; also the agent's beat

Whichever side hears nothing for `silence_s`, or finds the pipe closed, takes the other for dead. All of it is on pipes,
so nothing shows in a process list, and ssh, `kubectl exec` or `ip netns exec` carry it alike.
"""

from __future__ import annotations

import json
import os
import select
from typing import Any

Message = dict[str, Any]

#: Seconds between two beats.
BEAT_S = 1.0


class MessageReader:
    """Messages from a pipe. Lines that are none are passed over: a login shell may greet before the agent does.

    Attributes:
        closed: The other side will say nothing more.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self.closed = False

    def read(self, timeout_s: float = 0.0) -> list[Message]:
        """Complete messages that are there within the time; none when the pipe is closed."""
        if self.closed or not select.select([self._fd], [], [], timeout_s)[0]:
            return []
        data = os.read(self._fd, 1 << 16)
        self.closed = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [message for line in lines if (message := _parse(line)) is not None]


def _parse(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and isinstance(message.get("say"), str) else None


def send(fd: int, say: str, **content: Any) -> bool:
    """Write one message; False when nobody reads the pipe any more."""
    data = json.dumps({"say": say, **content}).encode() + b"\n"
    try:
        while data:
            data = data[os.write(fd, data) :]
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True
