"""Owns the learning rates of what stays real: scales, norms, biases, embeddings and head. Refuses to know signs.

AdamW moves every entry of a tensor by up to its learning rate in a step, however small the gradient: 0.003 is 3 % of a
typical scale of stories260K and 12 % of one of babyllama105. So a rate here is a share of the tensor's own size:

    learning rate of a tensor = rate × size,   size = √mean(tensor²) when training starts

A vector that is no scale, a norm or a bias, counts as at least `LEAST_VECTOR` large: biases often start at zero. Sizes
are rounded to powers of two, so that a few groups hold all tensors. What it is worth: docs/quality.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

#: Peak share of its size by which a scale, and any other real tensor, may move in one step: the defaults.
SCALE_LR, OTHER_LR = 0.01, 0.02
#: Smallest size of a norm or bias for its learning rate, unit of the tensor.
LEAST_VECTOR = 0.1


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], scale_lr: float, other_lr: float
) -> list[dict[str, Any]]:
    """AdamW parameter groups with `lr` set to its peak; the same on every rank that holds the same values.

    Args:
        named: name → parameter, floating-point; names that end in "scale" are scales.
        scale_lr: peak rate of scales, a share of their size per step.
        other_lr: of everything else.
    """
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        scale = name.endswith("scale")
        least = 0.0 if scale or parameter.dim() > 1 else LEAST_VECTOR
        rate = (scale_lr if scale else other_lr) * _rounded_size(parameter, least)
        rates.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]


@torch.no_grad()
def _rounded_size(parameter: nn.Parameter, least: float) -> float:
    """Root mean square, at least `least`, to the nearest power of two; a matrix of zeros counts as LEAST_VECTOR."""
    size = max(float(parameter.detach().float().square().mean().sqrt()), least) or LEAST_VECTOR
    return float(2.0 ** round(math.log2(size))) if math.isfinite(size) else LEAST_VECTOR
