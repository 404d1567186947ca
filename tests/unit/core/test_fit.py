"""The fit of one layer: signs and scales that keep its output."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kbop_core.init.fit import FitEffort, fit_layer, output_error

EFFORT = FitEffort()
#: Enough alternations for a small layer to stop changing.
UNTIL_STILL = FitEffort(rounds=40, sweeps=40)


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs of very different size."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, generator=rng) @ torch.randn(columns, columns, generator=rng)
    inputs = inputs * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=rng), inputs.t() @ inputs / len(inputs)


def damped(moment: Tensor, effort: FitEffort) -> Tensor:
    return moment + effort.damping * moment.diagonal().mean() * torch.eye(len(moment))


def dense(signs: Tensor, scales: Tensor) -> Tensor:
    return signs * scales.repeat_interleave(signs.shape[1] // scales.shape[1], dim=1)


def plain(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return torch.where(weight >= 0, 1.0, -1.0), weight.reshape(len(weight), groups, -1).abs().mean(-1)


@given(rows=st.integers(1, 9), width=st.integers(1, 70), groups=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_fit_never_loses_to_plain_signs_and_means(rows: int, width: int, groups: int, seed: int) -> None:
    weight, moment = problem(rows, width * groups, seed)
    signs, scales = fit_layer(weight, moment, groups, EFFORT)
    target = damped(moment, EFFORT)
    ours, theirs = (output_error(weight, dense(*p), target) for p in ((signs, scales), plain(weight, groups)))
    assert ours <= theirs * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("columns", [64, 129, 172])
def test_on_correlated_inputs_the_fit_is_far_better_than_plain(columns: int) -> None:
    weight, moment = problem(16, columns, 0)
    fitted = output_error(weight, dense(*fit_layer(weight, moment, 1, EFFORT)), moment)
    assert fitted < 0.7 * output_error(weight, dense(*plain(weight, 1)), moment)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_shapes_are_those_of_the_rows_given_also_of_none(rows: int, groups: int) -> None:
    weight, moment = problem(rows, 8, 0)
    signs, scales = fit_layer(weight, moment, groups, EFFORT)
    assert (signs.shape, scales.shape) == ((rows, 8), (rows, groups))
    assert bool((signs.abs() == 1).all() and (scales >= 0).all())


@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (9, 1), (64, 2), (129, 3)])
def test_a_binary_matrix_is_recovered_exactly(columns: int, groups: int) -> None:
    noise, moment = problem(5, columns, 3)
    signs, scales = torch.where(noise >= 0, 1.0, -1.0), torch.rand(5, groups) + 0.5
    fitted_signs, fitted_scales = fit_layer(dense(signs, scales), moment, groups, EFFORT)
    assert torch.equal(fitted_signs, signs)
    torch.testing.assert_close(fitted_scales, scales, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_no_single_flip_improves_what_coordinate_descent_ends_with(seed: int) -> None:
    weight, moment = (t.double() for t in problem(1, 6, seed))
    signs, scales = (t.double() for t in fit_layer(weight.float(), moment.float(), 1, UNTIL_STILL))
    target = damped(moment, UNTIL_STILL)
    losses = {}
    for choice in itertools.product([-1.0, 1.0], repeat=6):
        error = weight - scales * torch.tensor([choice], dtype=torch.float64)
        losses[choice] = float(((error @ target) * error).sum())
    found = tuple(signs[0].tolist())
    flips = [tuple(-s if i == j else s for i, s in enumerate(found)) for j in range(6)]
    assert all(losses[found] <= losses[flip] * (1 + 1e-5) for flip in flips)
    assert losses[found] <= losses[tuple(plain(weight, 1)[0][0].tolist())] * (1 + 1e-5)


def least_squares(weight: Tensor, signs: Tensor, groups: int, target: Tensor) -> Tensor:
    """The best scales of each row for given signs, float64 (O, G), negative ones included."""
    scales = []
    for w, s in zip(weight.double(), signs.double(), strict=True):
        parts = torch.block_diag(*s.view(groups, 1, -1))
        scales.append(torch.linalg.solve(parts @ target @ parts.t(), parts @ target @ w))
    return torch.stack(scales)


@pytest.mark.parametrize("effort", [EFFORT, FitEffort(rounds=1, sweeps=1), FitEffort(rounds=0)])
@pytest.mark.parametrize("groups", [1, 3])
def test_scales_are_the_least_squares_ones_for_the_signs_found(groups: int, effort: FitEffort) -> None:
    weight, moment = problem(4, 90, 1)
    signs, scales = fit_layer(weight, moment, groups, effort)
    expected = least_squares(weight, signs, groups, damped(moment, effort).double())
    torch.testing.assert_close(scales.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_negative_scale_is_folded_into_its_signs() -> None:
    weight, moment = problem(40, 24, 2)
    start = plain(weight, 6)[0]
    best = least_squares(weight, start, 6, damped(moment, EFFORT).double())
    assert bool((best < 0).any())
    signs, scales = fit_layer(weight, moment, 6, FitEffort(rounds=0))
    assert bool((scales >= 0).all())
    torch.testing.assert_close(dense(signs, scales).double(), dense(start.double(), best), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [5, 64, 65, 130])
def test_one_sweep_is_coordinate_descent_one_column_at_a_time(columns: int) -> None:
    weight, moment = problem(3, columns, 4)
    target, start = damped(moment, EFFORT).double(), plain(weight, 1)[0].double()
    current = start * least_squares(weight, start, 1, target)
    for j in range(columns):
        pull = (weight.double() - current) @ target[:, j]
        change = -2 * current[:, j]
        current[:, j] += torch.where(change * (change * target[j, j] - 2 * pull) < 0, change, 0.0)
    signs, _ = fit_layer(weight, moment, 1, FitEffort(rounds=1, sweeps=1))
    assert torch.equal(signs, current.sign().float())
    assert columns < 64 or not torch.equal(signs, start.float())


@pytest.mark.parametrize("groups", [1, 2])
def test_inputs_never_seen_mean_plain_signs_and_means(groups: int) -> None:
    weight = torch.randn(5, 12)
    signs, scales = fit_layer(weight, torch.zeros(12, 12), groups, EFFORT)
    assert torch.equal(signs, plain(weight, groups)[0])
    torch.testing.assert_close(scales, plain(weight, groups)[1])


def test_rows_do_not_interact_so_that_ranks_may_share_them() -> None:
    weight, moment = problem(6, 40, 2)
    whole = fit_layer(weight, moment, 2, EFFORT)
    parts = [fit_layer(w, moment, 2, EFFORT) for w in (weight[:4], weight[4:])]
    assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1], rtol=1e-4, atol=1e-5)


def test_a_row_of_zeros_and_a_dead_input_give_finite_scales() -> None:
    weight, moment = problem(3, 16, 5)
    weight[1], moment[:, 4], moment[4] = 0.0, 0.0, 0.0
    signs, scales = fit_layer(weight, moment, 2, EFFORT)
    assert bool(scales.isfinite().all())
    assert scales[1].abs().max() < 1e-6
    assert signs.shape == (3, 16)


def test_inputs_of_rank_one_still_give_finite_scales_no_worse_than_plain() -> None:
    x, weight = torch.randn(32, 1), torch.randn(4, 32)
    moment = x @ x.t()
    signs, scales = fit_layer(weight, moment, 4, EFFORT)
    target = damped(moment, EFFORT)
    assert bool(scales.isfinite().all())
    assert output_error(weight, dense(signs, scales), target) <= output_error(weight, dense(*plain(weight, 4)), target)


def shifted_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, what the student's layer reads, what the teacher's reads, both (tokens, I); and H and C of them."""
    rng = torch.Generator().manual_seed(seed)
    teacher_inputs = torch.randn(200, 24, generator=rng) @ torch.randn(24, 24, generator=rng)
    inputs = teacher_inputs + 2 * torch.randn(200, 24, generator=rng) @ torch.randn(24, 24, generator=rng)
    moments = torch.stack([inputs.t() @ inputs, inputs.t() @ teacher_inputs]) / 200
    return torch.randn(6, 24, generator=rng), inputs, teacher_inputs, moments


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_fit_lowers_the_distance_to_the_mixed_target(share: float, groups: int) -> None:
    weight, inputs, teacher_inputs, (moment, cross) = shifted_inputs(0)
    target = ((1 - share) * inputs + share * teacher_inputs) @ weight.t()
    effort = FitEffort(damping=0.0, teacher_share=share)
    fitted, start = fit_layer(weight, moment, groups, effort, cross), plain(weight, groups)
    ours, theirs = (float((inputs @ dense(*p).t() - target).square().sum()) for p in (fitted, start))
    assert ours < 0.8 * theirs


def test_each_share_is_best_at_its_own_target() -> None:
    weight, inputs, teacher_inputs, (moment, cross) = shifted_inputs(1)
    fits = [dense(*fit_layer(weight, moment, 1, FitEffort(teacher_share=share), cross)) for share in (0.0, 1.0)]
    own, teachers = (
        [float((inputs @ f.t() - x @ weight.t()).square().sum()) for f in fits] for x in (inputs, teacher_inputs)
    )
    assert own[0] < own[1]
    assert teachers[1] < teachers[0]


def test_without_a_cross_moment_teacher_and_student_read_the_same() -> None:
    weight, moment = problem(4, 24, 7)
    alone = fit_layer(weight, moment, 2, EFFORT)
    given_twice = fit_layer(weight, moment, 2, EFFORT, moment.clone())
    assert torch.equal(alone[0], given_twice[0])
    assert torch.equal(alone[1], given_twice[1])


def test_the_fit_changes_neither_weight_nor_moment() -> None:
    weight, moment = problem(4, 16, 6)
    copies = weight.clone(), moment.clone()
    fit_layer(weight, moment, 2, EFFORT)
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])


def test_output_error_is_the_relative_error_on_real_inputs() -> None:
    x, weight, other = torch.randn(50, 9), torch.randn(4, 9), torch.randn(4, 9)
    wanted, got = x @ weight.t(), x @ other.t()
    expected = float((wanted - got).square().sum() / wanted.square().sum())
    assert output_error(weight, other, x.t() @ x) == pytest.approx(expected, rel=1e-4)
