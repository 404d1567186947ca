"""Owns the BinaryMoS layer (arXiv 2406.12311): OneBit whose scales are mixed anew for each token from e experts.

Refuses to balance or to drop experts: the mixture is dense, as in the paper. Our own code from its equations:

    p = softmax(R x)                                            gates of a token, (e,); R (e, I) reads x unscaled
    y = (S_outᵀ p) ⊙ (sign(V) ((S_inᵀ p) ⊙ x)) + b              S_in (e, I), S_out (e, O), V (O, I) latent

Start: V = W, and every expert is OneBit's start, so that the layer's output is OneBit's whatever the gates are. The
router must not start at zero: with equal gates equal experts get equal gradients, the router gets none, and the layer
would be OneBit for ever. Its entries are uniform in ±1/√I, the spread the authors' code has; being free of cost at
the start it need not be smaller.

In the authors' released code the sign passes no gradient where |V| ≥ 1; ours passes it everywhere.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbop_core.baselines.bits import stored_bits
from kbop_core.baselines.latent import straight_through_sign
from kbop_core.baselines.onebit import rank_one
from kbop_core.convert import ConversionPlan, linear_weight


class BinaryMoSLinear(nn.Module):
    """y = (S_outᵀ p) ⊙ (sign(V) ((S_inᵀ p) ⊙ x)) + b with p = softmax(R x).

    Attributes:
        latent: V, float32 parameter (O, I).
        in_scale: S_in, float32 parameter (e, I).
        out_scale: S_out, float32 parameter (e, O).
        router: R, float32 parameter (e, I).
        bias: (O,) parameter or None; a copy of the given one.
    """

    def __init__(self, weight_OI: Tensor, bias: Tensor | None, experts: int, generator: torch.Generator) -> None:
        """Start from a real weight.

        Args:
            weight_OI: W, copied.
            bias: (O,) or None, copied.
            experts: e ≥ 1; one expert is OneBit with a useless router.
            generator: of the CPU; draws the router.
        """
        if experts < 1:
            raise ValueError(f"experts is {experts}; legal: experts ≥ 1")
        super().__init__()
        self.latent = nn.Parameter(weight_OI.detach().float().contiguous().clone())
        out_scale, in_scale = rank_one(self.latent.detach().abs())
        self.out_scale = nn.Parameter(out_scale.repeat(experts, 1))
        self.in_scale = nn.Parameter(in_scale.repeat(experts, 1))
        spread = 1.0 / math.sqrt(weight_OI.shape[1])
        router = torch.empty(experts, weight_OI.shape[1]).uniform_(-spread, spread, generator=generator)
        self.router = nn.Parameter(router.to(weight_OI.device))
        self.bias = nn.Parameter(bias.detach().clone()) if bias is not None else None

    def gates(self, x: Tensor) -> Tensor:
        """p of each token: (..., I) → (..., e), float32, sums to 1."""
        return F.softmax(F.linear(x.float(), self.router), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O) in the dtype of `x`."""
        gates = self.gates(x)
        scale_in, scale_out = (gates @ self.in_scale).to(x.dtype), (gates @ self.out_scale).to(x.dtype)
        signs_OI = straight_through_sign(self.latent).to(x.dtype)
        y = F.linear(x * scale_in, signs_OI) * scale_out
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @property
    def extra_bits(self) -> int:
        """Bits stored beside the signs: 16 for each scale and each number of the router."""
        return stored_bits(self) - self.latent.numel()


def convert_binarymos(
    model: nn.Module, plan: ConversionPlan, experts: int = 4, seed: int = 0
) -> dict[str, BinaryMoSLinear]:
    """Replace the plan's layers by BinaryMoS ones, in place; the plan's groups are not used.

    Args:
        model: the pretrained model.
        plan: from plan_conversion(model).
        experts: e ≥ 1; the paper has 4.
        seed: of all routers, drawn in the plan's order.
    """
    layers, generator = {}, torch.Generator().manual_seed(seed)
    for entry in plan.binary:
        old = model.get_submodule(entry.name)
        layers[entry.name] = BinaryMoSLinear(linear_weight(old), getattr(old, "bias", None), experts, generator)
        model.set_submodule(entry.name, layers[entry.name])
    return layers
