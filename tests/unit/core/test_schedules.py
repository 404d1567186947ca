"""The numbers that change over a run: the share of flips, its default, and the evidence's memory."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.spec import MethodSpec
from kbop_core.evidence import EvidenceKind
from kbop_core.loop import TrainConfig
from kbop_core.schedules import FLIP_RATE, MOST_MOMENTUM, FlipSchedule, MomentumSchedule, warmup_cosine

# -- the share of flips -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peak", "steps", "warmup", "weights"),
    [
        (4e-3, 400, 20, 4096),
        (0.5, 7, 1, 129),
        (1e-6, 1000, 50, 100_003),
        (0.1, 1, 1, 8),
        (0.02, 33, 40, 77),
        (0, 9, 2, 64),
    ],
)
def test_a_run_spends_exactly_the_share_that_the_schedule_sums_to(
    peak: float, steps: int, warmup: int, weights: int
) -> None:
    schedule = FlipSchedule(peak, steps, warmup)
    total = sum(schedule.count(t, weights) for t in range(steps))
    assert total == math.floor(weights * sum(schedule.share(t) for t in range(steps)))


@given(peak=st.floats(0, 0.5), steps=st.integers(1, 60), warmup=st.integers(0, 70), weights=st.integers(1, 100_000))
@settings(max_examples=200, deadline=None)
def test_after_any_number_of_steps_less_than_one_flip_is_owed(
    peak: float, steps: int, warmup: int, weights: int
) -> None:
    schedule, spent, due = FlipSchedule(peak, steps, warmup), 0, 0.0
    for step in range(steps):
        count = schedule.count(step, weights)
        spent, due = spent + count, due + weights * schedule.share(step)
        assert 0 <= count <= weights
        assert -1e-6 < due - spent < 1 + 1e-6


def test_a_layer_of_one_weight_gets_its_turn_when_the_shares_add_up() -> None:
    schedule = FlipSchedule(0.5, 8, 0)
    counts = [schedule.count(t, 1) for t in range(8)]
    assert set(counts) <= {0, 1}
    assert sum(counts) == math.floor(sum(schedule.share(t) for t in range(8))) >= 1


@pytest.mark.parametrize("step", [10, 11, 1000])
def test_nothing_flips_after_the_end_of_the_schedule(step: int) -> None:
    schedule = FlipSchedule(0.5, 10, 2)
    assert schedule.share(step) == 0.0
    assert schedule.count(step, 10**6) == 0


@pytest.mark.parametrize("peak", [-1e-9, 0.500001, 1.0, math.inf, math.nan])
def test_an_illegal_flip_rate_is_refused_with_its_legal_range(peak: float) -> None:
    with pytest.raises(ValueError, match=r"flip_rate is .* 0 … 0\.5"):
        FlipSchedule(peak, 10, 1)


@given(steps=st.integers(1, 200), warmup=st.integers(0, 250))
def test_the_factor_rises_to_one_then_falls_and_stays_positive(steps: int, warmup: int) -> None:
    factors = [warmup_cosine(t, steps, warmup) for t in range(steps)]
    top = min(warmup, steps)
    assert all(0.0 < f <= 1.0 for f in factors)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert warmup_cosine(steps, steps, warmup) == 0.0


# -- the default share ------------------------------------------------------------------------------------------------


def test_a_run_uses_the_flip_rate_it_is_given_and_else_the_default() -> None:
    assert TrainConfig(steps=4000).flip_schedule == FlipSchedule(FLIP_RATE, 4000, 200)
    assert TrainConfig(steps=4000, flip_rate=0.01).flip_schedule == FlipSchedule(0.01, 4000, 200)
    assert MethodSpec().flip_rate == FLIP_RATE
    assert TrainConfig(steps=4000, flip_rate=0.0).flip_schedule.peak == 0.0


# -- the evidence's memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.98, 0.9995, MOST_MOMENTUM])
@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_a_constant_momentum_is_the_same_at_every_step(beta: float, step: int) -> None:
    assert MomentumSchedule.constant(beta).beta(step) == pytest.approx(beta, rel=1e-12, abs=0)


@pytest.mark.parametrize(("step", "remembered"), [(0, 20), (1, 20.2), (100, 40), (400, 100), (5000, 1020)])
def test_by_default_the_memory_is_twenty_steps_and_grows_by_a_fifth_of_a_step(step: int, remembered: float) -> None:
    assert 1 / (1 - MomentumSchedule().beta(step)) == pytest.approx(remembered)


@given(first=st.floats(1, 10_000), growth=st.floats(0, 1), steps=st.lists(st.integers(0, 10**9), min_size=2))
def test_the_memory_never_shrinks_and_never_exceeds_its_limit(first: float, growth: float, steps: list[int]) -> None:
    betas = [MomentumSchedule(first, growth).beta(t) for t in sorted(steps)]
    assert betas == sorted(betas)
    assert 0.0 <= betas[0] <= betas[-1] <= MOST_MOMENTUM


@pytest.mark.parametrize("beta", [-1e-9, 0.99991, 1.0, 2.0, math.inf, math.nan])
def test_an_illegal_constant_momentum_is_refused_with_its_legal_range(beta: float) -> None:
    with pytest.raises(ValueError, match=r"momentum is .*; legal: 0 ≤ momentum ≤ 0\.9999"):
        MomentumSchedule.constant(beta)


@pytest.mark.parametrize("first", [0.99, 0.0, -20.0, 10_002.0, math.inf, math.nan])
def test_a_memory_shorter_than_a_step_or_too_long_is_refused(first: float) -> None:
    with pytest.raises(ValueError, match=r"remembers .* steps; legal: 1 … 10000"):
        MomentumSchedule(first)


@pytest.mark.parametrize("growth", [-0.01, 1.01, math.inf, math.nan])
def test_a_memory_that_shrinks_or_outgrows_the_run_is_refused(growth: float) -> None:
    with pytest.raises(ValueError, match=r"memory is .* share of the steps done, 0 … 1"):
        MomentumSchedule(20.0, growth)


def test_a_job_may_ask_for_the_momentum_and_the_evidence_that_the_core_takes() -> None:
    fields = MethodSpec.model_json_schema()["properties"]
    assert fields["momentum"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": MOST_MOMENTUM}
    assert fields["evidence"]["enum"] == list(get_args(EvidenceKind))
