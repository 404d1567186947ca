"""Operations of a training step, and what a GPU could do: MFU is no better than these two numbers."""

from __future__ import annotations

import pytest

from kbop_core.flops import PEAK_BF16, ModelSize, flops_per_token, peak_flops

#: Parameters 1000, two layers of width 8, windows of 10 tokens.
SIZE, CONTEXT = ModelSize(parameters=1000, layers=2, width=8), 10


def test_a_student_needs_six_operations_a_parameter_and_twelve_by_length_and_width_in_attention() -> None:
    assert flops_per_token(SIZE, CONTEXT, live_teacher=False) == 6 * 1000 + 12 * 2 * 10 * 8 == 7920


def test_a_live_teacher_adds_its_forward_pass() -> None:
    teacher = 2 * 1000 + 4 * 2 * 10 * 8
    assert flops_per_token(SIZE, CONTEXT, live_teacher=True) == 7920 + teacher == 10_560


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_gpu_is_found_by_the_name_its_driver_gives(device: str, name: str) -> None:
    assert peak_flops(device) == PEAK_BF16[name]


@pytest.mark.parametrize(
    "device",
    [
        "Tesla T4",
        "NVIDIA L40",
        "NVIDIA RTX A1000",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "",
    ],
)
def test_a_gpu_whose_name_only_resembles_one_of_the_table_has_no_peak(device: str) -> None:
    assert peak_flops(device) is None
