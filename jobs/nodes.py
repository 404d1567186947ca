"""The machines jobs may run on: the host list, the names of their devices, how a command is started on one.

Refuses to reach any of them: that is `jobs.node_gang`'s.

A host list is a DeepSpeed hostfile: a node a line, `#` starts a comment. What follows `slots=` is ours; DeepSpeed
reads over it:

    node1 slots=8
    node2 slots=8 address=10.0.0.2 interface=ib0
    node3 slots=4 device=cpu

A device of a node is called `node1/cuda:0`; on a server without a host list, `cuda:0`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import BadHostfile, ClusterError

#: As a host is named to ssh and as a file may be called: no option, no path, no shell syntax.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
_OPTIONS = ("slots", "address", "interface", "device")
_MOST_SLOTS = 1024


@dataclass(frozen=True)
class Node:
    """One machine of the host list.

    Attributes:
        name: How the start command reaches it; unique.
        slots: Ranks at once, ≥ 1: its GPUs, or what its cores carry.
        kind: `cuda` or `cpu`.
        address: Where the ranks of other nodes reach it: a name or an IP address.
        interface: Network interface of the ranks' traffic; empty: the one that has `address`.
    """

    name: str
    slots: int
    kind: str = "cuda"
    address: str = ""
    interface: str = ""

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of its devices."""
        return tuple(f"{self.name}/{self.kind}:{slot}" for slot in range(self.slots))


@dataclass(frozen=True)
class Cluster:
    """The nodes, and how a process is started on one.

    Attributes:
        nodes: In the order in which they are filled.
        start_command: Template as in a shell; `{host}` is the node's name, `{command}` one argument that a shell there
            understands.
        python: The interpreter on every node in which kbop is installed.
    """

    nodes: tuple[Node, ...]
    start_command: str
    python: str

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of every node's devices."""
        return tuple(device for node in self.nodes for device in node.devices)

    def node(self, name: str) -> Node:
        """The node of that name. Raises ClusterError."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(f"node {name!r} is not in the host list", "the next attempt is given nodes that are")

    def command_on(self, node: Node, command: Sequence[str]) -> list[str]:
        """What runs `command` on `node` when it is run here."""
        filled = {"{host}": node.name, "{command}": shlex.join(command)}
        return [_filled(word, filled) for word in shlex.split(self.start_command)]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Cluster:
        """The inverse of `dataclasses.asdict`."""
        return cls(**data | {"nodes": tuple(Node(**node) for node in data["nodes"])})


def _filled(word: str, values: dict[str, str]) -> str:
    return re.sub(r"\{host\}|\{command\}", lambda found: values[found[0]], word)


class Device(NamedTuple):
    """A device's name in parts; `node` is empty without a host list, `slot` is what CUDA_VISIBLE_DEVICES takes."""

    node: str
    kind: str
    slot: str


def parse_device(name: str) -> Device:
    """`node1/cuda:0` or `cuda:0` in parts."""
    place, _, slot = name.partition(":")
    node, _, kind = place.rpartition("/")
    return Device(node, kind, slot)


def read_hostfile(path: Path) -> tuple[Node, ...]:
    """The nodes of a host list, at least one.

    Raises:
        BadHostfile: It cannot be read, has a line that is no node, names one twice, or mixes GPUs and CPUs.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadHostfile(path, f"cannot be read: {error}") from error
    nodes: list[Node] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            nodes.append(_node(words))
        except ValueError as error:
            raise BadHostfile(path, f"line {number}, {line.strip()!r}: {error}") from None
        if nodes[-1].name in {node.name for node in nodes[:-1]}:
            raise BadHostfile(path, f"line {number} names {nodes[-1].name!r} again")
    if not nodes:
        raise BadHostfile(path, "names no node")
    if len({node.kind for node in nodes}) > 1:
        raise BadHostfile(path, "has nodes with device=cpu and nodes with GPUs: ranks of one job must be alike")
    return tuple(nodes)


def _node(words: list[str]) -> Node:
    """A line's words as a node; ValueError says what is wrong."""
    name, options = words[0], dict(word.partition("=")[::2] for word in words[1:])
    if not _NAME.fullmatch(name):
        raise ValueError("a host name begins with a letter, digit or _ and has no characters but those and . @ -")
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ValueError(f"unknown option {unknown[0]!r}; legal: {', '.join(_OPTIONS)}")
    slots = options.get("slots", "")
    if not (slots.isascii() and slots.isdecimal() and 1 <= int(slots) <= _MOST_SLOTS):
        raise ValueError(f"slots is {slots!r}; legal: 1 … {_MOST_SLOTS}")
    kind = options.get("device", "cuda")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"device is {kind!r}; legal: cuda, cpu")
    return Node(name, int(slots), kind, options.get("address") or name.rpartition("@")[2], options.get("interface", ""))


def choose_devices(free: Sequence[str], needed: int) -> list[str]:
    """`needed` of the free devices on as few nodes as possible, node by node; needs `needed` ≤ number of them.

    One node is enough: the one with the fewest free that suffice, so that large gaps stay. Otherwise the nodes with
    the most free. The first in the list wins among equals.
    """
    by_node: dict[str, list[str]] = {}
    for device in free:
        by_node.setdefault(parse_device(device).node, []).append(device)
    enough = [devices for devices in by_node.values() if len(devices) >= needed]
    if enough:
        return min(enough, key=len)[:needed]
    chosen: list[str] = []
    for devices in sorted(by_node.values(), key=len, reverse=True):
        chosen += devices[: needed - len(chosen)]
    return chosen
