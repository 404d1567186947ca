"""docs/cluster.md names every code and setting there is, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path

from jobs.errors import BadHostfile, ClusterError
from jobs.nodes import Node, read_hostfile
from service.settings import SSH, ServerSettings

TEXT = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text(encoding="utf-8")


def test_the_example_is_a_host_list(tmp_path: Path) -> None:
    (example,) = re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "hosts").write_text(example)
    nodes = read_hostfile(tmp_path / "hosts")
    assert nodes[1] == Node("node2", 8, "cuda", "10.0.0.2", "ib0")


def test_every_error_of_a_node_is_in_the_table_of_what_happens() -> None:
    codes = {error.code for error in ClusterError.__subclasses__()} - {BadHostfile.code}
    assert codes <= set(re.findall(r"`(\w+)`", TEXT))


def test_every_setting_named_exists_and_those_of_nodes_are_named() -> None:
    named = {name.lower() for name in re.findall(r"KBOP_([A-Z_]+)", TEXT)}
    assert named <= ServerSettings.model_fields.keys()
    assert {"hosts", "node_command", "node_python", "watchdog_s"} <= named


def test_the_default_start_command_is_the_one_that_is_documented() -> None:
    assert f"`{SSH}`" in TEXT
