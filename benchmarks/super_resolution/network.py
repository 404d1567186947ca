"""Owns the network: an EDSR without batch norm, small, on luma; its residual blocks take any kind of convolution.

    low → head (3×3, 1 → C) → N × [x + conv(relu(conv(x)))] → tail (3×3, C → s²) → pixel shuffle → + bicubic(low)

Head, tail and all biases are real numbers in every row; the 2N convolutions of the blocks are what rows differ in. The
tail starts at zero, so that every row starts as the bicubic enlargement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.super_resolution.images import bicubic
from kbop_core.baselines.latent import straight_through_sign
from kbop_core.conv import BinaryConv2d, ConvGeometry
from kbop_core.init.random import random_init
from kbop_core.layers import BinaryLayer

Weights = Literal["real", "latent", "binary"]
Start = Literal["torch", "bnn_init", "unit"]


@dataclass(frozen=True)
class Body:
    """What the rows differ in.

    Attributes:
        weights: real numbers; latent weights under signs (STE); packed signs.
        start: torch's own start, of binary weights its signs × mean |w|; BNN Init (random signs, scales gain/√I with
            gain 1 for the first convolution of a block and √2 after its activation); random signs and scales 1.
            Latent weights under BNN Init have torch's signs and BNN Init's scales.
        shifts: whether activations learn ReActNet's per-channel shifts and slopes in place of ReLU.
    """

    weights: Weights
    start: Start
    shifts: bool = False


class LatentConv2d(nn.Module):
    """3×3, padded: α ⊙ sign(V) with V a float32 parameter (BinaryConnect/STE), one learned scale per out-channel.

    Attributes:
        latent: V, (O, C, 3, 3).
        scale: α, (O, 1, 1, 1), starts as the mean of |V|.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.latent = nn.Parameter(conv.weight.detach().clone())
        self.scale = nn.Parameter(self.latent.detach().abs().mean((1, 2, 3), keepdim=True))
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, straight_through_sign(self.latent) * self.scale, self.bias, padding=1)


class Shift(nn.Module):
    """x + b with one learned number per channel: ReActNet's RSign without the sign, as activations stay real here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class RPReLU(nn.Module):
    """PReLU(x − γ) + ζ, all per channel (ReActNet, Liu et al. 2020, eq. 5); slopes start at 0.25."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = Shift(channels), Shift(channels)
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.prelu(self.before(x), self.slope))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + second(activation(first(shift(x)))); without shifts `shift` does nothing and the activation is ReLU.

    RPReLU's ζ is the shift before `second`.
    """

    def __init__(self, channels: int, shifts: bool, conv: Callable[[float], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = conv(1.0), conv(math.sqrt(2.0))
        self.shift = Shift(channels) if shifts else nn.Identity()
        self.activation = RPReLU(channels) if shifts else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.activation(self.first(self.shift(x))))  # type: ignore[no-any-return]


class SuperResolution(nn.Module):
    """The network; equal seeds give equal heads and tails in every row, and equal V in the latent and real ones.

    Args:
        scale: s, 2 or more.
        channels, blocks: C and N.
        body: what the blocks' convolutions are.
        seed: of everything random.
    """

    def __init__(self, scale: int, channels: int, blocks: int, body: Body, seed: int) -> None:
        super().__init__()
        self.scale = scale
        self.signs = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.head = nn.Conv2d(1, channels, 3, padding=1)
            self.tail = nn.Conv2d(channels, scale * scale, 3, padding=1)
            nn.init.zeros_(self.tail.weight)
            nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]
            conv = {"real": self._real, "latent": self._latent, "binary": self._binary}[body.weights]
            made = (Block(channels, body.shifts, lambda gain: conv(channels, body, gain)) for _ in range(blocks))
            self.body = nn.Sequential(*made)

    def forward(self, low: Tensor) -> Tensor:
        """(B, 1, h, w) → (B, 1, s·h, s·w)."""
        height, width = (n * self.scale for n in low.shape[-2:])
        detail = F.pixel_shuffle(self.tail(self.body(self.head(low))), self.scale)
        return detail + bicubic(low, height, width)

    def _real(self, channels: int, body: Body, gain: float) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1)

    def _latent(self, channels: int, body: Body, gain: float) -> nn.Module:
        layer = LatentConv2d(nn.Conv2d(channels, channels, 3, padding=1))
        if body.start == "bnn_init":
            nn.init.constant_(layer.scale, gain / math.sqrt(9 * channels))
        return layer

    def _binary(self, channels: int, body: Body, gain: float) -> nn.Module:
        layer = BinaryConv2d(ConvGeometry(channels, (3, 3), padding=(1, 1)), channels, True, trainable=True)
        random_init(layer, self.signs, gain)
        if body.start == "unit":
            nn.init.ones_(layer.weight_scale)
        elif body.start == "torch":
            start = nn.Conv2d(channels, channels, 3).weight.detach().flatten(1)
            layer.set_signs(start)
            layer.weight_scale.data.copy_(start.abs().mean(1, keepdim=True))
        return layer


def binary_layers(network: SuperResolution) -> dict[str, BinaryLayer]:
    """Name → layer that KBOP flips, in order."""
    return {name: m for name, m in network.named_modules() if isinstance(m, BinaryLayer)}


def body_weights(network: SuperResolution) -> list[Tensor]:
    """The real or latent weights of the blocks' convolutions; none where they are packed signs."""
    found: list[Tensor] = []
    for module in network.body.modules():
        if isinstance(module, nn.Conv2d):
            found.append(module.weight)
        elif isinstance(module, LatentConv2d):
            found.append(module.latent)
    return found


def scales(network: SuperResolution) -> list[Tensor]:
    """The scales of the blocks' convolutions."""
    return [p for name, p in network.named_parameters() if name.endswith((".scale", ".weight_scale"))]


@torch.no_grad()
def binarize_plainly(network: SuperResolution) -> None:
    """w → sign(w)·mean|w| of its out-channel in every convolution of the blocks, in place, with no training after."""
    for weight in body_weights(network):
        mean = weight.abs().mean((1, 2, 3), keepdim=True)
        weight.copy_(torch.where(weight >= 0, mean, -mean))
