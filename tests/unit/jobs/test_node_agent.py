"""The agent of a node as a process, with orders by hand; and the gang's view of agents that refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict

import psutil
import pytest

from jobs.errors import FolderNotShared, NodeUnreachable
from jobs.gang import Launch
from jobs.layout import attempt_dir
from jobs.node_agent import interface_of, rank_base
from jobs.node_gang import NodeGang, forwarded
from jobs.node_protocol import MessageReader, send
from jobs.nodes import Cluster, Node
from jobs.process import TAG_VARIABLE, tagged

NODE = Node("a", 1, "cpu", "127.0.0.1")
DETACHES = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"


class HandledAgent:
    """An agent and what it said."""

    def __init__(self):
        command = [sys.executable, "-m", "jobs.node_agent", "--silence-s", "60"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.reader, self.heard = MessageReader(self.process.stdout.fileno()), []

    def start(self, launch):
        order = {"launch": launch.as_dict(), "command": [sys.executable, "-c", DETACHES], "environment": {}}
        send(self.process.stdin.fileno(), "start", node=asdict(NODE), **order)

    def said(self, what):
        self.heard += self.reader.read()
        return [message for message in self.heard if message["say"] == what]


@pytest.fixture
def agent(project_on_path):
    agent = HandledAgent()
    yield agent
    agent.process.stdin.close()
    agent.process.wait()
    agent.process.stdout.close()


def launch_in(tmp_path, attempt):
    attempt_dir(tmp_path, attempt).mkdir(parents=True)
    return Launch("job_agent", attempt, ("a/cpu:0",), 4321, tmp_path)


def test_an_agent_whose_runner_hangs_up_leaves_nothing_not_even_what_ranks_detached(agent, tmp_path, until):
    agent.start(launch_in(tmp_path, 1))
    until(lambda: agent.said("started") and len(tagged("job_agent/1")) == 2)
    started = tagged("job_agent/1")
    agent.process.stdin.close()
    assert agent.process.wait(10) == 0
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started)


def test_an_agent_ends_what_earlier_attempts_left_on_its_node(agent, tmp_path, until):
    stray = subprocess.Popen(["sleep", "60"], env=os.environ | {TAG_VARIABLE: "job_agent/1"})
    agent.start(launch_in(tmp_path, 2))
    until(lambda: agent.said("started"))
    assert stray.wait(5) == -9


def test_an_agent_that_does_not_see_the_jobs_folder_refuses_and_names_it(agent, tmp_path, until):
    agent.start(Launch("job_agent", 1, ("a/cpu:0",), 4321, tmp_path / "elsewhere"))
    until(lambda: agent.said("refused"))
    (refusal,) = agent.said("refused")
    assert refusal["code"] == "folder_not_shared" and refusal["reason"] == str(tmp_path / "elsewhere/attempts/1")


ANSWERS = """#!/bin/sh
echo 'Welcome to this node!'
echo '{"say": "ready", "port": 1}'
echo '{"say": "refused", "code": "folder_not_shared", "reason": "/data/jobs/x"}'
cat
"""


def test_a_node_without_the_folder_is_an_error_with_its_name_and_the_setting(tmp_path):
    (tmp_path / "start.sh").write_text(ANSWERS)
    cluster = Cluster((NODE,), f"sh {tmp_path / 'start.sh'} {{command}}", sys.executable)
    with pytest.raises(FolderNotShared, match="node 'a' has no folder /data/jobs/x") as caught:
        NodeGang(launch_in(tmp_path, 1), cluster).start()
    assert "KBOP_DATA_DIR" in caught.value.hint


def test_a_node_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.node_gang.START_S", 0.3)
    cluster = Cluster((NODE,), "sh -c 'exec cat' {command}", sys.executable)
    with pytest.raises(NodeUnreachable, match="did not answer"):
        NodeGang(launch_in(tmp_path, 1), cluster).start()


def test_an_address_is_found_on_its_interface():
    assert (
        interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.77") == interface_of("no.such.host.invalid") == ""
    )


def test_an_interface_of_the_host_list_wins_over_the_environment_and_a_found_one_does_not(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert rank_base(NODE, {})["GLOO_SOCKET_IFNAME"] == "eth7"
    assert rank_base(NODE, {"GLOO_SOCKET_IFNAME": "eth8"})["GLOO_SOCKET_IFNAME"] == "eth8"
    named = rank_base(Node("a", 1, "cpu", "127.0.0.1", "ib0"), {"GLOO_SOCKET_IFNAME": "eth8"})
    assert (named["GLOO_SOCKET_IFNAME"], named["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")


def test_only_what_ranks_need_is_forwarded():
    environment = {"HF_HOME": "/hub", "NCCL_DEBUG": "INFO", "KBOP_API_KEY": "x", "AWS_SECRET": "x", "PATH": "/bin"}
    assert forwarded(environment) == {"HF_HOME": "/hub", "NCCL_DEBUG": "INFO"}
