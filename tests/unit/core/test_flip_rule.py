"""The rule as pure functions: scores, threshold, the count schedule, the search for the largest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbop_core.kbop import FlipSchedule, _largest, evidence_scores, flip_threshold, warmup_cosine


def mean_squares(evidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squares = evidence.double().square()
    return squares.mean(1), squares.mean(0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (5, 129)])
def test_scores_are_the_evidence_over_row_and_column_root_mean_squares(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    evidence, signs = rng.normal(size=shape), rng.choice([-1.0, 1.0], shape)
    rows, columns = (evidence**2).mean(1), (evidence**2).mean(0)
    expected = signs * evidence / np.sqrt(rows[:, None] * columns)
    tensors = [torch.from_numpy(a) for a in (signs, evidence, rows, columns)]
    scores = evidence_scores(tensors[0].float(), *tensors[1:])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_scores_do_not_depend_on_the_unit_of_the_loss(factor: float) -> None:
    evidence = torch.randn(6, 10, dtype=torch.float64)
    plain = evidence_scores(torch.ones(6, 10), evidence, *mean_squares(evidence))
    scaled = evidence_scores(torch.ones(6, 10), factor * evidence, *mean_squares(factor * evidence))
    torch.testing.assert_close(scaled * factor, plain, rtol=1e-5, atol=0)


def test_zero_rows_columns_and_places_score_zero_and_nothing_is_nan() -> None:
    evidence = torch.randn(5, 9)
    evidence[1], evidence[:, 4], evidence[0, 0] = 0.0, 0.0, 0.0
    scores = evidence_scores(torch.ones(5, 9), evidence, *mean_squares(evidence))
    assert bool(scores.isfinite().all())
    assert torch.equal(scores == 0, evidence == 0)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 45))
def test_at_most_count_scores_exceed_the_threshold_and_none_of_them_is_negative(values: list[int], count: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    threshold = flip_threshold(scores, count)
    above = scores[scores > threshold]
    assert len(above) <= count
    assert bool((above > 0).all())


@given(st.sets(st.integers(1, 1000), min_size=1, max_size=40), st.integers(0, 40))
def test_without_ties_exactly_the_count_largest_positive_scores_flip(values: set[int], count: int) -> None:
    scores = torch.tensor(sorted(values), dtype=torch.float32)
    chosen = scores[scores > flip_threshold(scores, count)].tolist()
    assert chosen == sorted(values)[max(0, len(values) - count) :]


def test_scores_tied_at_the_threshold_do_not_flip() -> None:
    scores = torch.tensor([5.0, 3.0, 3.0, 3.0, 1.0])
    assert [int((scores > flip_threshold(scores, k)).sum()) for k in range(6)] == [0, 1, 1, 1, 4, 5]


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


def full_sort(scores: torch.Tensor, count: int) -> list[float]:
    return sorted(scores.tolist(), reverse=True)[: count + 1]


@pytest.mark.parametrize("numel", [1, 9, 65_536, 65_537, 150_001])
@pytest.mark.parametrize("count", [0, 1, 7, 300, 4000])
def test_the_largest_scores_are_those_of_a_full_sort(numel: int, count: int) -> None:
    scores = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    values, places = _largest(scores, count)
    expected = full_sort(scores, count)
    assert values[: len(expected)].tolist() == expected
    assert values[len(expected) :].tolist() == [0.0] * (count + 1 - len(expected))
    assert torch.equal(scores[places[: len(expected)]], values[: len(expected)])


@pytest.mark.parametrize("kind", ["sorted", "reversed", "constant", "one spike", "few levels", "negative"])
def test_a_sample_that_misleads_does_not_change_the_largest(kind: str) -> None:
    n, count = 100_000, 500
    scores = {
        "sorted": torch.arange(n).float(),
        "reversed": torch.arange(n).flip(0).float(),
        "constant": torch.ones(n),
        "one spike": torch.zeros(n).index_fill_(0, torch.tensor([77_777]), 3.0),
        "few levels": torch.arange(n).remainder(5).float(),
        "negative": -torch.arange(n).float(),
    }[kind]
    values, places = _largest(scores, count)
    assert values.tolist() == full_sort(scores, count)
    assert len(set(places.tolist())) == count + 1


def test_no_scores_at_all_are_zeros() -> None:
    values, places = _largest(torch.empty(0), 3)
    assert values.tolist() == [0.0] * 4
    assert places.tolist() == [0] * 4
