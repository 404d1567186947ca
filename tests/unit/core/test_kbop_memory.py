"""What the optimizer remembers: how evidence decays and grows, and how well projections measure the moments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbop_core.evidence import EvidenceKind
from kbop_core.kbop import LEAST_UNIT
from kbop_core.moments import PROBES
from kbop_core.schedules import MOST_MOMENTUM, FlipSchedule, MomentumSchedule

NO_FLIPS = FlipSchedule(0.0, 10**6, 1)
every_kind = pytest.mark.parametrize("kind", ["bfloat16", "int8"])


def noise(rows: int, columns: int, steps: int) -> Tensor:
    return torch.randn(steps, rows, columns, generator=torch.Generator().manual_seed(rows))


# -- evidence ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("momentum", [0.9995, MOST_MOMENTUM])
def test_evidence_decays_however_close_to_one_the_momentum_is(
    learner: Callable, kind: EvidenceKind, momentum: float
) -> None:
    subject = learner(1, 128, NO_FLIPS, momentum=momentum, evidence=kind)
    mantissas = torch.arange(128, 256).float()[None]  # every bfloat16 between two powers of two
    subject.step(mantissas)
    before = subject.evidence
    for _ in range(100):
        subject.step(torch.zeros(1, 128))
    torch.testing.assert_close(subject.evidence, before * momentum**100, rtol=1e-5, atol=0)


@every_kind
def test_evidence_decays_alike_over_the_steps_at_which_its_unit_is_rescaled(
    learner: Callable, kind: EvidenceKind
) -> None:
    subject = learner(3, 65, NO_FLIPS, momentum=0.5, evidence=kind)
    gradient = torch.randint(-126, 127, (3, 65)).float()
    gradient[:, (0, 64)] = 127.0  # whole numbers up to 127: both kinds hold them exactly
    subject.step(gradient)
    for step in range(1, 60):
        assert torch.equal(subject.evidence, gradient.double() * 0.5 ** (step + 1))
        assert LEAST_UNIT <= subject.kbop.unit <= 1.0
        subject.step(torch.zeros(3, 65))


@every_kind
def test_forty_thousand_steps_at_a_long_memory_leave_what_the_formula_says(
    learner: Callable, kind: EvidenceKind
) -> None:
    subject = learner(2, 65, NO_FLIPS, momentum=0.9995, evidence=kind)
    subject.step(noise(2, 65, 1)[0])
    before, units = subject.evidence, set()
    for _ in range(40_000):
        subject.kbop._decay()
        units.add(subject.kbop.unit < 0.01)
    assert units == {True, False}
    torch.testing.assert_close(subject.evidence, before * 0.9995**40_000, rtol=1e-6, atol=0)
    assert 0.9995**40_000 < LEAST_UNIT < subject.kbop.unit


@every_kind
@pytest.mark.parametrize("momentum", [1e-3, 1e-6, 1e-8, 1e-15])
def test_a_tiny_momentum_keeps_the_unit_and_the_evidence_in_range(
    learner: Callable, kind: EvidenceKind, momentum: float
) -> None:
    subject = learner(2, 65, NO_FLIPS, momentum=momentum, evidence=kind)
    for gradient in noise(2, 65, 60):
        subject.step(gradient)
        assert LEAST_UNIT <= subject.kbop.unit <= 1.0
    limit = (0.01 * momentum + 2 * LEAST_UNIT) * float(gradient.abs().max())
    torch.testing.assert_close(subject.evidence, momentum * gradient.double(), rtol=0, atol=limit)


@every_kind
def test_without_momentum_only_the_last_gradient_decides(learner: Callable, kind: EvidenceKind) -> None:
    subject = learner(6, 65, FlipSchedule(0.1, 20, 1), momentum=0.0, evidence=kind)
    for gradient in 1000 * noise(6, 65, 3):
        before = subject.layer.signs()
        assert subject.step(gradient).flips["a"] > 0
        changed = subject.layer.signs() != before
        assert bool((before * gradient > 0)[changed].all())
        assert not subject.evidence.any()
        assert subject.step(-0.001 * subject.layer.signs()).flips["a"] == 0


@every_kind
@pytest.mark.parametrize("momentum", [0.9, 0.98, MomentumSchedule(), MomentumSchedule(1.0, 1.0)])
def test_stored_evidence_follows_the_exact_average_of_noise(
    learner: Callable, kind: EvidenceKind, momentum: MomentumSchedule | float
) -> None:
    subject = learner(8, 129, NO_FLIPS, momentum=momentum, evidence=kind)
    schedule, exact = subject.kbop.momentum, torch.zeros(8, 129, dtype=torch.float64)
    for step, gradient in enumerate(noise(8, 129, 500)):
        subject.step(gradient)
        exact = torch.lerp(gradient.double(), exact, schedule.beta(step))
    error = subject.evidence / schedule.beta(500) - exact
    limit = {"bfloat16": 0.03, "int8": 0.1}[kind]  # rounding of every step, not of the last alone
    assert float(error.square().mean() / exact.square().mean()) < limit**2


# -- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (3, 129)])
def test_projections_measure_mean_squares_of_rows_and_columns(learner: Callable, shape: tuple[int, int]) -> None:
    subject = learner(*shape, NO_FLIPS)
    sizes = torch.logspace(-2, 2, shape[0])[:, None] * torch.logspace(1, -1, shape[1])
    row, column = torch.zeros(shape[0]), torch.zeros(shape[1])
    for step, gradient in enumerate(sizes * noise(*shape, 600)):
        subject.step(gradient)
        keep = min(0.98, 1 - 1 / (step + 1))
        row = keep * row + (1 - keep) * gradient.square().mean(1)
        column = keep * column + (1 - keep) * gradient.square().mean(0)
    torch.testing.assert_close(subject.kbop.shards["a"].moments.row, row, rtol=0.15, atol=0)
    torch.testing.assert_close(subject.kbop.shards["a"].moments.column, column, rtol=0.15, atol=0)


def test_one_steps_projections_are_off_by_a_third_and_unbiased(learner: Callable) -> None:
    subject = learner(600, 50, NO_FLIPS)
    gradient = noise(600, 50, 1)[0]
    subject.step(gradient)
    relative = subject.kbop.shards["a"].moments.row / gradient.square().mean(1) - 1
    assert abs(float(relative.mean())) < 0.1
    assert float(relative.std()) == pytest.approx(math.sqrt(2 / PROBES), rel=0.2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1)])
def test_moments_over_a_single_weight_are_exact_squares(learner: Callable, shape: tuple[int, int]) -> None:
    subject, gradient = learner(*shape, NO_FLIPS), noise(*shape, 1)[0]
    subject.step(gradient)
    shard, squares = subject.kbop.shards["a"], gradient.square()
    torch.testing.assert_close(shard.moments.row if shape[1] == 1 else shard.moments.column, squares.view(-1))


def test_moments_are_a_plain_mean_for_fifty_steps_and_then_forget_with_98_percent(learner: Callable) -> None:
    subject, row = learner(4, 1, NO_FLIPS), []
    for step in range(150):
        subject.step(torch.full((4, 1), 3.0 if step < 25 else 2.0))
        row.append(float(subject.kbop.shards["a"].moments.row[2]))
    assert row[:25] == pytest.approx([9.0] * 25)
    assert row[49] == pytest.approx((9.0 + 4.0) / 2)
    assert row[149] == pytest.approx(4.0 + (row[49] - 4.0) * 0.98**100)


def test_micro_steps_are_measured_as_one_gradient_and_not_one_by_one(learner: Callable) -> None:
    whole, parts = learner(6, 40, NO_FLIPS), learner(6, 40, NO_FLIPS, micro_steps=2)
    gradient, other = torch.randint(-90, 91, (2, 6, 40)).float()
    whole.step(gradient)
    parts.step(gradient - other, other)
    for moment in ("row", "column"):
        expected = getattr(whole.kbop.shards["a"].moments, moment)
        assert torch.equal(getattr(parts.kbop.shards["a"].moments, moment), expected)


@every_kind
def test_no_gradient_is_kept_between_steps(learner: Callable, kind: EvidenceKind) -> None:
    subject = learner(64, 64, NO_FLIPS, evidence=kind)
    subject.step(noise(64, 64, 1)[0])
    shard = subject.kbop.shards["a"]
    held = [t for t in (*vars(shard).values(), *vars(shard.evidence).values()) if isinstance(t, Tensor)]
    assert [t.dtype for t in held if t.numel() >= 64 * 64] == [{"bfloat16": torch.bfloat16, "int8": torch.int8}[kind]]
    assert [t.shape for t in vars(shard.moments).values() if isinstance(t, Tensor)] == [(64,), (64,)]
    assert shard.moments._sketches is None
    assert not subject.kbop._pending
