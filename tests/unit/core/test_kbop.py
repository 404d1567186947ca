"""The optimizer on one rank, against a plain float64 reference; its contract and its state."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kbop_core.errors import GradientContract, NonFiniteGradient
from kbop_core.kbop import KBOP, MOST_MOMENTUM, FlipSchedule
from kbop_core.layers import BinaryLinear

Matrix = NDArray[np.float64]


def make_layer(rows: int, columns: int, seed: int = 0) -> BinaryLinear:
    layer = BinaryLinear(columns, rows, False, 8, trainable=True)
    layer.set_signs(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    return layer


def make_kbop(layers: dict[str, BinaryLinear], peak: float = 0.1, steps: int = 8, **options: Any) -> KBOP:
    return KBOP(layers, FlipSchedule(peak, steps, 2), **options)


def give(layer: BinaryLinear, gradient: Tensor) -> None:
    """Hand a gradient to the layer's sink, which may overwrite what it gets."""
    assert layer.gradient_sink is not None
    layer.gradient_sink(gradient.clone())


def gradients(rows: int, columns: int, steps: int) -> list[Tensor]:
    """Multiples of 1/64, so that the averages are exact in float32 and round to bfloat16 once."""
    rng = np.random.default_rng(rows * 1000 + columns)
    sizes = np.exp2(rng.integers(-4, 4, (rows, 1)))
    return [torch.from_numpy(rng.integers(-1000, 1000, (rows, columns)) / 64 * sizes).float() for _ in range(steps)]


def bfloat16(x: Matrix) -> Matrix:
    """Round to eight significant bits, ties to even."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.rint(fraction * 256) / 256, exponent)


def reference_step(signs: Matrix, evidence: Matrix, gradient: Matrix, beta: float, count: int) -> int:
    """The rule as kbop.py's head states it, in place; returns how many signs flipped."""
    evidence[:] = bfloat16(beta * evidence + (1 - beta) * gradient)
    size = np.sqrt(np.outer((evidence**2).mean(1), (evidence**2).mean(0)))
    scores = signs * np.divide(evidence, size, out=np.zeros_like(evidence), where=size > 0)
    ordered = np.sort(scores, axis=None)[::-1]
    threshold = max(0.0, ordered[count]) if count < ordered.size else 0.0
    flip = scores > threshold
    signs[flip] *= -1
    evidence[flip] = 0
    return int(flip.sum())


@pytest.mark.parametrize("columns", [7, 8, 9, 127, 128, 129])
@pytest.mark.parametrize("rows", [2, 5])
def test_eight_steps_follow_the_float64_reference(rows: int, columns: int) -> None:
    layer = make_layer(rows, columns)
    kbop = make_kbop({"a": layer}, momentum=0.75)
    signs, evidence = layer.signs(torch.float64).numpy(), np.zeros((rows, columns))
    for step, gradient in enumerate(gradients(rows, columns, 8)):
        give(layer, gradient)
        count = kbop.schedule.count(step, rows * columns)
        flips = reference_step(signs, evidence, gradient.double().numpy(), 0.75, count)
        assert kbop.step().flips == {"a": flips}
        np.testing.assert_array_equal(layer.signs(torch.float64).numpy(), signs)
        np.testing.assert_array_equal(kbop.shards["a"].evidence.double().numpy(), evidence)


def test_the_reference_run_really_flips_the_whole_count() -> None:
    layer = make_layer(5, 129)
    kbop = make_kbop({"a": layer}, momentum=0.75)
    flips = []
    for gradient in gradients(5, 129, 8):
        give(layer, gradient)
        flips.append(kbop.step().flips["a"])
    assert flips == [kbop.schedule.count(t, 5 * 129) for t in range(8)]
    assert sum(flips) > 100


def test_weights_that_gain_nothing_by_flipping_never_flip() -> None:
    layer = make_layer(6, 20)
    before = layer.signs()
    kbop = make_kbop({"a": layer}, peak=0.5)
    give(layer, -before * torch.rand(6, 20))
    assert kbop.step().rate == 0.0
    assert torch.equal(layer.signs(), before)


def test_with_room_for_all_exactly_the_positive_scores_flip() -> None:
    layer = make_layer(4, 40)
    kbop, before = KBOP({"a": layer}, FlipSchedule(0.5, 4, 1), momentum=0.0), layer.signs()
    wants = torch.rand(4, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    give(layer, before * torch.where(wants, 1.0, -1.0) * gradients(4, 40, 1)[0].abs().clamp(min=0.25))
    assert kbop.schedule.count(0, 160) > int(wants.sum()) > 0
    kbop.step()
    assert torch.equal(layer.signs() != before, wants)


@pytest.mark.parametrize("peak", [0.1, 0.5])
def test_zero_gradients_flip_nothing(peak: float) -> None:
    layer = make_layer(6, 20)
    before = layer.weight.clone()
    kbop = make_kbop({"a": layer}, peak=peak)
    for _ in range(3):
        give(layer, torch.zeros(6, 20))
        assert kbop.step().rate == 0.0
    assert torch.equal(layer.weight, before)


def test_equal_scores_at_the_threshold_flip_none_of_them() -> None:
    layer = BinaryLinear(8, 8, False, 8, trainable=True)
    layer.set_signs(torch.ones(8, 8))
    kbop = make_kbop({"a": layer}, peak=0.5, momentum=0.0)
    give(layer, torch.ones(8, 8))
    assert kbop.step().flips == {"a": 0}


def test_no_more_than_the_count_flips_in_a_layer_of_one_row() -> None:
    layer = make_layer(1, 64)
    kbop, before = make_kbop({"a": layer}, momentum=0.0), layer.signs()
    gradient = torch.randn(1, 64)
    give(layer, gradient)
    flips = kbop.step().flips["a"]
    changed = layer.signs() != before
    assert flips == int(changed.sum()) <= kbop.schedule.count(0, 64)
    assert bool((before * gradient > 0)[changed].all())


def test_a_flipped_weight_starts_anew_and_the_others_keep_their_evidence() -> None:
    layer = make_layer(5, 30)
    kbop, before = make_kbop({"a": layer}, momentum=0.0), layer.signs()
    gradient = gradients(5, 30, 1)[0]
    give(layer, gradient)
    assert kbop.step().flips["a"] > 0
    flipped = layer.signs() != before
    assert torch.equal(kbop.shards["a"].evidence == 0, flipped | (gradient == 0))


def test_evidence_decays_from_every_bfloat16_at_the_largest_momentum() -> None:
    mantissas = torch.arange(128, 256).float()[None]
    layer = make_layer(1, 128)
    kbop = make_kbop({"a": layer}, peak=0.0, momentum=MOST_MOMENTUM)
    kbop.shards["a"].evidence.copy_(mantissas)
    give(layer, torch.zeros(1, 128))
    kbop.step()
    assert bool((kbop.shards["a"].evidence.float() < mantissas).all())


def test_the_tail_bits_of_a_ragged_row_stay_zero() -> None:
    layer = make_layer(6, 9)
    kbop = make_kbop({"a": layer}, peak=0.5)
    for gradient in gradients(6, 9, 8):
        give(layer, gradient)
        kbop.step()
    assert bool((layer.weight[:, 1] <= 1).all())


def test_each_layer_has_its_own_count_and_the_rate_is_over_all() -> None:
    layers = {"small": make_layer(4, 10), "large": make_layer(20, 50)}
    kbop = make_kbop(layers, peak=0.2, momentum=0.0)
    for layer in layers.values():
        give(layer, gradients(layer.out_features, layer.in_features, 1)[0])
    stats = kbop.step()
    assert stats.flips == {"small": 4, "large": 100}
    assert stats.weights == 1040
    assert stats.rate == pytest.approx(104 / 1040)


@pytest.mark.parametrize("power", [-40, 40])
def test_the_unit_of_the_loss_does_not_matter(power: int) -> None:
    layers = [make_layer(5, 129), make_layer(5, 129)]
    optimizers = [make_kbop({"a": layer}) for layer in layers]
    for gradient in gradients(5, 129, 8):
        give(layers[0], gradient)
        give(layers[1], gradient * 2.0**power)
        assert optimizers[0].step().flips == optimizers[1].step().flips != {"a": 0}
    assert torch.equal(layers[0].weight, layers[1].weight)


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_stops_the_step_before_any_bit_changes(bad: float) -> None:
    layers = {"good": make_layer(4, 10), "broken": make_layer(4, 10, seed=1)}
    before = {n: la.weight.clone() for n, la in layers.items()}
    kbop = make_kbop(layers, peak=0.5)
    for name, layer in layers.items():
        gradient = gradients(4, 10, 1)[0]
        gradient[2, 3] = bad if name == "broken" else 1.0
        give(layer, gradient)
    with pytest.raises(NonFiniteGradient, match="1 of 2 layers, first broken, at step 0"):
        kbop.step()
    assert all(torch.equal(la.weight, before[n]) for n, la in layers.items())
    assert kbop.steps_done == 0


@pytest.mark.parametrize(("given", "expected"), [(0, 1), (2, 1), (1, 2), (3, 2)])
def test_a_missing_or_repeated_gradient_breaks_the_contract(given: int, expected: int) -> None:
    layers = {"right": make_layer(4, 10), "wrong": make_layer(4, 10)}
    before = layers["wrong"].weight.clone()
    kbop = make_kbop(layers, peak=0.5, micro_steps=expected)
    for name, times in {"right": expected, "wrong": given}.items():
        for _ in range(times):
            give(layers[name], gradients(4, 10, 1)[0])
    with pytest.raises(GradientContract, match=f"layer wrong saw {given} gradients in this step, not {expected}"):
        kbop.step()
    assert torch.equal(layers["wrong"].weight, before)


@pytest.mark.parametrize("momentum", [-0.1, 0.997, 1.0, float("nan")])
def test_an_illegal_momentum_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"momentum is .* legal: 0 ≤ momentum ≤ 0.995"):
        make_kbop({"a": make_layer(2, 8)}, momentum=momentum)


def test_two_micro_steps_are_one_step_of_their_sum() -> None:
    first, second = (torch.randint(-15, 16, (5, 40)).float() / 4 for _ in range(2))
    layers = [make_layer(5, 40), make_layer(5, 40)]
    accumulated = make_kbop({"a": layers[0]}, momentum=0.5, micro_steps=2)
    once = make_kbop({"a": layers[1]}, momentum=0.5)
    give(layers[0], first)
    give(layers[0], second)
    give(layers[1], first + second)
    assert accumulated.step().flips == once.step().flips != {"a": 0}
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(accumulated.shards["a"].evidence, once.shards["a"].evidence)


def test_backward_through_a_layer_reaches_the_optimizer() -> None:
    layer = make_layer(6, 16)
    kbop = KBOP({"a": layer}, FlipSchedule(0.25, 2, 0), momentum=0.0)
    x = torch.randn(32, 16)
    layer(x).square().mean().backward()
    assert kbop.step().flips["a"] > 0


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_restored_optimizer_makes_the_same_flips_as_the_one_that_went_on() -> None:
    stream = gradients(5, 129, 8)
    layer, other = make_layer(5, 129), make_layer(5, 129, seed=9)
    kbop, restored = make_kbop({"a": layer}), make_kbop({"a": other})
    for gradient in stream[:4]:
        give(layer, gradient)
        kbop.step()
    restored.load_state_dict(copy.deepcopy(kbop.state_dict()))
    for gradient in stream[4:]:
        give(layer, gradient)
        give(other, gradient)
        assert kbop.step().flips == restored.step().flips != {"a": 0}
    assert torch.equal(layer.weight, other.weight)


def test_loading_forgets_gradients_that_arrived_since_the_last_step() -> None:
    layer = make_layer(5, 20)
    kbop = make_kbop({"a": layer})
    state = copy.deepcopy(kbop.state_dict())
    give(layer, gradients(5, 20, 1)[0])
    kbop.load_state_dict(state)
    give(layer, torch.zeros(5, 20))
    assert kbop.step().flips == {"a": 0}


@pytest.mark.parametrize("layers", [{"b": (4, 8)}, {"a": (5, 8)}, {"a": (4, 8), "b": (4, 8)}])
def test_state_of_other_layers_is_refused(layers: dict[str, tuple[int, int]]) -> None:
    saved = make_kbop({"a": make_layer(4, 8)}).state_dict()
    with pytest.raises(ValueError, match="saved for other layers"):
        make_kbop({n: make_layer(*shape) for n, shape in layers.items()}).load_state_dict(saved)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 127, 128, 129])
def test_state_is_two_bytes_and_a_bit_per_weight_plus_row_padding(columns: int) -> None:
    rows = 6
    kbop = make_kbop({"a": make_layer(rows, columns), "b": make_layer(rows, columns)})
    padding = rows * ((-columns) % 8) / 8
    assert kbop.state_bytes() == 2 * (rows * columns * (2 + 1 / 8) + padding)


def test_no_gradient_is_kept_between_steps() -> None:
    layer = make_layer(16, 64)
    kbop = make_kbop({"a": layer})
    give(layer, gradients(16, 64, 1)[0])
    kbop.step()
    held = [t for t in (*vars(kbop.shards["a"]).values(), *kbop.state_dict().values()) if isinstance(t, Tensor)]
    assert [t.dtype for t in held] == [torch.bfloat16]
    assert not kbop._pending


# -- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_annealed_flips_reach_the_optimum_of_a_convex_quadratic(seed: int) -> None:
    """f(S) = ½ tr((S−T) A (S−T)ᵀ) − ⟨C, S⟩, A positive definite, C of T's signs: T is the only minimum."""
    rng = torch.Generator().manual_seed(seed)
    layer, best = make_layer(16, 33, seed=seed + 100), make_layer(16, 33, seed=seed).signs()
    inputs = torch.randn(132, 33, generator=rng)
    curvature, pull = inputs.t() @ inputs / 132, 0.3 * best * (torch.rand(16, 33, generator=rng) + 0.5)
    kbop = KBOP({"a": layer}, FlipSchedule(0.02, 300, 10), momentum=0.9)
    assert float((layer.signs() != best).float().mean()) > 0.4
    for _ in range(300):
        give(layer, (layer.signs() - best) @ curvature - pull)
        kbop.step()
    assert torch.equal(layer.signs(), best)
