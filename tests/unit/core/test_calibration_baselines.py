"""One-bit GPTQ and ARB-style refinement: signs and scales of one layer from its inputs' second moment."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbop_core.baselines.arb import arb_layer
from kbop_core.baselines.gptq import gptq_layer
from kbop_core.init.fit import output_error

Fit = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def arb_compensated(weight: Tensor, moment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return arb_layer(weight, moment, groups, compensate=True)


EVERY = pytest.mark.parametrize("fit", [gptq_layer, arb_layer, arb_compensated])


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs of different size."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, generator=rng) @ torch.randn(columns, columns, generator=rng)
    inputs = inputs * torch.logspace(-0.5, 0.5, columns)
    return torch.randn(rows, columns, generator=rng), inputs.t() @ inputs / len(inputs)


def dense(fitted: tuple[Tensor, Tensor]) -> Tensor:
    signs, scales = fitted
    return signs * scales.repeat_interleave(signs.shape[1] // scales.shape[1], dim=1)


def plain(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return torch.where(weight >= 0, 1.0, -1.0), weight.reshape(len(weight), groups, -1).abs().mean(-1)


@EVERY
@pytest.mark.parametrize("level", [0.0, 1.0, 7.0])
@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (12, 1), (130, 2)])
def test_white_inputs_give_plain_signs_and_means(fit: Fit, level: float, columns: int, groups: int) -> None:
    weight = torch.randn(5, columns)
    signs, scales = fit(weight, level * torch.eye(columns), groups)
    assert torch.equal(signs, plain(weight, groups)[0])
    torch.testing.assert_close(scales, plain(weight, groups)[1])


@EVERY
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_shapes_are_those_of_the_rows_given_also_of_none(fit: Fit, rows: int, groups: int) -> None:
    weight, moment = problem(rows, 8, 0)
    copies = weight.clone(), moment.clone()
    signs, scales = fit(weight, moment, groups)
    assert (signs.shape, scales.shape) == ((rows, 8), (rows, groups))
    assert bool((signs.abs() == 1).all() and (scales >= 0).all())
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])


@EVERY
def test_a_weight_that_is_a_transposed_view_gives_the_same(fit: Fit) -> None:
    weight, moment = problem(5, 24, 3)
    assert all(map(torch.equal, fit(weight, moment, 3), fit(weight.t().contiguous().t(), moment, 3)))


@EVERY
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("columns", "groups"), [(96, 4), (129, 1)])
def test_on_correlated_inputs_the_output_error_is_below_plain(fit: Fit, seed: int, columns: int, groups: int) -> None:
    weight, moment = problem(16, columns, seed)
    ours, theirs = (
        output_error(weight, dense(p), moment) for p in (fit(weight, moment, groups), plain(weight, groups))
    )
    assert ours < theirs


@EVERY
def test_rows_of_zeros_dead_inputs_and_rank_one_moments_give_finite_scales(fit: Fit) -> None:
    weight, moment = problem(3, 16, 5)
    weight[1], moment[:, 4], moment[4] = 0.0, 0.0, 0.0
    x = torch.randn(16, 1)
    for seen in (moment, x @ x.t()):
        signs, scales = fit(weight, seen, 2)
        assert bool(scales.isfinite().all())
        assert float(scales[1].abs().max()) == 0.0
        assert bool((signs[1] == 1).all())


@pytest.mark.parametrize(("columns", "groups"), [(6, 2), (70, 1), (140, 2)])
def test_gptq_moves_free_columns_to_the_least_squares_answer_after_each_column(columns: int, groups: int) -> None:
    weight, moment = problem(3, columns, 4)
    damped = (moment + 0.01 * moment.diagonal().mean() * torch.eye(columns)).double()
    current, width = weight.double(), columns // groups
    for j in range(columns):
        if j % width == 0:
            scale = current[:, j : j + width].abs().mean(1)
        wanted = torch.where(current[:, j] >= 0, scale, -scale)
        error, free = current[:, j] - wanted, slice(j + 1, columns)
        answer = torch.linalg.solve(damped[free, free], damped[free, j])
        current[:, j] = wanted
        current[:, free] += error[:, None] * answer
    fitted = dense(gptq_layer(weight, moment, groups))
    torch.testing.assert_close(fitted.double(), current, rtol=1e-3, atol=1e-3)


def test_compensated_arb_moves_free_columns_to_the_least_squares_answer_after_each_group() -> None:
    weight, moment = problem(3, 12, 4)
    damped, here, free = moment + 0.01 * moment.diagonal().mean() * torch.eye(12), slice(0, 4), slice(4, 12)
    signs, scales = arb_layer(weight, moment, 3, compensate=True)
    error = weight[:, here] - signs[:, here] * scales[:, :1]
    moved = weight[:, free] + error @ torch.linalg.solve(damped[free, free], damped[free, here]).t()
    assert torch.equal(signs[:, 4:8], torch.where(moved[:, :4] >= 0, 1.0, -1.0))
    block = moment[4:8, 4:8]
    expected = ((signs[:, 4:8] @ block) * moved[:, :4]).sum(1) / ((signs[:, 4:8] @ block) * signs[:, 4:8]).sum(1)
    torch.testing.assert_close(scales[:, 1], expected.clamp_min(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_arbs_output_error_never_rises_from_round_to_round(groups: int) -> None:
    weight, moment = problem(6, 24, 1)
    errors = [output_error(weight, dense(arb_layer(weight, moment, groups, rounds)), moment) for rounds in range(16)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_arb_without_rounds_is_plain_and_with_any_rounds_it_keeps_plains_signs() -> None:
    weight, moment = problem(6, 24, 2)
    assert all(map(torch.equal, arb_layer(weight, moment, 3, rounds=0), plain(weight, 3)))
    assert torch.equal(arb_layer(weight, moment, 3)[0], plain(weight, 3)[0])


def test_a_singular_moment_without_damping_is_refused_by_gptq() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        gptq_layer(torch.randn(2, 4), torch.ones(4, 4), 1, damping=0.0)
