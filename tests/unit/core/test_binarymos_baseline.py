"""The BinaryMoS baseline: scales mixed for each token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbop_core.baselines.binarymos import BinaryMoSLinear, convert_binarymos
from kbop_core.baselines.onebit import OneBitLinear
from kbop_core.convert import plan_conversion


@pytest.mark.parametrize("experts", [1, 4])
def test_it_starts_as_onebit_whatever_the_router_says(experts: int, generator: torch.Generator) -> None:
    weight, bias, x = torch.randn(5, 12), torch.randn(5), torch.randn(2, 3, 12)
    layer = BinaryMoSLinear(weight, bias, experts, generator)
    torch.testing.assert_close(layer(x), OneBitLinear(weight, bias)(x))


def test_a_token_gets_the_mixture_that_its_own_gates_say(generator: torch.Generator) -> None:
    layer = BinaryMoSLinear(torch.randn(5, 12), torch.randn(5), 3, generator)
    for scales in (layer.in_scale, layer.out_scale):
        scales.data.uniform_(0.5, 1.5)
    x = torch.randn(4, 12)
    signs = torch.where(layer.latent >= 0, 1.0, -1.0)
    for token, got in zip(x, layer(x), strict=True):
        gates = torch.softmax(layer.router @ token, dim=0)
        scaled = token * (gates @ layer.in_scale)
        torch.testing.assert_close(got, (signs @ scaled) * (gates @ layer.out_scale) + layer.bias)


def test_equal_experts_part_in_the_first_step_and_then_the_router_learns(generator: torch.Generator) -> None:
    layer, x, out = BinaryMoSLinear(torch.randn(5, 12), None, 4, generator), torch.randn(6, 12), torch.randn(6, 5)
    (layer(x) * out).sum().backward()
    assert len({tuple(row) for row in layer.in_scale.grad.tolist()}) == 4
    torch.testing.assert_close(layer.router.grad, torch.zeros(4, 12), atol=1e-4, rtol=0)
    layer.in_scale.data -= 0.1 * layer.in_scale.grad
    layer.zero_grad()
    (layer(x) * out).sum().backward()
    assert float(layer.router.grad.abs().max()) > 1e-3


def test_the_latent_gradient_is_that_of_the_sign_passed_straight_through(generator: torch.Generator) -> None:
    layer, x, out = BinaryMoSLinear(torch.randn(3, 8), None, 2, generator), torch.randn(5, 8), torch.randn(5, 3)
    (layer(x) * out).sum().backward()
    expected = (out.t() @ x) * torch.outer(layer.out_scale.detach()[0], layer.in_scale.detach()[0])
    torch.testing.assert_close(layer.latent.grad, expected)


def test_equal_seeds_give_equal_routers_and_other_seeds_or_layers_do_not(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    converted = []
    for seed in (3, 3, 4):
        model = tiny_model("gpt2")
        converted.append(list(convert_binarymos(model, plan_conversion(model, 4), 2, seed).values()))
    one, same, other = (layers[0].router for layers in converted)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, converted[0][-4].router)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_conversion_takes_every_layer_of_the_plan_and_the_model_still_runs(
    family: str, tiny_model: Callable[[str], PreTrainedModel], token_ids: Tensor
) -> None:
    model = tiny_model(family)
    plan = plan_conversion(model, 4)
    layers = convert_binarymos(model, plan)
    assert list(layers) == [e.name for e in plan.binary]
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert bool(model(input_ids=token_ids).logits.isfinite().all())


def test_no_expert_at_all_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="experts is 0"):
        BinaryMoSLinear(torch.randn(3, 8), None, 0, generator)
