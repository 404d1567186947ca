"""Learning rates of what stays real follow the size of each tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbop_core.full_precision import LEAST_VECTOR, parameter_groups


def _rates(**tensors: torch.Tensor) -> dict[str, float]:
    named = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    groups = parameter_groups(named.items(), 0.01, 0.02)
    return {name: g["lr"] for g in groups for p in g["params"] for name in named if named[name] is p}


def test_a_rate_is_a_share_of_the_tensors_size_to_the_nearest_power_of_two() -> None:
    found = _rates(weight_scale=torch.full((4, 2), -0.11), embedding=torch.full((8, 4), 0.023), norm=torch.ones(4))
    assert found == {"weight_scale": 0.01 * 0.125, "embedding": 0.02 / 32, "norm": 0.02}


@pytest.mark.parametrize("unit", [1e-3, 1.0, 64.0])
def test_a_model_in_another_unit_takes_the_same_relative_steps(unit: float) -> None:
    tensor = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    rate = _rates(a_scale=tensor * unit)["a_scale"]
    assert 0.01 / 2**0.5 <= rate / float((tensor * unit).square().mean().sqrt()) <= 0.01 * 2**0.5


def test_biases_and_scales_of_zero_still_learn() -> None:
    found = _rates(bias=torch.zeros(8), weight_scale=torch.zeros(8, 1), matrix=torch.zeros(3, 3))
    assert all(0 < rate <= 0.02 * 2 * LEAST_VECTOR for rate in found.values())


def test_tensors_of_like_size_share_a_group() -> None:
    named = {f"layer{i}.weight_scale": nn.Parameter(torch.full((4, 1), 0.1 + 0.001 * i)) for i in range(9)}
    (group,) = parameter_groups(named.items(), 0.01, 0.02)
    assert len(group["params"]) == 9


def test_a_tensor_that_is_not_finite_gets_a_finite_rate() -> None:
    assert _rates(matrix=torch.full((2, 2), float("inf")))["matrix"] == 0.02 * LEAST_VECTOR
