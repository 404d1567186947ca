"""Jobs on two nodes, which are both this machine: the agents, what they start, and how nothing is left of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import jobs
from jobs.nodes import Cluster, Node
from jobs.records import JobStatus
from jobs.runner_settings import RunnerSettings
from tests.integration.fake_ranks_server import FAKE_RANK, QUICK, FakeRanksServer, ranks, read

NODES = (Node("a", 1, "cpu", "127.0.0.1"), Node("b", 1, "cpu", "127.0.0.1"))
LOCAL = Cluster(NODES, "sh -c {command}", FAKE_RANK[0])
ON_NODES = replace(QUICK, cluster=LOCAL)
#: Seconds in which nothing may be left of a gang; its collectives would have minutes.
PROMPTLY = 8.0

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRanksServer]:
    monkeypatch.setenv("PYTHONPATH", str(Path(jobs.__file__).parents[1]))
    monkeypatch.setenv("KBOP_API_KEY", "secret")
    server = FakeRanksServer(tmp_path, ON_NODES, LOCAL.devices)
    yield server
    server.close()


def restart(server: FakeRanksServer, runner: RunnerSettings) -> None:
    server.scheduler.close()
    server.start(runner)


def rank(job_id: str, number: int) -> psutil.Process:
    return next(process for process in ranks(job_id) if process.environ()["RANK"] == str(number))


def agent(job_id: str, number: int) -> psutil.Process:
    """The agent of the node that a rank runs on."""
    return psutil.Process(rank(job_id, number).ppid())


def until_gone(processes: list[psutil.Process]) -> None:
    """Wait, promptly, without anybody who ticks: the agents and the kernel must do it."""
    _, alive = psutil.wait_procs(processes, timeout=PROMPTLY)
    assert alive == []


def processes_of(job_id: str) -> list[psutil.Process]:
    return [agent(job_id, 0), agent(job_id, 1), *ranks(job_id)]


def test_the_ranks_of_two_nodes_finish_a_job_and_know_their_places(server):
    job_id = server.submit("succeeds")
    job = server.until_ended(job_id)
    assert job.status is JobStatus.SUCCEEDED, job.error
    launch = read(server.folder(job_id) / "launch.json")
    assert launch["devices"] == ["a/cpu:0", "b/cpu:0"]
    for number in range(2):
        env = read(server.folder(job_id) / f"env{number}.json")
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(number), "0", "2")
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", str(launch["master_port"]))
        assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
        kept = {"KBOP_DEVICE", "KBOP_ATTEMPT_TAG", "KBOP_PARENT_PID"}
        assert {name for name in env if name.startswith("KBOP_")} == kept
    assert read(server.folder(job_id) / "exit.json")["exit_codes"] == [0, 0]


def test_nothing_secret_is_on_an_agents_command_line_and_nothing_is_left_of_it(server):
    job_id = server.submit("waits")
    server.until_ranks_wait(job_id)
    everything = processes_of(job_id)
    line = " ".join(agent(job_id, 1).cmdline())
    assert "jobs.node_agent --silence-s" in line
    assert server.store.leases()[0].token not in line and "sqlite" not in line and str(server.data_dir) not in line
    server.store.request_cancel(job_id)
    assert server.until_ended(job_id).status is JobStatus.CANCELLED
    assert read(server.folder(job_id) / "exit.json")["exit_codes"] == [75, 75]
    until_gone(everything)


def test_a_rank_that_is_killed_ends_the_ranks_of_both_nodes_and_the_job_is_retried(server):
    job_id = server.submit("waits-once")
    server.until_ranks_wait(job_id)
    everything = processes_of(job_id)
    rank(job_id, 1).kill()
    job = server.until_ended(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    assert server.store.attempts(job_id)[0].error["code"] == "rank_killed"
    assert read(server.folder(job_id) / "exit.json")["exit_codes"] == [75, -9]
    until_gone(everything)


@pytest.mark.parametrize("number", [0, 1])
def test_an_agent_that_is_killed_takes_its_ranks_along_and_the_other_node_is_cleared(server, number):
    job_id = server.submit("waits-once")
    server.until_ranks_wait(job_id)
    everything = processes_of(job_id)
    agent(job_id, number).kill()
    job = server.until_ended(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    error = server.store.attempts(job_id)[0].error
    assert (error["code"], error["origin"]) == ("node_lost", "system") and f"node '{'ab'[number]}'" in error["message"]
    until_gone(everything)


def test_when_the_runner_is_killed_the_agents_end_every_rank(server):
    job_id = server.submit("waits-once")
    folder = server.until_ranks_wait(job_id)
    everything = processes_of(job_id)
    os.kill(read(folder / "runner.json")["pid"], signal.SIGKILL)
    until_gone(everything)
    job = server.until_ended(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    assert server.store.attempts(job_id)[0].error["code"] == "runner_lost"


def test_a_node_that_falls_silent_is_given_up(server):
    restart(server, replace(ON_NODES, lease_s=3))
    job_id = server.submit("waits-once")
    server.until_ranks_wait(job_id)
    everything = processes_of(job_id)
    agent(job_id, 1).suspend()
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED
    error = server.store.attempts(job_id)[0].error
    assert error["code"] == "node_lost" and "nothing was heard of it for 3 s" in error["message"]
    until_gone(everything)


def test_a_runner_that_falls_silent_loses_its_ranks(server):
    """As when the network is cut: nothing closes a pipe, and nobody can tell the agents."""
    restart(server, replace(ON_NODES, lease_s=3))
    folder = server.until_ranks_wait(server.submit("waits"))
    runner = psutil.Process(read(folder / "runner.json")["pid"])
    job_id = server.store.leases()[0].job_id
    everything = processes_of(job_id)
    runner.suspend()
    until_gone(ranks(job_id))
    runner.kill()
    until_gone(everything)


def test_a_runner_that_is_told_to_stop_lets_both_nodes_save_and_the_job_goes_back(server):
    job_id = server.submit("waits-once")
    folder = server.until_ranks_wait(job_id)
    os.kill(read(folder / "runner.json")["pid"], signal.SIGTERM)
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED
    assert server.store.attempts(job_id)[0].error["code"] == "interrupted"
    assert read(folder / "exit.json")["exit_codes"] == [75, 75]


def test_a_port_that_was_taken_is_tried_again_with_another(server):
    job_id = server.submit("port-taken-once")
    assert server.until_ended(job_id).status is JobStatus.SUCCEEDED
    ports = {read(server.folder(job_id, n) / "launch.json")["master_port"] for n in (1, 2)}
    assert len(ports) == 2


@pytest.mark.parametrize(
    ("cluster", "code", "words"),
    [
        (replace(LOCAL, start_command="sh -c 'echo no route >&2; exit 255' {command}"), "node_unreachable", "no route"),
        (replace(LOCAL, start_command="/no/such/ssh {command}"), "node_unreachable", "could not be run"),
        (replace(LOCAL, python="/no/such/python"), "node_unreachable", "status 127"),
    ],
)
def test_a_node_that_cannot_be_used_is_named_with_the_reason(server, cluster, code, words):
    restart(server, replace(ON_NODES, max_attempts=1, cluster=cluster))
    job_id = server.submit("succeeds")
    job = server.until_ended(job_id)
    assert (job.status, job.error["code"]) == (JobStatus.FAILED, code)
    assert "node 'a'" in job.error["message"] and words in job.error["message"]
    assert ranks(job_id) == []


def test_ranks_that_cannot_be_started_on_a_node_are_an_error_of_that_node(server):
    restart(server, replace(ON_NODES, max_attempts=1, rank_command=("/no/such/program",)))
    job = server.until_ended(server.submit("succeeds"))
    assert (job.status, job.error["code"]) == (JobStatus.FAILED, "node_start_failed")
    assert "/no/such/program" in job.error["message"]


def test_two_jobs_share_the_nodes(server):
    ids = [server.submit("waits", gpus=1), server.submit("waits", gpus=1)]
    server.until(lambda: all((server.folder(job_id) / "waiting0").exists() for job_id in ids))
    assert sorted(device for lease in server.store.leases() for device in lease.devices) == list(LOCAL.devices)
    for job_id in ids:
        server.store.request_cancel(job_id)
    assert all(server.until_ended(job_id).status is JobStatus.CANCELLED for job_id in ids)
