"""BinaryConv2d against torch's own convolution in float64: forward, gradients, the sink, what is kept, KBOP on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kbop_core.conv import BinaryConv2d, ConvGeometry
from kbop_core.init.random import random_init
from kbop_core.kbop import KBOP
from kbop_core.schedules import FlipSchedule

OUT = 6

#: Widths I: 1, 3, 9, 27, 63, 128, 144: ragged tails and none; 1×1 kernels, one-pixel-wide ones, even ones.
GEOMETRIES = {
    "one weight": ConvGeometry(1, (1, 1)),
    "1x1": ConvGeometry(9, (1, 1)),
    "1x1 stride 2": ConvGeometry(128, (1, 1), stride=(2, 2)),
    "one channel": ConvGeometry(1, (3, 3), padding=(1, 1)),
    "3x3": ConvGeometry(3, (3, 3)),
    "3x3 padded": ConvGeometry(16, (3, 3), padding=(1, 1)),
    "column": ConvGeometry(3, (3, 1), padding=(1, 0)),
    "row, wide padding": ConvGeometry(7, (1, 9), padding=(2, 5)),
    "stride leaves pixels over": ConvGeometry(5, (2, 2), stride=(3, 2)),
    "stride and padding": ConvGeometry(3, (3, 3), stride=(2, 3), padding=(2, 1)),
    "dilated": ConvGeometry(3, (3, 3), padding=(2, 3), dilation=(2, 3)),
    "grouped": ConvGeometry(4, (3, 3), padding=(1, 1), groups=2),
    "depthwise": ConvGeometry(6, (3, 3), stride=(2, 1), groups=6),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def make_layer(geometry: ConvGeometry, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> BinaryConv2d:
    torch.manual_seed(geometry.fan_in)
    layer = BinaryConv2d(geometry, OUT, bias, trainable=True)
    layer.set_signs(torch.randn(OUT, geometry.fan_in))
    with torch.no_grad():
        layer.weight_scale.copy_(torch.randn_like(layer.weight_scale))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(OUT))
    return layer.to(dtype)


def image(geometry: ConvGeometry, **options: Any) -> Tensor:
    return torch.randn(2, geometry.in_channels, 11, 10, dtype=torch.float64, **options)


def formula(x: Tensor, geometry: ConvGeometry, signs_OI: Tensor, scale_O1: Tensor, bias: Tensor | None) -> Tensor:
    """y = x ∗ (α ⊙ S) + b by plain autograd."""
    g = geometry
    kernel = (signs_OI * scale_O1).view(OUT, g.in_channels // g.groups, *g.kernel_size)
    return F.conv2d(x, kernel, bias, g.stride, g.padding, g.dilation, g.groups)


@every_geometry
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_torchs_convolution_with_the_dense_weight(geometry: ConvGeometry, bias: bool) -> None:
    layer, x = make_layer(geometry, bias=bias), image(geometry)
    expected = formula(x, geometry, layer.dense(torch.float64), torch.ones(OUT, 1, dtype=torch.float64), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@every_geometry
def test_gradients_of_input_scale_and_bias_equal_autograd_of_the_formula(geometry: ConvGeometry) -> None:
    layer, x = make_layer(geometry), image(geometry, requires_grad=True)
    out = torch.randn_like(layer(x))
    leaves = [x, layer.weight_scale, layer.bias]
    ours = torch.autograd.grad((layer(x) * out).sum(), leaves)
    y = formula(x, geometry, layer.signs(torch.float64), *leaves[1:])
    for mine, reference in zip(ours, torch.autograd.grad((y * out).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@every_geometry
def test_the_sink_gets_the_gradient_of_the_signs_once_per_backward(geometry: ConvGeometry) -> None:
    layer, seen, x = make_layer(geometry), [], image(geometry)
    layer.gradient_sink = seen.append
    out = torch.randn_like(layer(x))
    (layer(x) * out).sum().backward()
    signs = layer.signs(torch.float64).requires_grad_()
    y = formula(x, geometry, signs, layer.weight_scale, layer.bias)
    (expected,) = torch.autograd.grad((y * out).sum(), signs)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("x_learns", "scale_learns"), [(True, False), (False, True), (True, True)])
def test_the_sink_fires_whichever_of_input_and_scale_needs_a_gradient(x_learns: bool, scale_learns: bool) -> None:
    layer, seen = make_layer(GEOMETRIES["3x3"], bias=False), []
    layer.gradient_sink = seen.append
    layer.weight_scale.requires_grad_(scale_learns)
    x = image(layer.geometry, requires_grad=x_learns)
    layer(x).sum().backward()
    assert len(seen) == 1
    assert (x.grad is not None) == x_learns
    assert (layer.weight_scale.grad is not None) == scale_learns


def test_the_sink_owns_its_tensor_and_may_overwrite_it() -> None:
    layer = make_layer(GEOMETRIES["3x3 padded"], bias=False)
    received: list[Tensor] = []
    layer.gradient_sink = lambda gradient: received.append(gradient.fill_(torch.nan))
    x = image(layer.geometry, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight_scale.grad is not None
    assert bool(x.grad.isfinite().all() and layer.weight_scale.grad.isfinite().all())
    assert len(received) == 1


def test_channels_last_images_give_the_same_gradients_in_row_order() -> None:
    layer, x = make_layer(GEOMETRIES["3x3 padded"]), image(GEOMETRIES["3x3 padded"])
    seen: list[Tensor] = []
    layer.gradient_sink = seen.append
    for memory in (torch.contiguous_format, torch.channels_last):
        layer(x.contiguous(memory_format=memory)).square().sum().backward()
    assert seen[1].is_contiguous()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-11, atol=1e-11)


def test_activation_checkpointing_changes_no_gradient_and_calls_the_sink_once() -> None:
    layer, seen = make_layer(GEOMETRIES["3x3"]), []
    layer.gradient_sink = seen.append
    x = image(layer.geometry, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight_scale])
    checkpointed = torch.autograd.grad(
        checkpoint(layer, x, use_reentrant=False).square().sum(), [x, layer.weight_scale]
    )
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_nothing_as_large_as_the_dense_weight_is_saved_for_backward() -> None:
    layer, kept = BinaryConv2d(ConvGeometry(64, (3, 3)), 48, True, trainable=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(1, 64, 4, 4))
    assert any(t.dtype == torch.uint8 and t.shape == (48, 72) for t in kept)
    assert max(t.numel() for t in kept) < 48 * 64 * 9 // 4


@pytest.mark.parametrize(
    ("trainable", "names"), [(True, {"weight_scale", "bias"}), (False, {"weight", "weight_scale", "bias"})]
)
def test_the_state_dict_never_holds_a_dense_weight(trainable: bool, names: set[str]) -> None:
    state = BinaryConv2d(ConvGeometry(16, (3, 3)), 48, True, trainable=trainable).state_dict()
    assert state.keys() == names
    assert all(t.numel() < 48 * 144 // 4 for t in state.values())


def test_a_stored_layer_reads_back_from_its_state_dict() -> None:
    stored, read = (BinaryConv2d(ConvGeometry(3, (3, 3)), 5, True) for _ in range(2))
    stored.set_signs(torch.randn(5, 27, generator=torch.Generator().manual_seed(0)))
    stored.weight_scale.fill_(0.25)
    read.load_state_dict(stored.state_dict())
    assert stored.weight_scale.dtype == torch.float16
    assert {n for n, _ in stored.named_parameters()} == {"bias"}
    assert torch.equal(read.dense(), stored.dense())


def test_bits_are_no_parameter_so_that_no_optimizer_copies_them() -> None:
    layer = BinaryConv2d(ConvGeometry(3, (3, 3)), 5, False, trainable=True)
    assert {n for n, _ in layer.named_parameters()} == {"weight_scale"}
    assert (layer.weight.dtype, layer.weight.shape, layer.weight_scale.shape) == (torch.uint8, (5, 4), (5, 1))
    assert layer.signs_count == 135


def test_bfloat16_activations_give_bfloat16_results_and_float32_scale_gradients() -> None:
    layer = make_layer(GEOMETRIES["3x3"], dtype=torch.float32)
    x = image(layer.geometry).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight_scale.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_flipping_between_forward_and_backward_is_an_error() -> None:
    layer = make_layer(GEOMETRIES["3x3"])
    loss = layer(image(layer.geometry)).sum()
    layer.weight.bitwise_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_image_without_a_batch_dimension_is_refused() -> None:
    layer = make_layer(GEOMETRIES["3x3"])
    with pytest.raises(ValueError, match=r"legal: \(batch, 3, H, W\)"):
        layer(image(layer.geometry)[0])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kernel_size": (0, 3)}, "kernel_size"),
        ({"stride": (0, 1)}, "stride"),
        ({"padding": (-1, 0)}, "padding"),
        ({"dilation": (1, 0)}, "dilation"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"in_channels": 0}, "in_channels"),
    ],
)
def test_numbers_that_make_no_convolution_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ConvGeometry(**{"in_channels": 4, "kernel_size": (3, 3)} | wrong)


def test_out_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of groups, 2"):
        BinaryConv2d(ConvGeometry(4, (3, 3), groups=2), 5, False)


@pytest.mark.parametrize("name", ["1x1", "3x3", "stride and padding", "depthwise"])
def test_a_kbop_step_flips_exactly_the_signs_whose_gradient_asks_for_it_most(name: str) -> None:
    layer, x = make_layer(GEOMETRIES[name], dtype=torch.float32), image(GEOMETRIES[name]).float()
    before, seen = layer.signs(), []
    layer.gradient_sink = seen.append
    layer(x).square().sum().backward()
    kbop = KBOP({"conv": layer}, FlipSchedule(0.25, 2, 1), momentum=0.0)
    layer(x).square().sum().backward()
    stats = kbop.step()
    g, probes = seen[0].double(), kbop._probes.double()
    row = (g @ probes[: g.shape[1]]).square().mean(1, keepdim=True) / g.shape[1]
    column = (probes[:OUT].t() @ g).square().mean(0) / OUT
    wanted = before * seen[0].bfloat16().double() / (row * column) ** 0.75
    count = layer.signs_count // 4
    bound = max(0.0, float(wanted.flatten().sort(descending=True).values[count]))
    assert torch.equal(layer.signs() != before, wanted > bound)
    assert 0 < stats.flips["conv"] <= count


def test_kbop_comes_closer_to_the_signs_of_a_convolution_it_only_sees_through_its_outputs(
    generator: torch.Generator,
) -> None:
    geometry = ConvGeometry(4, (3, 3), padding=(1, 1))
    target, layer = (BinaryConv2d(geometry, 8, False, trainable=True) for _ in range(2))
    random_init(target, generator)
    random_init(layer, generator)
    wrong_before = int((layer.signs() != target.signs()).sum())
    kbop = KBOP({"conv": layer}, FlipSchedule(0.05, 60, 1), momentum=0.5)
    for _ in range(60):
        x = torch.randn(8, 4, 8, 8, generator=generator)
        (layer(x) - target(x).detach()).square().sum().backward()
        kbop.step()
    assert int((layer.signs() != target.signs()).sum()) < 0.6 * wrong_before


@pytest.mark.parametrize(("channels", "kernel"), [(32, (3, 3)), (64, (1, 1)), (33, (1, 3))])
def test_random_signs_keep_the_variance_of_activations_through_a_stack(
    channels: int, kernel: tuple[int, int], generator: torch.Generator
) -> None:
    x = torch.randn(16, channels, 24, 24, generator=generator)
    before = float(x.square().mean())
    for _ in range(8):
        layer = BinaryConv2d(ConvGeometry(channels, kernel), channels, False, trainable=True)
        random_init(layer, generator)
        x = layer(x).detach()
    assert 0.8 < float(x.square().mean()) / before < 1.25


def test_a_gain_of_root_two_keeps_it_through_relus(generator: torch.Generator) -> None:
    x = torch.randn(16, 64, 24, 24, generator=generator)
    before = float(x.square().mean())
    for _ in range(8):
        layer = BinaryConv2d(ConvGeometry(64, (3, 3)), 64, False, trainable=True)
        random_init(layer, generator, gain=2**0.5)
        x = layer(x.relu()).detach()
    assert 0.5 < float(x.square().mean()) / before < 2.0
