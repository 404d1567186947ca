"""The baseline that KBOP is compared with: binary forward, latent weights underneath."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kbop_core.baselines.latent import LatentLinear, convert_latent
from kbop_core.convert import convert_plain, plan_conversion


def test_it_starts_from_the_same_model_as_plain_binarization(
    tiny_model: Callable[[str], PreTrainedModel], token_ids: Tensor
) -> None:
    for family in ("qwen2", "gpt2"):
        latent, plain = tiny_model(family), tiny_model(family)
        convert_latent(latent, plan_conversion(latent, 4))
        convert_plain(plain, plan_conversion(plain, 4), trainable=True)
        torch.testing.assert_close(
            latent(input_ids=token_ids).logits, plain(input_ids=token_ids).logits, rtol=1e-4, atol=1e-4
        )


def test_gradients_pass_straight_through_the_sign() -> None:
    layer = LatentLinear(torch.randn(3, 8), 2, None)
    x, out = torch.randn(5, 8), torch.randn(5, 3)
    (layer(x) * out).sum().backward()
    expected = (out.t() @ x) * layer.scale.detach().repeat_interleave(4, dim=1)
    torch.testing.assert_close(layer.latent.grad, expected)


def test_the_sign_of_a_latent_zero_is_plus_one() -> None:
    layer = LatentLinear(torch.tensor([[0.0, -0.0, 2.0, -4.0]]), 1, None)
    assert layer(torch.eye(4)).flatten().tolist() == [1.5, 1.5, 1.5, -1.5]


def test_latent_weights_are_a_copy_of_the_models() -> None:
    weight = nn.Parameter(torch.randn(3, 8))
    layer = LatentLinear(weight, 1, None)
    layer.latent.data.zero_()
    assert float(weight.detach().abs().sum()) > 0
