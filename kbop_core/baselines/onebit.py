"""Owns the OneBit layer (arXiv 2402.11295): one sign a weight, one scale an input, one scale an output, latent weights.

Refuses groups of scales: a row has one, whatever the plan's group size. Our own code from the paper's equations:

    y = g_O ⊙ (sign(V) (h_I ⊙ x)) + b           start: V = W,  g hᵀ = argmin ‖ |W| − g hᵀ ‖²

sign(W) ⊙ g hᵀ is the paper's sign-value-independent decomposition. |W| has no negative entry, so its largest singular
pair has none either (Perron–Frobenius): the best rank-one fit, the best non-negative one and the limit of power
iteration from a positive vector are one thing.

What the authors' released code does otherwise (github.com/xuyuzhuang11/OneBit): its latents start at 0.01 sign(W), so
that |W| is forgotten; its backward multiplies by 1.001 − tanh²(V), which is 1 within 1 % while |V| < 0.1; its layer
norm is always there. A bench that wants that start sets `latent` after the conversion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbop_core.baselines.latent import straight_through_sign
from kbop_core.convert import ConversionPlan, linear_weight

#: Power iterations at most, and the relative change of the singular value that ends them (float64).
MOST_ITERATIONS, STILL = 200, 1e-14


@torch.no_grad()
def rank_one(magnitude_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The best rank-one fit g hᵀ of a matrix without negative entries, by power iteration in float64.

    Args:
        magnitude_OI: |W|, any floating dtype, ≥ 0; not changed.

    Returns:
        g (O,) and h (I,), float32, ≥ 0 and of equal norm (√σ each); both zero where the matrix is.
    """
    matrix = magnitude_OI.double()
    right_I, size = matrix.sum(0), matrix.new_zeros(())
    for _ in range(MOST_ITERATIONS):
        left_O = matrix @ _unit(right_I)
        right_I = matrix.t() @ _unit(left_O)
        before, size = size, right_I.norm()
        if float((size - before).abs()) <= STILL * float(size):
            break
    half = size.sqrt()
    return (_unit(left_O) * half).float(), (_unit(right_I) * half).float()


def _unit(vector: Tensor) -> Tensor:
    """The vector over its length; zero stays zero."""
    length = vector.norm()
    return vector / length if float(length) > 0 else vector


class OneBitLinear(nn.Module):
    """y = g ⊙ (sign(V) (h ⊙ x)) + b; gradients pass straight through the sign.

    Attributes:
        latent: V, float32 parameter (O, I).
        out_scale: g, float32 parameter (O,).
        in_scale: h, float32 parameter (I,).
        bias: (O,) parameter or None; a copy of the given one.
        norm: whether the output is normalised over O before the bias, without parameters.

    The paper's layers have that norm. It is off by default: it throws the size of the pretrained layer's output
    away, so that the start is no longer close to the teacher, and it depends on the token, so that it cannot be
    folded into scales: it stays as work at inference. With O = 1 its output is always 0.
    """

    def __init__(self, weight_OI: Tensor, bias: Tensor | None, norm: bool = False) -> None:
        super().__init__()
        self.latent = nn.Parameter(weight_OI.detach().float().contiguous().clone())
        out_scale, in_scale = rank_one(self.latent.detach().abs())
        self.out_scale, self.in_scale = nn.Parameter(out_scale), nn.Parameter(in_scale)
        self.bias = nn.Parameter(bias.detach().clone()) if bias is not None else None
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O) in the dtype of `x`."""
        signs_OI = straight_through_sign(self.latent).to(x.dtype)
        y = F.linear(x * self.in_scale.to(x.dtype), signs_OI) * self.out_scale.to(x.dtype)
        if self.norm:
            y = F.layer_norm(y, y.shape[-1:])
        return y if self.bias is None else y + self.bias.to(x.dtype)


def convert_onebit(model: nn.Module, plan: ConversionPlan, norm: bool = False) -> dict[str, OneBitLinear]:
    """Replace the plan's layers by OneBit ones, in place; the plan's groups are not used."""
    layers = {}
    for entry in plan.binary:
        old = model.get_submodule(entry.name)
        layers[entry.name] = OneBitLinear(linear_weight(old), getattr(old, "bias", None), norm)
        model.set_submodule(entry.name, layers[entry.name])
    return layers
