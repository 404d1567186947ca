"""The optimizer on one rank, against a plain float64 reference; its contract and its state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kbop_core.errors import BadCheckpoint, GradientContract, NonFiniteGradient
from kbop_core.evidence import EvidenceKind
from kbop_core.kbop import KBOP, MIRROR
from kbop_core.layers import BinaryLinear
from kbop_core.schedules import FlipSchedule, MomentumSchedule
from kbop_core.slices import SliceReader, write_slices

Matrix = NDArray[np.float64]
every_kind = pytest.mark.parametrize("kind", ["bfloat16", "int8"])


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


@dataclass
class Reference:
    """The rule as kbop.py's head states it, in float64, with β = ½, at which rounding S rounds m alike."""

    signs: Matrix
    probes: Matrix  # Ω, one row for each row or column of the layer
    evidence: Matrix
    row: Matrix | float = 0.0
    column: Matrix | float = 0.0
    steps_done: int = 0

    @classmethod
    def of(cls, kbop: KBOP) -> Reference:
        layer = kbop.shards["a"].layer
        return cls(layer.signs().double().numpy(), kbop._probes.double().numpy(), np.zeros(layer.signs().shape))

    def step(self, gradient: Matrix, count: int) -> int:
        """One step; returns how many signs flipped."""
        rows, columns = gradient.shape
        self.evidence = bfloat16(0.5 * self.evidence + 0.5 * gradient)
        keep = min(0.98, 1 - 1 / (self.steps_done + 1))  # a plain mean for fifty steps
        fresh_row = ((gradient @ self.probes[:columns]) ** 2).mean(1) / columns
        fresh_column = ((self.probes[:rows].T @ gradient) ** 2).mean(0) / rows
        self.row = keep * self.row + (1 - keep) * fresh_row
        self.column = keep * self.column + (1 - keep) * fresh_column
        size = np.outer(self.row, self.column) ** 0.75
        scores = self.signs * np.divide(self.evidence, size, out=np.zeros_like(size), where=size > 0)
        ordered = np.sort(scores, axis=None)[::-1]
        flip = scores > (max(0.0, ordered[count]) if count < ordered.size else 0.0)
        self.signs[flip] *= -1
        self.evidence[flip] = bfloat16(self.evidence[flip] * float(np.float32(-0.8)))
        self.steps_done += 1
        return int(flip.sum())


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 127, 128, 129])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_eight_steps_follow_the_float64_reference(rows: int, columns: int) -> None:
    layer = make_layer(rows, columns)
    kbop = make_kbop({"a": layer}, momentum=0.5)
    reference, shard = Reference.of(kbop), kbop.shards["a"]
    for step, gradient in enumerate(gradients(rows, columns, 8)):
        give(layer, gradient)
        flips = reference.step(gradient.double().numpy(), kbop.schedule.count(step, rows * columns))
        assert kbop.step().flips == {"a": flips}
        np.testing.assert_array_equal(layer.signs(torch.float64).numpy(), reference.signs)
        held = shard.evidence.values().double().numpy() * kbop.unit  # has decayed for the coming step already
        np.testing.assert_array_equal(held, 0.5 * reference.evidence)
        np.testing.assert_allclose(shard.moments.row, reference.row, rtol=1e-5)
        np.testing.assert_allclose(shard.moments.column, reference.column, rtol=1e-5)


def test_the_probes_are_balanced_signs_that_no_seed_and_no_layer_changes() -> None:
    torch.manual_seed(1)
    one = make_kbop({"a": make_layer(5, 400)})._probes
    torch.manual_seed(2)
    other = make_kbop({"a": make_layer(400, 9), "b": make_layer(7, 8)})._probes
    assert torch.equal(one, other)
    assert one.shape == (400, 16)
    assert set(one.unique().tolist()) == {-1.0, 1.0}
    assert float((one.t() @ one / 400 - torch.eye(16)).abs().max()) < 0.2


def test_the_reference_run_really_flips_the_whole_count() -> None:
    layer = make_layer(5, 129)
    kbop = make_kbop({"a": layer}, momentum=0.5)
    flips = []
    for gradient in gradients(5, 129, 8):
        give(layer, gradient)
        flips.append(kbop.step().flips["a"])
    assert flips == [kbop.schedule.count(t, 5 * 129) for t in range(8)]
    assert sum(flips) > 100


@every_kind
def test_weights_that_gain_nothing_by_flipping_never_flip(kind: EvidenceKind) -> None:
    layer = make_layer(6, 20)
    before = layer.signs()
    kbop = make_kbop({"a": layer}, peak=0.5, evidence=kind)
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


@every_kind
@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (20, 1), (6, 65)])
def test_zero_gradients_flip_nothing(kind: EvidenceKind, shape: tuple[int, int]) -> None:
    layer = make_layer(*shape)
    before = layer.weight.clone()
    kbop = make_kbop({"a": layer}, peak=0.5, evidence=kind)
    for _ in range(3):
        give(layer, torch.zeros(shape))
        assert kbop.step().rate == 0.0
    assert torch.equal(layer.weight, before)


@every_kind
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (8, 8), (3, 65)])
def test_equal_scores_at_the_threshold_flip_none_of_them(kind: EvidenceKind, shape: tuple[int, int]) -> None:
    layer = make_layer(*shape)
    layer.set_signs(torch.ones(shape))
    kbop = make_kbop({"a": layer}, peak=0.5, momentum=0.0, evidence=kind)
    for _ in range(3):
        give(layer, torch.ones(shape))
        assert kbop.step().flips == {"a": 0}


@every_kind
@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1)])
def test_no_more_than_the_count_flips_in_a_layer_of_one_row_or_one_column(
    kind: EvidenceKind, shape: tuple[int, int]
) -> None:
    layer = make_layer(*shape)
    kbop, before = make_kbop({"a": layer}, peak=0.5, momentum=0.0, evidence=kind), layer.signs()
    gradient = torch.randn(shape)
    give(layer, gradient)
    flips = kbop.step().flips["a"]
    changed = layer.signs() != before
    assert flips == int(changed.sum()) <= kbop.schedule.count(0, layer.signs_count)
    assert bool((before * gradient > 0)[changed].all())


@every_kind
def test_a_flip_mirrors_its_evidence_and_the_others_keep_theirs(kind: EvidenceKind) -> None:
    layer = make_layer(5, 30)
    kbop, before = make_kbop({"a": layer}, momentum=0.5, evidence=kind), layer.signs()
    gradient = 5.0 * torch.randint(-25, 26, (5, 30))
    gradient[:, 0] = 127  # whole numbers up to 127: int8 holds them exactly, and four fifths of multiples of five
    gradient[:, 0] *= -before[:, 0]  # their signs are right: they stay
    give(layer, gradient)
    assert kbop.step().flips["a"] > 0
    flipped = layer.signs() != before
    held = kbop.shards["a"].evidence.values() * kbop.unit
    assert MIRROR == 0.8
    assert torch.allclose(held, torch.where(flipped, -0.2, 0.25) * gradient, rtol=2**-8)


@every_kind
def test_a_flip_is_taken_back_unless_the_next_gradients_confirm_it(kind: EvidenceKind) -> None:
    layer = make_layer(4, 32)
    kbop, before = make_kbop({"a": layer}, peak=0.25, momentum=0.9, evidence=kind), layer.signs()
    wants = before * (1.0 + torch.rand(4, 32, generator=torch.Generator().manual_seed(2)))
    give(layer, wants)
    kbop.step()
    flipped = layer.signs() != before
    assert bool(flipped.any())
    confirmed = flipped & (torch.arange(32) % 2 == 0)
    give(layer, torch.where(confirmed, wants, 0.0))  # of the others the next gradient says nothing
    kbop.step()
    assert torch.equal((layer.signs() == before) & flipped, flipped & ~confirmed)


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


@every_kind
@pytest.mark.parametrize("power", [-40, 40])
def test_the_unit_of_the_loss_does_not_matter(power: int, kind: EvidenceKind) -> None:
    layers = [make_layer(5, 129), make_layer(5, 129)]
    optimizers = [make_kbop({"a": layer}, evidence=kind) for layer in layers]
    for gradient in gradients(5, 129, 8):
        give(layers[0], gradient)
        give(layers[1], gradient * 2.0**power)
        assert optimizers[0].step().flips == optimizers[1].step().flips != {"a": 0}
    assert torch.equal(layers[0].weight, layers[1].weight)


# -- the contract -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_stops_the_step_before_any_bit_changes(bad: float, kind: EvidenceKind) -> None:
    layers = {"good": make_layer(4, 10), "broken": make_layer(4, 10, seed=1)}
    before = {n: la.weight.clone() for n, la in layers.items()}
    kbop = make_kbop(layers, peak=0.5, evidence=kind)
    for name, layer in layers.items():
        gradient = gradients(4, 10, 1)[0]
        gradient[2, 3] = bad if name == "broken" else 1.0
        give(layer, gradient)
    with pytest.raises(NonFiniteGradient, match="1 of 2 layers, first broken, at step 0"):
        kbop.step()
    assert all(torch.equal(la.weight, before[n]) for n, la in layers.items())
    assert kbop.steps_done == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1)])
def test_one_bad_number_is_found_in_layers_of_one_row_or_column_too(bad: float, shape: tuple[int, int]) -> None:
    layer = make_layer(*shape)
    kbop = make_kbop({"thin": layer})
    gradient = torch.ones(shape)
    gradient[-1, -1] = bad
    give(layer, gradient)
    with pytest.raises(NonFiniteGradient, match="first thin, at step 0"):
        kbop.step()


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


@pytest.mark.parametrize("momentum", [-0.1, 0.99991, 1.0, 2, float("nan")])
def test_an_illegal_momentum_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"momentum is .* legal: 0 ≤ momentum ≤ 0\.9999"):
        make_kbop({"a": make_layer(2, 8)}, momentum=momentum)


def test_a_momentum_is_constant_when_it_is_a_number_and_grows_when_there_is_none() -> None:
    layers = {"a": make_layer(2, 8)}
    assert make_kbop(layers).momentum == MomentumSchedule()
    assert make_kbop(layers, momentum=MomentumSchedule(7.0, 0.5)).momentum.first == 7.0
    for beta in (0, 0.0, 0.98):
        assert make_kbop(layers, momentum=beta).momentum == MomentumSchedule.constant(beta)


def test_an_unknown_kind_of_evidence_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(ValueError, match=r"'float32'; legal: 'bfloat16'.*'int8'"):
        make_kbop({"a": make_layer(2, 8)}, evidence="float32")


@every_kind
def test_two_micro_steps_are_one_step_of_their_sum(kind: EvidenceKind) -> None:
    first, second = (torch.randint(-60, 61, (5, 40)).float() for _ in range(2))
    first[:, 0], second[:, 0] = 127, 0  # whole numbers up to 127: int8 holds them exactly, like eight bits do
    layers = [make_layer(5, 40), make_layer(5, 40)]
    accumulated = make_kbop({"a": layers[0]}, momentum=0.5, micro_steps=2, evidence=kind)
    once = make_kbop({"a": layers[1]}, momentum=0.5, evidence=kind)
    give(layers[0], first)
    give(layers[0], second)
    give(layers[1], first + second)
    assert accumulated.step().flips == once.step().flips != {"a": 0}
    held, expected = ({n: p.rows for n, p in k.state().items()} for k in (accumulated, once))
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())  # bits among them


def test_backward_through_a_layer_reaches_the_optimizer() -> None:
    layer = make_layer(6, 16)
    kbop = KBOP({"a": layer}, FlipSchedule(0.25, 2, 0), momentum=0.0)
    x = torch.randn(32, 16)
    layer(x).square().mean().backward()
    assert kbop.step().flips["a"] > 0


# -- state ------------------------------------------------------------------------------------------------------------


def saved(kbop: KBOP, folder: Path) -> SliceReader:
    write_slices(kbop.state(), folder / "rank-0.safetensors")
    return SliceReader([folder / "rank-0.safetensors"])


@every_kind
@pytest.mark.parametrize("momentum", [None, 0.01, 0.98])  # at 0.01 the evidence was rescaled before the checkpoint
def test_a_restored_optimizer_makes_the_same_flips_as_the_one_that_went_on(
    kind: EvidenceKind, momentum: float | None, tmp_path: Path
) -> None:
    stream = gradients(5, 129, 8)
    layer, other = make_layer(5, 129), make_layer(5, 129, seed=9)
    options = {"evidence": kind, "momentum": momentum}
    kbop, restored = make_kbop({"a": layer}, **options), make_kbop({"a": other}, **options)
    for gradient in stream[:4]:
        give(layer, gradient)
        kbop.step()
    restored.load(saved(kbop, tmp_path), kbop.steps_done, kbop.unit)
    for gradient in stream[4:]:
        give(layer, gradient)
        give(other, gradient)
        assert kbop.step().flips == restored.step().flips != {"a": 0}
    assert torch.equal(layer.weight, other.weight)


def test_loading_forgets_gradients_that_arrived_since_the_last_step(tmp_path: Path) -> None:
    layer = make_layer(5, 20)
    kbop = make_kbop({"a": layer})
    state = saved(kbop, tmp_path)
    give(layer, gradients(5, 20, 1)[0])
    kbop.load(state, 0, 1.0)
    give(layer, torch.zeros(5, 20))
    assert kbop.step().flips == {"a": 0}


@pytest.mark.parametrize("layers", [{"b": (4, 8)}, {"a": (5, 8)}, {"a": (4, 8), "b": (4, 8)}])
def test_state_of_other_layers_is_refused(layers: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    state = saved(make_kbop({"a": make_layer(4, 8)}), tmp_path)
    with pytest.raises(BadCheckpoint, match="saved for other layers"):
        make_kbop({n: make_layer(*shape) for n, shape in layers.items()}).load(state, 0, 1.0)


@pytest.mark.parametrize(("written", "built"), [("bfloat16", "int8"), ("int8", "bfloat16")])
def test_state_with_the_other_kind_of_evidence_is_refused_and_nothing_is_taken(
    written: EvidenceKind, built: EvidenceKind, tmp_path: Path
) -> None:
    state = saved(make_kbop({"a": make_layer(4, 8)}, evidence=written), tmp_path)
    layer = make_layer(4, 8, seed=1)
    kbop, before = make_kbop({"a": layer}, evidence=built), layer.weight.clone()
    with pytest.raises(BadCheckpoint, match="another kind of evidence"):
        kbop.load(state, 7, 0.5)
    assert (kbop.steps_done, kbop.unit) == (0, make_kbop({"a": make_layer(4, 8)}).unit)
    assert torch.equal(layer.weight, before)


@every_kind
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 65, 127, 128, 129])
def test_state_is_bits_evidence_and_a_float_for_each_row_and_column(columns: int, kind: EvidenceKind) -> None:
    rows = 6
    kbop = make_kbop({"a": make_layer(rows, columns), "b": make_layer(rows, columns)}, evidence=kind)
    bits, moments = 2 * rows * -(-columns // 8), 4 * (rows + columns)  # the bits, and the first ones of sampled rows
    evidence = 2 * rows * columns if kind == "bfloat16" else rows * (columns + 4 * -(-columns // 64))
    assert kbop.state_bytes() == 2 * (bits + evidence + moments)
