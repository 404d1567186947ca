"""Which devices there are."""

from __future__ import annotations

import pytest

from jobs.devices import check_feasible, discover_devices
from jobs.errors import NotEnoughDevices


def gpus(monkeypatch, count):
    monkeypatch.setattr("jobs.devices._gpu_count", lambda: count)


def test_without_gpus_there_are_cpu_slots(monkeypatch):
    gpus(monkeypatch, 0)
    assert discover_devices(2) == ["cpu:0", "cpu:1"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["cuda:0", "cuda:1", "cuda:2"]),
        ("2,0", ["cuda:2", "cuda:0"]),
        ("", ["cpu:0"]),
        ("-1", ["cpu:0"]),
        ("GPU-8a", ["cuda:GPU-8a"]),
    ],
)
def test_of_the_gpus_only_those_visible_to_this_process_are_used(monkeypatch, visible, expected):
    gpus(monkeypatch, 3)
    assert discover_devices(1, visible) == expected


def test_a_job_larger_than_the_server_is_refused(spec):
    check_feasible(spec(gpus=2), ["cpu:0", "cpu:1"])
    with pytest.raises(NotEnoughDevices, match="is 3, this server has 2 devices"):
        check_feasible(spec(gpus=3), ["cpu:0", "cpu:1"])
