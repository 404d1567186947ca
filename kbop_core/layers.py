"""Owns `BinaryLayer`, packed signs times scales, and `BinaryLinear`: its forward pass and gradient at the binary point.

Refuses to decide which layers become binary (convert.py) or when a sign flips (kbop.py). Convolution is in conv.py.

Shapes: O out-features, I in-features, G groups of a row (I/G weights share a scale), B batch, T tokens.
The effective weight is  W_OI = α_OG ⊙ S_OI,  S ∈ {±1}. There is no other copy of the weight anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbop_core.bits import pack_signs, packed_width, unpack_signs

#: Receives ∂loss/∂S of one layer, shape (O, I), once per backward pass; it owns the tensor.
GradientSink = Callable[[Tensor], None]


def group_count(in_features: int, group_size: int) -> int:
    """Scales in a row: I/group_size where that is a whole number, else one for the row."""
    return in_features // group_size if in_features % group_size == 0 else 1


class _BinaryMatmul(torch.autograd.Function):
    """y = x Wᵀ with W rebuilt from bits in both directions, so that no dense weight outlives the call.

    Backward, with D = ∂loss/∂W = ∂loss/∂yᵀ x:
        ∂loss/∂x = ∂loss/∂y W,   ∂loss/∂α = Σ_group D ⊙ S,   ∂loss/∂S = α ⊙ D  → the sink.
    This is the exact gradient at the binary point; nothing passes "straight through" a sign function.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale_OG: Tensor, sink: GradientSink | None) -> Tensor:
        ctx.save_for_backward(x, packed, scale_OG)
        ctx.sink = sink
        return F.linear(x, dense_weight(packed, scale_OG, x.shape[-1], x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (grad_y,) = gradients
        x, packed, scale_OG = ctx.saved_tensors
        need_x, _, need_scale, _ = ctx.needs_input_grad
        signs_OI = unpack_signs(packed, x.shape[-1], grad_y.dtype)
        alpha_OG1 = scale_OG.to(grad_y.dtype).unsqueeze(-1)
        grouped = (*scale_OG.shape, -1)
        grad_scale = None
        if need_scale or ctx.sink is not None:
            grad_OI = grad_y.reshape(-1, grad_y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            if need_scale:
                products = grad_OI * signs_OI
                grad_scale = products.view(grouped).sum(-1).to(scale_OG.dtype)
        grad_x = None
        if need_x:
            signs_OI.view(grouped).mul_(alpha_OG1)  # from here on: the effective weight
            grad_x = grad_y @ signs_OI
        if ctx.sink is not None:
            grad_OI.view(grouped).mul_(alpha_OG1)
            ctx.sink(grad_OI)
        return grad_x, None, grad_scale, None


def dense_weight(packed: Tensor, scale_OG: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """W_OI = α ⊙ S as a new dense tensor.

    Args:
        packed: uint8 (O, ⌈I/8⌉).
        scale_OG: (O, G), any floating dtype; G divides I.
        columns: I.
        dtype: of the result and of the product.
    """
    weight = unpack_signs(packed, columns, dtype)
    weight.view(*scale_OG.shape, -1).mul_(scale_OG.to(dtype).unsqueeze(-1))
    return weight


class BinaryLayer(nn.Module):
    """A layer whose weights are single bits: `weight` uint8 (O, ⌈I/8⌉) and `weight_scale` (O, G). KBOP flips these.

    With `trainable=True` the scales are a float32 parameter and the bits a buffer outside the state dict: DeepSpeed
    must not make a 4-byte master copy of them, which would be a latent weight. Otherwise both are
    ordinary buffers, uint8 and float16, under the names the packed format uses.

    Attributes:
        in_features, out_features: I, the number of weights of one output, and O.
        weight: uint8 (O, ⌈I/8⌉), bit order as in bits.py.
        weight_scale: (O, G).
        bias: (O,) parameter or None.
        gradient_sink: called in backward with ∂loss/∂S (O, I); None when signs do not learn.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        groups: int,
        *,
        trainable: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.gradient_sink: GradientSink | None = None
        bits = torch.zeros(out_features, packed_width(in_features), dtype=torch.uint8, device=device)
        self.register_buffer("weight", bits, persistent=not trainable)
        if trainable:
            self.weight_scale = nn.Parameter(torch.ones(out_features, groups, device=device))
        else:
            ones = torch.ones(out_features, groups, dtype=torch.float16, device=device)
            self.register_buffer("weight_scale", ones)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    @property
    def signs_count(self) -> int:
        """Number of binary weights, O·I."""
        return self.in_features * self.out_features

    @torch.no_grad()
    def set_signs(self, weight_OI: Tensor) -> None:
        """Take the signs of a real tensor (O, I); zero counts as +1."""
        self.weight.copy_(pack_signs(weight_OI))

    def signs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """S as a new tensor of ±1, shape (O, I)."""
        return unpack_signs(self.weight, self.in_features, dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W = α ⊙ S as a new tensor, shape (O, I)."""
        return dense_weight(self.weight, self.weight_scale.detach(), self.in_features, dtype)

    def extra_repr(self) -> str:
        """What printing the model shows."""
        groups = self.weight_scale.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={groups}"


class BinaryLinear(BinaryLayer):
    """A linear layer with weights of single bits; what it keeps is `BinaryLayer`'s.

    Attributes:
        transposed: whether the layer it replaced stores its weight as (I, O), as GPT-2's Conv1D does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group_size: int,
        *,
        trainable: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        groups = group_count(in_features, group_size)
        super().__init__(in_features, out_features, bias, groups, trainable=trainable, device=device)
        self.transposed = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O) in the dtype of `x`."""
        y: Tensor = _BinaryMatmul.apply(x, self.weight, self.weight_scale, self.gradient_sink)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)
