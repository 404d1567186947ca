"""Owns `BinaryConv2d`: a 2-D convolution with packed signs times scales, and its gradient at the binary point.

Refuses to know when a sign flips (kbop.py), and padding other than zeros.

Shapes: B batch, C in-channels, O out-channels, H×W pixels, kh×kw kernel, I = C/groups·kh·kw weights of one out-channel.
The effective kernel is  W_OI = α_O1 ⊙ S_OI,  S ∈ {±1}, viewed as (O, C/groups, kh, kw): one row of packed signs and one
scale is one out-channel. KBOP sees the same rows and columns as in a linear layer: a row is an out-channel, a column
one place of the kernel in one in-channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from kbop_core.bits import unpack_signs
from kbop_core.layers import BinaryLayer, GradientSink, dense_weight

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvGeometry:
    """Where a kernel is applied: all that a convolution is besides its out-channels and weights.

    Attributes:
        in_channels: C.
        kernel_size: (kh, kw), pixels.
        stride, padding, dilation: (vertical, horizontal), pixels; padding is with zeros.
        groups: parts into which in- and out-channels are split; C for a depthwise convolution.

    Raises:
        ValueError: a number out of its range, or groups that do not divide C.
    """

    in_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least:
                raise ValueError(f"{name} is {pair}; legal: (vertical, horizontal), each {least} or more")
        if min(self.in_channels, self.groups) < 1 or self.in_channels % self.groups:
            raise ValueError(f"groups is {self.groups}; legal: a divisor of in_channels, {self.in_channels}")

    @property
    def fan_in(self) -> int:
        """I = C/groups·kh·kw."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    def kernel(self, weight_OI: Tensor) -> Tensor:
        """(O, I) viewed as (O, C/groups, kh, kw)."""
        return weight_OI.view(-1, self.in_channels // self.groups, *self.kernel_size)

    @property
    def placement(self) -> tuple[Pair, Pair, Pair, int]:
        """Stride, padding, dilation and groups, in the order torch takes them."""
        return self.stride, self.padding, self.dilation, self.groups


class _BinaryConvolution(torch.autograd.Function):
    """y = x ∗ W with W rebuilt from bits in both directions, so that no dense weight outlives the call.

    Backward, with D = ∂loss/∂W (O, I):
        ∂loss/∂x = ∂loss/∂y ∗ᵀ W,   ∂loss/∂α = Σ_I D ⊙ S,   ∂loss/∂S = α ⊙ D  → the sink.
    This is the exact gradient at the binary point, as in layers.py.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale_O1: Tensor, geometry: ConvGeometry, sink: GradientSink | None
    ) -> Tensor:
        ctx.save_for_backward(x, packed, scale_O1)
        ctx.geometry, ctx.sink = geometry, sink
        weight_OI = dense_weight(packed, scale_O1, geometry.fan_in, x.dtype)
        return F.conv2d(x, geometry.kernel(weight_OI), None, *geometry.placement)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        (grad_y,) = gradients
        x, packed, scale_O1 = ctx.saved_tensors
        need_x, _, need_scale, _, _ = ctx.needs_input_grad
        geometry: ConvGeometry = ctx.geometry
        weight_OI = unpack_signs(packed, geometry.fan_in, grad_y.dtype)
        alpha_O1 = scale_O1.to(grad_y.dtype)
        grad_x = grad_scale = None
        if need_scale or ctx.sink is not None:
            shape = geometry.kernel(weight_OI).shape
            grad_OI = conv2d_weight(x, shape, grad_y, *geometry.placement).reshape(weight_OI.shape)
            if need_scale:
                grad_scale = (grad_OI * weight_OI).sum(1, keepdim=True).to(scale_O1.dtype)
        if need_x:
            weight_OI *= alpha_O1  # signs until here; from here on the effective weight
            grad_x = conv2d_input(x.shape, geometry.kernel(weight_OI), grad_y, *geometry.placement)
        if ctx.sink is not None:
            ctx.sink(grad_OI.mul_(alpha_O1))
        return grad_x, None, grad_scale, None, None


class BinaryConv2d(BinaryLayer):
    """A 2-D convolution with weights of single bits and one scale per out-channel; what it keeps is `BinaryLayer`'s.

    `weight` is uint8 (O, ⌈I/8⌉) and `weight_scale` (O, 1), I = C/groups·kh·kw; the columns of a row run over
    in-channels, then kernel rows, then kernel columns, as in `torch.nn.Conv2d.weight.flatten(1)`.

    Args:
        geometry: in-channels, kernel and where it is applied.
        out_channels: O, a multiple of the geometry's groups.
        bias: whether to add one real number per out-channel.
        trainable: as in `BinaryLayer`.
    """

    def __init__(
        self,
        geometry: ConvGeometry,
        out_channels: int,
        bias: bool,
        *,
        trainable: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if out_channels < 1 or out_channels % geometry.groups:
            raise ValueError(f"out_channels is {out_channels}; legal: a multiple of groups, {geometry.groups}")
        super().__init__(geometry.fan_in, out_channels, bias, 1, trainable=trainable, device=device)
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, O, H', W') in the dtype of `x`.

        Raises:
            ValueError: `x` has not four dimensions (a single image needs a batch dimension of 1).
        """
        if x.dim() != 4:
            raise ValueError(f"input has shape {tuple(x.shape)}; legal: (batch, {self.geometry.in_channels}, H, W)")
        y: Tensor = _BinaryConvolution.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.weight_scale, self.geometry, self.gradient_sink
        )
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        """What printing the model shows."""
        return f"out_features={self.out_features}, {self.geometry}"
