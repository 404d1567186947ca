"""Owns BNN Init from random signs: scales that keep the variance of activations. Refuses to look at any weight.

A sum of I products ±α·x has variance α² I E[x²]; α = gain/√I keeps it at gain² E[x²] (Kaiming's analysis with
weights of one magnitude). gain 1 for layers without a nonlinearity before them; pre-norm blocks need no other. After
a ReLU, which halves E[x²], √2. I of a convolution is the weights of one output, C/groups·kh·kw; outputs whose window
reaches into the zero padding get less.
"""

from __future__ import annotations

import math

import torch

from kbop_core.layers import BinaryLayer


@torch.no_grad()
def random_init(layer: BinaryLayer, generator: torch.Generator, gain: float = 1.0) -> None:
    """Draw every sign with probability 1/2 and set every scale to gain/√I.

    Args:
        layer: changed in place.
        generator: of the CPU; equal seeds give equal signs on every rank and device.
        gain: wanted ratio of output to input standard deviation, > 0.
    """
    bits = torch.randint(0, 2, (layer.out_features, layer.in_features), generator=generator)
    layer.set_signs(bits.mul_(2).sub_(1).to(layer.weight.device))
    layer.weight_scale.fill_(gain / math.sqrt(layer.in_features))
