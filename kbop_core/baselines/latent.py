"""Owns the latent-weight baseline: binary in the forward pass, a full-precision copy underneath (BinaryConnect/STE).

OneBit and BinaryMoS train this way. Kept only to compare with: it holds 12 bytes a weight between steps, and
4 more for the gradient, where KBOP holds about 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbop_core.convert import ConversionPlan, linear_weight


class _StraightThroughSign(torch.autograd.Function):
    """sign(w) forward (zero is +1), identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def straight_through_sign(latent: Tensor) -> Tensor:
    """sign(V): a new tensor of ±1 in V's shape and dtype (zero is +1); in backward it is the identity."""
    signs: Tensor = _StraightThroughSign.apply(latent)  # type: ignore[no-untyped-call]
    return signs


class LatentLinear(nn.Module):
    """y = x (α ⊙ sign(V))ᵀ with V a float32 parameter; gradients pass straight through the sign.

    Attributes:
        latent: V, (O, I).
        scale: α, (O, G).
    """

    def __init__(self, weight_OI: Tensor, groups: int, bias: Tensor | None) -> None:
        super().__init__()
        self.latent = nn.Parameter(weight_OI.detach().clone().float())
        self.scale = nn.Parameter(self.latent.detach().view(weight_OI.shape[0], groups, -1).abs().mean(-1))
        self.bias = nn.Parameter(bias.detach().clone()) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        signs = straight_through_sign(self.latent)
        weight = (signs.view(*self.scale.shape, -1) * self.scale.unsqueeze(-1)).view_as(self.latent)
        return F.linear(x, weight, self.bias)


def convert_latent(model: nn.Module, plan: ConversionPlan) -> dict[str, LatentLinear]:
    """Replace the plan's layers by latent ones, in place."""
    layers = {}
    for entry in plan.binary:
        old = model.get_submodule(entry.name)
        layers[entry.name] = LatentLinear(linear_weight(old), entry.groups, getattr(old, "bias", None))
        model.set_submodule(entry.name, layers[entry.name])
    return layers
