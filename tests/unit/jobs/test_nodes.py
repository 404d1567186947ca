"""The host list, devices of nodes, and where a job of several ranks goes."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from jobs.errors import BadHostfile, ClusterError
from jobs.nodes import Cluster, Device, Node, choose_devices, parse_device, read_hostfile


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        path = tmp_path / "hosts"
        path.write_text(text)
        return path

    return write


def test_a_deepspeed_hostfile_is_a_host_list(hostfile):
    nodes = read_hostfile(hostfile("# two of them\nworker-1 slots=4\n\nworker-2   slots=2 # the smaller one\n"))
    assert nodes == (Node("worker-1", 4, "cuda", "worker-1"), Node("worker-2", 2, "cuda", "worker-2"))
    assert nodes[1].devices == ("worker-2/cuda:0", "worker-2/cuda:1")


def test_a_node_may_have_an_address_an_interface_and_no_gpu(hostfile):
    (node,) = read_hostfile(hostfile("me@a slots=1 address=10.0.0.2 interface=ib0 device=cpu"))
    assert node == Node("me@a", 1, "cpu", "10.0.0.2", "ib0") and node.devices == ("me@a/cpu:0",)


def test_the_address_of_a_login_is_its_host(hostfile):
    assert read_hostfile(hostfile("me@a slots=1"))[0].address == "a"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no node"),
        ("a", "slots is ''; legal: 1 … 1024"),
        ("a slots=0", "slots is '0'"),
        ("a slots=x", "slots is 'x'"),
        ("a slots=1025", "slots is '1025'"),
        ("a slots=1\na slots=1", "line 2 names 'a' again"),
        ("a slots=1 gpus=2", "unknown option 'gpus'; legal: slots, address, interface, device"),
        ("a slots=1 device=tpu", "device is 'tpu'; legal: cuda, cpu"),
        ("-oProxyCommand=x slots=1", "a host name begins with"),
        ("../a slots=1", "a host name begins with"),
        ("a slots=1\nb slots=1 device=cpu", "must be alike"),
    ],
)
def test_what_is_no_host_list_is_refused_with_its_line(hostfile, text, reason):
    with pytest.raises(BadHostfile) as caught:
        read_hostfile(hostfile(text))
    assert reason in caught.value.message and "name slots=N" in caught.value.hint


def test_a_host_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadHostfile, match="cannot be read"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cuda:0", Device("", "cuda", "0")),
        ("cpu:11", Device("", "cpu", "11")),
        ("cuda:GPU-8a/b", Device("", "cuda", "GPU-8a/b")),
        ("n1/cuda:3", Device("n1", "cuda", "3")),
    ],
)
def test_a_devices_name_has_parts(name, parts):
    assert parse_device(name) == parts


A, B, C = (Node(name, slots).devices for name, slots in (("a", 2), ("b", 4), ("c", 3)))


@pytest.mark.parametrize(
    ("free", "needed", "chosen"),
    [
        (("cpu:0", "cpu:1", "cpu:2"), 2, ["cpu:0", "cpu:1"]),
        (A + B + C, 1, [A[0]]),
        (A + B + C, 3, list(C)),
        (A + B + C, 4, list(B)),
        (A + B + C, 6, [*B, *C[:2]]),
        (A + B + C, 9, [*B, *C, *A]),
        (A[1:] + B[3:], 2, [A[1], B[3]]),
    ],
)
def test_a_job_goes_to_as_few_nodes_as_possible_and_leaves_large_gaps(free, needed, chosen):
    assert choose_devices(free, needed) == chosen


CLUSTER = Cluster((Node("a", 1), Node("b", 1)), "ssh -o X=y {host} {command}", "/opt/my python")


def test_a_command_for_a_node_is_one_argument_quoted_for_the_shell_there():
    assert CLUSTER.command_on(CLUSTER.nodes[1], ["/opt/my python", "-m", "x"]) == [
        *("ssh", "-o", "X=y", "b"),
        "'/opt/my python' -m x",
    ]


def test_a_cluster_survives_json():
    assert Cluster.from_dict(json.loads(json.dumps(asdict(CLUSTER)))) == CLUSTER


def test_a_node_that_is_not_in_the_list_any_more_is_named():
    with pytest.raises(ClusterError, match="'c' is not in the host list"):
        CLUSTER.node("c")
