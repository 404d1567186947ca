"""The rule as pure functions: scores, threshold, the search for the largest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbop_core.kbop import POWER, evidence_scores
from kbop_core.selection import kth_largest, largest
from kbop_core.shard import Gang


def moments(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column mean squares that differ by a factor of about 10⁶, float32."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(np.exp(3 * rng.normal(size=n))).float() for n in shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (5, 129)])
def test_scores_are_signs_times_evidence_over_the_moments_to_the_power_three_quarters(shape: tuple[int, int]) -> None:
    rng, (rows, columns) = np.random.default_rng(0), moments(shape)
    evidence, signs = rng.normal(size=shape), rng.choice([-1.0, 1.0], shape)
    expected = signs * evidence / np.outer(rows.double(), columns.double()) ** 0.75
    scores = evidence_scores(*(torch.from_numpy(a).float() for a in (signs, evidence)), rows, columns).numpy()
    assert POWER == 0.75
    largest = np.unravel_index(np.abs(expected).argmax(), shape)  # one positive factor of the layer is free
    np.testing.assert_allclose(scores / abs(scores[largest]), expected / abs(expected[largest]), rtol=1e-5)


@pytest.mark.parametrize("power", [-40, -3, 3, 40])
def test_the_unit_of_the_loss_scales_every_score_alike(power: int) -> None:
    evidence, (rows, columns) = torch.randn(6, 10), moments((6, 10))
    unit = 2.0**power
    plain = evidence_scores(torch.ones(6, 10), evidence, rows, columns)
    scaled = evidence_scores(torch.ones(6, 10), unit * evidence, unit**2 * rows, unit**2 * columns)
    torch.testing.assert_close(scaled / unit, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 6)])
def test_the_scores_of_one_ranks_rows_are_those_of_the_whole_layer(rows: slice) -> None:
    evidence, (row, column) = torch.randn(6, 10), moments((6, 10))
    whole = evidence_scores(torch.ones(6, 10), evidence, row, column)
    part = evidence_scores(torch.ones_like(evidence[rows]), evidence[rows], row[rows], column)
    assert torch.equal(part, whole[rows])


def test_zero_rows_columns_and_places_score_zero_and_nothing_is_nan() -> None:
    evidence, (rows, columns) = torch.randn(5, 9), moments((5, 9))
    evidence[1], evidence[:, 4], evidence[0, 0] = 0.0, 0.0, 0.0
    rows[1], columns[4] = 0.0, 0.0
    scores = evidence_scores(torch.ones(5, 9), evidence, rows, columns)
    assert bool(scores.isfinite().all())
    assert torch.equal(scores == 0, evidence == 0)


def test_without_any_moment_no_score_is_positive_or_nan() -> None:
    assert not evidence_scores(torch.ones(3, 4), torch.ones(3, 4), torch.zeros(3), torch.zeros(4)).any()


@pytest.mark.parametrize("least", [1e-12, 1e-30, 1e-44])
def test_moments_of_very_different_size_give_finite_scores(least: float) -> None:
    rows, columns = torch.tensor([1.0, least]), torch.tensor([1.0, 1e-6])
    scores = evidence_scores(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [1e-6, 0.0]]), rows, columns)
    assert bool(scores.isfinite().all())
    assert not scores[:, 1].any()


def flip_threshold(scores: torch.Tensor, count: int) -> float:
    return kth_largest([scores], [count + 1], Gang())[0]


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


def full_sort(scores: torch.Tensor, count: int) -> list[float]:
    return sorted(scores.tolist(), reverse=True)[: count + 1]


@pytest.mark.parametrize("numel", [1, 9, 65_536, 65_537, 150_001])
@pytest.mark.parametrize("count", [0, 1, 7, 300, 4000])
def test_the_largest_scores_are_those_of_a_full_sort(numel: int, count: int) -> None:
    scores = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    values, places = largest(scores, count + 1)
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
    values, places = largest(scores, count + 1)
    assert values.tolist() == full_sort(scores, count)
    assert len(set(places.tolist())) == count + 1


def test_no_scores_at_all_are_zeros() -> None:
    values, places = largest(torch.empty(0), 4)
    assert values.tolist() == [0.0] * 4
    assert places.tolist() == [0] * 4


@given(
    st.lists(st.lists(st.floats(-4, 4, width=32), max_size=30), min_size=1, max_size=4),
    st.lists(st.integers(1, 35), min_size=4, max_size=4),
)
def test_the_kth_largest_of_each_layer_is_that_of_a_sort(layers: list[list[float]], ranks: list[int]) -> None:
    ranks = ranks[: len(layers)]
    found = kth_largest([torch.tensor(values) for values in layers], ranks, Gang())
    for values, k, value in zip(layers, ranks, found, strict=True):
        ordered = sorted((max(0.0, v) for v in values), reverse=True)
        assert value == (ordered[k - 1] if k <= len(ordered) else 0.0)


@pytest.mark.parametrize("value", [2.0**-149, 2.0**-126, 1e-30, 1.0, 3.4e38])
def test_the_kth_largest_is_exact_from_the_smallest_to_the_largest_number(value: float) -> None:
    values = torch.tensor([value, value, 0.0, -value])
    assert kth_largest([values], [2], Gang()) == [float(values[0])]
