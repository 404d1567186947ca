"""What a binary layer costs to store, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbop_core.baselines.binarymos import BinaryMoSLinear
from kbop_core.baselines.bits import stored_bits
from kbop_core.baselines.latent import LatentLinear
from kbop_core.baselines.onebit import OneBitLinear
from kbop_core.layers import BinaryLinear


@pytest.mark.parametrize("trainable", [True, False])
def test_kbops_layer_stores_a_sign_a_weight_and_a_scale_a_group(trainable: bool) -> None:
    assert stored_bits(BinaryLinear(12, 5, True, 4, trainable=trainable)) == 5 * 12 + 16 * 5 * 3


def test_latent_weights_cost_their_signs_only() -> None:
    assert stored_bits(LatentLinear(torch.randn(5, 12), 3, torch.randn(5))) == 5 * 12 + 16 * 5 * 3


@pytest.mark.parametrize("norm", [True, False])
def test_onebit_adds_one_scale_for_each_input_and_each_output(norm: bool) -> None:
    assert stored_bits(OneBitLinear(torch.randn(5, 12), torch.randn(5), norm)) == 5 * 12 + 16 * (5 + 12)


def test_binarymos_adds_that_for_every_expert_and_its_router(generator: torch.Generator) -> None:
    layer = BinaryMoSLinear(torch.randn(5, 12), torch.randn(5), 4, generator)
    assert layer.extra_bits == 16 * 4 * (5 + 12 + 12)
    assert stored_bits(layer) == 5 * 12 + layer.extra_bits


def test_a_layer_that_is_not_binary_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is no binary layer"):
        stored_bits(nn.Linear(3, 3))
