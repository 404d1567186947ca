"""The ranks' environment, and their end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from jobs.gang import Launch, LocalGang, rank_environment
from jobs.layout import attempt_dir
from jobs.process import tagged


@pytest.fixture
def launch(tmp_path):
    attempt_dir(tmp_path, 1).mkdir(parents=True)
    return Launch("job_1", 1, ("cpu:0", "cpu:1"), 4321, tmp_path)


def test_a_rank_learns_its_place(launch):
    env = rank_environment({"PATH": "/bin"}, launch, 1)
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["MASTER_PORT"]) == ("1", "1", "2", "4321")
    assert (env["KBOP_DEVICE"], env["DS_ACCELERATOR"], env["CUDA_VISIBLE_DEVICES"]) == ("cpu", "cpu", "")
    assert env["KBOP_ATTEMPT_TAG"] == "job_1/1" and int(env["OMP_NUM_THREADS"]) >= 1


def test_ranks_are_counted_on_each_node_and_see_the_gpus_of_their_own():
    devices = ("a/cuda:0", "a/cuda:3", "b/cuda:1")
    launch = Launch("job_1", 1, devices, 4321, Path("/"), "10.0.0.1")
    places = [rank_environment({}, launch, rank) for rank in range(3)]
    assert [(env["RANK"], env["LOCAL_RANK"]) for env in places] == [("0", "0"), ("1", "1"), ("2", "0")]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in places] == ["0,3", "0,3", "1"]
    assert {(env["MASTER_ADDR"], env["WORLD_SIZE"]) for env in places} == {("10.0.0.1", "3")}
    assert (launch.nodes, launch.ranks_on("a"), launch.ranks_on("b")) == (["a", "b"], [0, 1], [2])


def test_ranks_of_one_machine_stay_on_its_loopback_and_those_of_nodes_do_not(launch):
    assert rank_environment({}, launch, 0)["GLOO_SOCKET_IFNAME"] == "lo"
    on_nodes = Launch("job_1", 1, ("a/cpu:0", "b/cpu:0"), 4321, Path("/"))
    assert "GLOO_SOCKET_IFNAME" not in rank_environment({}, on_nodes, 0)


def test_a_launch_survives_json(launch):
    assert Launch.from_dict(json.loads(json.dumps(launch.as_dict()))) == launch


def test_no_setting_or_credential_of_the_server_reaches_a_rank(launch):
    secrets = {
        "KBOP_DATABASE_URL": "x",
        "KBOP_API_KEY": "x",
        "KBOP_LEASE_TOKEN": "x",
        "KBOP_MODEL_ROOTS": "x",
    }
    assert not secrets.keys() & rank_environment(secrets, launch, 0).keys()


def test_ranks_on_gpus_see_exactly_their_gpus():
    launch = Launch("job_1", 1, ("cuda:2", "cuda:5"), 4321, Path("/"))
    env = rank_environment({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, launch, 0)
    assert (env["CUDA_VISIBLE_DEVICES"], env["KBOP_DEVICE"], env["DS_ACCELERATOR"]) == ("2,5", "cuda", "cuda")


def test_killing_takes_along_what_the_ranks_started_and_detached(launch, until):
    detached = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    gang = LocalGang(launch, (sys.executable, "-c", detached))
    gang.start()
    until(lambda: len(tagged("job_1/1")) == 4)
    started = tagged("job_1/1")
    gang.kill()
    assert gang.poll() == [-9, -9]
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started)


def test_when_a_rank_cannot_be_started_none_is_left(launch):
    with pytest.raises(FileNotFoundError):
        LocalGang(launch, ("/no/such/program",)).start()
    assert tagged("job_1/1") == []
