"""Two nodes with networks of their own: namespaces joined by one cable, over which ranks add up a tensor with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import jobs
from jobs.gang import Launch
from jobs.layout import attempt_dir
from jobs.node_gang import NodeGang
from jobs.nodes import Cluster, Node

#: A rank: adds its number plus one to those of the others, and leaves the sum.
RANK = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
Path(sys.argv[2], f"sum{dist.get_rank()}").write_text(f"{int(total)} over {os.environ['GLOO_SOCKET_IFNAME']}")
dist.destroy_process_group()
"""

pytestmark = pytest.mark.timeout(120)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, ...]]:
    """Two namespaces, one rank each; skipped where this user may not make them."""
    names = [f"kbop{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.99.0.{number + 1}/24", "dev", f"cable{number}")
            for link in ("lo", f"cable{number}"):  # lo: rank 0 calls itself
                ip("-n", name, "link", "set", link, "up")
        yield tuple(Node(name, 1, "cpu", f"10.99.0.{number + 1}") for number, name in enumerate(names))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def test_ranks_in_two_network_namespaces_find_each_other(nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(jobs.__file__).parents[1]))
    attempt_dir(tmp_path, 1).mkdir(parents=True)
    devices = tuple(device for node in nodes for device in node.devices)
    cluster = Cluster(nodes, "ip netns exec {host} sh -c {command}", sys.executable)
    gang = NodeGang(Launch("job_namespaces", 1, devices, 0, tmp_path), cluster, (sys.executable, "-c", RANK))
    try:
        gang.start()
        while None in (codes := gang.poll()):
            time.sleep(0.05)
    finally:
        gang.kill()
    logs = "".join(log.read_text() for log in attempt_dir(tmp_path, 1).glob("*.log"))
    assert codes == [0, 0], logs
    assert [(tmp_path / f"sum{rank}").read_text() for rank in range(2)] == ["3 over cable0", "3 over cable1"]
