"""BinaryLinear against the dense formula in float64: forward, gradients, the sink, what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kbop_core.layers import BinaryLinear, dense_weight, group_count

COLUMNS = [1, 7, 8, 9, 127, 128, 129]


def make_layer(
    columns: int, rows: int = 5, group: int = 8, *, bias: bool = True, dtype: Any = torch.float64
) -> BinaryLinear:
    torch.manual_seed(columns)
    layer = BinaryLinear(columns, rows, bias, group, trainable=True)
    layer.set_signs(torch.randn(rows, columns))
    with torch.no_grad():
        layer.weight_scale.copy_(torch.randn_like(layer.weight_scale))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(rows))
    return layer.to(dtype)


def formula(x: Tensor, signs_OI: Tensor, scale_OG: Tensor, bias: Tensor | None) -> Tensor:
    """y = x (α ⊙ S)ᵀ + b by plain autograd."""
    _rows, columns = signs_OI.shape
    weight = signs_OI * scale_OG.repeat_interleave(columns // scale_OG.shape[1], dim=1)
    return F.linear(x, weight, bias)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_the_dense_formula(columns: int, bias: bool) -> None:
    layer = make_layer(columns, bias=bias)
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    expected = formula(x, layer.signs(torch.float64), layer.weight_scale, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", COLUMNS)
def test_gradients_of_input_scale_and_bias_equal_autograd_of_the_formula(columns: int) -> None:
    layer = make_layer(columns)
    x = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, 3, 5, dtype=torch.float64)
    leaves = [x, layer.weight_scale, layer.bias]
    ours = torch.autograd.grad((layer(x) * out).sum(), leaves)
    theirs = torch.autograd.grad((formula(x, layer.signs(torch.float64), *leaves[1:]) * out).sum(), leaves)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", COLUMNS)
def test_the_sink_gets_the_gradient_of_the_signs_once_per_backward(columns: int) -> None:
    layer, seen = make_layer(columns), []
    layer.gradient_sink = seen.append
    x, out = torch.randn(4, columns, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    (layer(x) * out).sum().backward()
    signs = layer.signs(torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad((formula(x, signs, layer.weight_scale, layer.bias) * out).sum(), signs)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=1e-12)


def test_two_backward_passes_call_the_sink_twice() -> None:
    layer, seen = make_layer(16), []
    layer.gradient_sink = seen.append
    for _ in range(2):
        layer(torch.randn(2, 16, dtype=torch.float64)).sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize(("x_learns", "scale_learns"), [(True, False), (False, True), (True, True)])
def test_the_sink_fires_whichever_of_input_and_scale_needs_a_gradient(x_learns: bool, scale_learns: bool) -> None:
    layer, seen = make_layer(9, bias=False), []
    layer.gradient_sink = seen.append
    layer.weight_scale.requires_grad_(scale_learns)
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=x_learns)
    layer(x).sum().backward()
    assert len(seen) == 1
    assert (x.grad is not None) == x_learns
    assert (layer.weight_scale.grad is not None) == scale_learns


def test_without_a_sink_the_other_gradients_are_the_same() -> None:
    layer = make_layer(24, bias=False)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight_scale])
    layer.gradient_sink = lambda gradient: None
    with_sink = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight_scale])
    assert all(torch.equal(a, b) for a, b in zip(plain, with_sink, strict=True))


def test_the_sink_owns_its_tensor_and_may_overwrite_it() -> None:
    layer = make_layer(16, bias=False)
    received: list[Tensor] = []
    layer.gradient_sink = lambda gradient: received.append(gradient.fill_(torch.nan))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight_scale.grad is not None
    assert bool(x.grad.isfinite().all() and layer.weight_scale.grad.isfinite().all())
    assert len(received) == 1


def test_activation_checkpointing_changes_no_gradient_and_calls_the_sink_once() -> None:
    layer, seen = make_layer(24), []
    layer.gradient_sink = seen.append
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.weight_scale]
    plain = torch.autograd.grad(layer(x).square().sum(), leaves)
    checkpointed = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), leaves)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_nothing_as_large_as_the_dense_weight_is_saved_for_backward() -> None:
    layer, kept = make_layer(64, rows=48), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, dtype=torch.float64))
    assert any(t.dtype == torch.uint8 and t.shape == (48, 8) for t in kept)
    assert max(t.numel() for t in kept) < 48 * 64 // 4


@pytest.mark.parametrize(
    ("trainable", "names"), [(True, {"weight_scale", "bias"}), (False, {"weight", "weight_scale", "bias"})]
)
def test_the_state_dict_never_holds_a_dense_weight(trainable: bool, names: set[str]) -> None:
    state = BinaryLinear(64, 48, True, 8, trainable=trainable).state_dict()
    assert state.keys() == names
    assert all(t.numel() < 48 * 64 // 4 for t in state.values())


def test_bits_are_no_parameter_so_that_no_optimizer_copies_them() -> None:
    layer = BinaryLinear(64, 48, True, 8, trainable=True)
    assert {n for n, _ in layer.named_parameters()} == {"weight_scale", "bias"}
    assert layer.weight.dtype == torch.uint8


def test_a_stored_layer_keeps_half_precision_scales_as_buffers() -> None:
    layer = BinaryLinear(64, 48, False, 8)
    assert layer.weight_scale.dtype == torch.float16
    assert list(layer.parameters()) == []


@pytest.mark.parametrize(
    ("columns", "group", "groups"),
    [(1, 8, 1), (7, 8, 1), (8, 8, 1), (9, 8, 1), (16, 8, 2), (172, 64, 1), (128, 1, 128)],
)
def test_a_group_that_does_not_divide_the_row_means_one_scale_per_row(columns: int, group: int, groups: int) -> None:
    assert group_count(columns, group) == groups
    assert BinaryLinear(columns, 3, False, group).weight_scale.shape == (3, groups)


@pytest.mark.parametrize("columns", [8, 9, 24])
def test_dense_repeats_each_scale_over_its_group(columns: int) -> None:
    layer = make_layer(columns, bias=False)
    groups = layer.weight_scale.shape[1]
    expected = layer.signs(torch.float64) * layer.weight_scale.detach().repeat_interleave(columns // groups, dim=1)
    assert torch.equal(layer.dense(torch.float64), expected)


def test_dense_weight_changes_neither_bits_nor_scales() -> None:
    layer = make_layer(24)
    bits, scales = layer.weight.clone(), layer.weight_scale.detach().clone()
    dense_weight(layer.weight, layer.weight_scale.detach(), 24, torch.float32).zero_()
    assert torch.equal(layer.weight, bits)
    assert torch.equal(layer.weight_scale.detach(), scales)


def test_bfloat16_activations_give_bfloat16_results_and_float32_scale_gradients() -> None:
    layer = make_layer(24, dtype=torch.float32)
    x = torch.randn(3, 24).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight_scale.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_flipping_between_forward_and_backward_is_an_error() -> None:
    layer = make_layer(16)
    loss = layer(torch.randn(2, 16, dtype=torch.float64)).sum()
    layer.weight.bitwise_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_single_vector_is_a_legal_input() -> None:
    layer = make_layer(9)
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dense(torch.float64).sum(0))
