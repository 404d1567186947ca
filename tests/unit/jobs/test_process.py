"""Identity of processes, and dying with one's parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from jobs.process import ProcessIdentity, die_with_parent, free_port


def test_this_process_is_found_by_id_and_start_time():
    me = ProcessIdentity.current()
    assert me.process() is not None
    assert replace(me, start_time=me.start_time - 100).process() is None


def test_a_process_that_ended_is_gone_even_before_it_is_reaped(until):
    child = subprocess.Popen(["sleep", "60"])
    identity = ProcessIdentity(child.pid, psutil.Process(child.pid).create_time())
    assert identity.process() is not None
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: identity.process() is None)
    child.wait()


@pytest.mark.parametrize("data", [None, {}, {"pid": "1", "start_time": 1.0}, {"pid": 1}])
def test_a_file_without_an_identity_gives_none(data):
    assert ProcessIdentity.from_json(data) is None


CHILD = """
import os, time
from jobs.process import die_with_parent
die_with_parent(os.getppid())
print("up", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_dies_with_its_parent(project_on_path, until):
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        first, second = parent.stdout.readline(), parent.stdout.readline()
        pid = int(first if second == "up\n" else second)
        child = ProcessIdentity(pid, psutil.Process(pid).create_time())
        parent.kill()
    until(lambda: child.process() is None)


def test_a_child_whose_parent_is_gone_already_ends_at_once(project_on_path):
    code = "from jobs.process import die_with_parent; die_with_parent(1 << 30); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_rank_started_by_hand_is_left_alone():
    die_with_parent(None)


def test_a_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
