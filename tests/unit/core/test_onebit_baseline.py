"""The OneBit baseline: its rank-one start, its straight-through sign, its optional norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbop_core.baselines.onebit import OneBitLinear, convert_onebit, rank_one
from kbop_core.convert import linear_weight, plan_conversion


def dense(layer: OneBitLinear) -> Tensor:
    """What the layer multiplies by, read off from unit vectors, (O, I)."""
    return layer(torch.eye(layer.latent.shape[1])).detach().t()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (5, 129)])
def test_a_weight_whose_magnitude_has_rank_one_is_reproduced_exactly(shape: tuple[int, int]) -> None:
    signs = torch.where(torch.randn(shape) >= 0, 1.0, -1.0)
    weight = signs * torch.rand(shape[0], 1).add(0.1) * torch.rand(shape[1]).add(0.1)
    torch.testing.assert_close(dense(OneBitLinear(weight, None)), weight)


@pytest.mark.parametrize("shape", [(8, 8), (3, 40), (40, 3)])
def test_the_start_is_the_best_rank_one_fit_of_the_magnitude(shape: tuple[int, int]) -> None:
    magnitude = torch.randn(shape, dtype=torch.float64).abs()
    left, sizes, right = torch.linalg.svd(magnitude)
    g, h = rank_one(magnitude)
    torch.testing.assert_close(torch.outer(g, h).double(), sizes[0] * torch.outer(left[:, 0], right[0]))
    torch.testing.assert_close(g.norm(), h.norm())
    assert bool((g >= 0).all() and (h >= 0).all())


def test_a_weight_of_zeros_starts_as_zero_and_not_as_nan() -> None:
    layer = OneBitLinear(torch.zeros(3, 4), None)
    assert torch.equal(layer(torch.randn(2, 4)), torch.zeros(2, 3))


def test_magnitudes_in_two_blocks_of_equal_size_still_give_a_best_fit() -> None:
    g, h = rank_one(torch.eye(2))
    assert float((torch.eye(2) - torch.outer(g, h)).square().sum()) == pytest.approx(1.0)


def test_the_latent_gradient_is_that_of_the_sign_passed_straight_through() -> None:
    layer = OneBitLinear(torch.randn(3, 8), None)
    x, out = torch.randn(5, 8), torch.randn(5, 3)
    (layer(x) * out).sum().backward()
    expected = (out.t() @ x) * torch.outer(layer.out_scale.detach(), layer.in_scale.detach())
    torch.testing.assert_close(layer.latent.grad, expected)


def test_with_norm_the_output_loses_its_size_and_the_bias_comes_after() -> None:
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(4, 8)
    layer = OneBitLinear(weight, bias, norm=True)
    y = layer(x).detach() - bias
    torch.testing.assert_close(y.mean(-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4), atol=1e-3, rtol=0)
    assert {name for name, _ in layer.named_parameters()} == {"latent", "out_scale", "in_scale", "bias"}


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_conversion_takes_every_layer_of_the_plan_from_its_own_weight(
    family: str, tiny_model: Callable[[str], PreTrainedModel], token_ids: Tensor
) -> None:
    model, source = tiny_model(family), tiny_model(family)
    plan = plan_conversion(model, 4)
    layers = convert_onebit(model, plan)
    assert list(layers) == [e.name for e in plan.binary]
    for name, layer in layers.items():
        assert model.get_submodule(name) is layer
        assert torch.equal(layer.latent, linear_weight(source.get_submodule(name)))
    assert bool(model(input_ids=token_ids).logits.isfinite().all())


def test_the_output_has_the_dtype_of_the_input() -> None:
    layer = OneBitLinear(torch.randn(3, 8), torch.randn(3))
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
