"""The other latent-free flip rules, step by step by hand, and their edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbop_core.baselines.flip_rules import AccumulateFireSpend, Bold, Bop, PaperKBOP, Rule
from kbop_core.errors import NonFiniteGradient

MAKERS: list[Callable[[], Rule]] = [Bop, Bold, AccumulateFireSpend, PaperKBOP]
EVERY = pytest.mark.parametrize("make", MAKERS)
#: Ready to flip at the first real gradient.
EAGER: list[Callable[[], Rule]] = [
    lambda: Bop(0.5, 0.0),
    lambda: Bold(1.0),
    lambda: AccumulateFireSpend(0.5),
    lambda: PaperKBOP(0.5, 0.0),
]


def run(rule: Rule, signs: Tensor, gradients: list[list[float]]) -> tuple[Tensor, list[list[bool]]]:
    """Signs at the end and the masks of each step, flipped as they say; one row."""
    masks = []
    for step, gradient in enumerate(gradients):
        mask = rule.flips(signs, torch.tensor([gradient]), step)
        signs = torch.where(mask, -signs, signs)
        masks.append(mask[0].tolist())
    return signs, masks


def test_bop_flips_where_the_average_exceeds_the_threshold_towards_the_sign() -> None:
    # m: (.5, .5, -.5, .25), then (.75, .75, -.75, .125)
    signs, masks = run(
        Bop(0.5, 0.6), torch.tensor([[1.0, -1.0, -1.0, 1.0]]), [[1.0, 1.0, -1.0, 0.5], [1.0, 1.0, -1.0, 0.0]]
    )
    assert masks == [[False] * 4, [True, False, True, False]]
    assert signs.tolist() == [[-1.0, -1.0, 1.0, 1.0]]


def test_bop_keeps_its_average_at_a_flip_and_does_not_flip_at_the_threshold_itself() -> None:
    rule = Bop(0.5, 0.5)
    assert run(rule, torch.ones(1, 1), [[1.0], [1.0]])[1] == [[False], [True]]
    assert rule.average.tolist() == [[0.75]]


def test_bold_fires_at_one_forgets_there_and_then_remembers_less_elsewhere() -> None:
    rule, signs = Bold(0.5), torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    gradient = [4.0, 2.0, 2.0, 2.0 * math.sqrt(2)]  # mean square 8: votes √2, ½√2, ½√2, 1
    first = rule.flips(signs, torch.tensor([gradient]), 0)
    assert not bool(first.any())
    second = rule.flips(signs, torch.tensor([gradient]), 1)
    assert second.tolist() == [[True, False, False, False]]
    assert rule.kept == 0.75
    torch.testing.assert_close(rule.accumulator, torch.tensor([[0.0, math.sqrt(0.5), math.sqrt(0.5), 1.0]]))
    rule.flips(torch.where(second, -signs, signs), torch.zeros(1, 4), 2)
    torch.testing.assert_close(rule.accumulator, 0.75 * torch.tensor([[0.0, math.sqrt(0.5), math.sqrt(0.5), 1.0]]))


def test_a_vote_that_reaches_exactly_one_is_enough_for_bold() -> None:
    assert Bold(1.0).flips(torch.ones(1, 2), torch.full((1, 2), 0.25), 0).tolist() == [[True, True]]


def test_fire_and_spend_counts_typical_gradients_and_pays_the_threshold() -> None:
    # One weight, equal gradients: the corrected averages are g and g², so ĝ = 1 in every step.
    leak, rule = math.exp(-1 / 10), AccumulateFireSpend(threshold=2.5, leak_steps=10)
    energy, signs = 0.0, torch.ones(1, 1)
    for step in range(12):
        mask = rule.flips(signs, torch.full((1, 1), 3.0), step)
        energy = leak * energy + 1.0
        fires = float(signs) * energy >= 2.5
        energy -= 2.5 * float(signs) * fires
        assert bool(mask) == fires
        torch.testing.assert_close(rule.state.energy_OI, torch.tensor([[energy]]))
        signs = torch.where(mask, -signs, signs)
    assert float(signs) == -1.0


def test_fire_and_spend_normalises_by_row_and_column() -> None:
    sizes = torch.tensor([1e-6, 1.0, 1e3])[:, None] * torch.tensor([1.0, 1e-2, 5.0, 1e4])
    rule = AccumulateFireSpend()
    rule.flips(torch.ones(3, 4), -sizes, 0)
    torch.testing.assert_close(rule.state.energy_OI, torch.full((3, 4), -1.0))


def test_the_papers_rule_flips_above_mean_plus_deviations_where_the_sign_agrees() -> None:
    # |v| = (1, 1, 1, 5)/2: mean 1, std √¾ = 0.866
    for deviations, flips in ((1.7, True), (1.8, False)):
        rule = PaperKBOP(momentum=0.5, deviations=deviations)
        assert run(rule, torch.tensor([[1.0, 1.0, 1.0, -1.0]]), [[1.0, 1.0, 1.0, -5.0]])[1] == [[False] * 3 + [flips]]
    against = PaperKBOP(momentum=0.5, deviations=1.0)
    assert not bool(against.flips(torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, -5.0]]), 0).any())


@pytest.mark.parametrize("columns", [1, 2, 7, 129])
@pytest.mark.parametrize("deviations", [0.0, 2.0])
def test_equal_evidence_ties_with_its_mean_and_does_not_flip_in_the_papers_rule(
    columns: int, deviations: float
) -> None:
    rule = PaperKBOP(0.7, deviations)
    assert not bool(rule.flips(torch.ones(3, columns), torch.full((3, columns), 0.1), 0).any())


@pytest.mark.parametrize("make", EAGER)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 1), (3, 5)])
def test_a_zero_gradient_flips_nothing_and_leaves_no_nan_behind(
    make: Callable[[], Rule], shape: tuple[int, int]
) -> None:
    rule, signs = make(), torch.where(torch.randn(shape) >= 0, 1.0, -1.0)
    for step in range(3):
        assert not bool(rule.flips(signs, torch.zeros(shape), step).any())
    agreeing = signs * torch.linspace(1, 2, signs.numel()).view(shape)
    later = rule.flips(signs, agreeing, 3)
    assert bool(later.any()) or (isinstance(rule, PaperKBOP) and shape == (1, 1))


@pytest.mark.parametrize("make", EAGER)
def test_a_gradient_against_every_sign_flips_nothing(make: Callable[[], Rule]) -> None:
    rule, signs = make(), torch.where(torch.randn(4, 9) >= 0, 1.0, -1.0)
    assert not any(bool(rule.flips(signs, -signs * torch.rand(4, 9), step).any()) for step in range(5))


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
@pytest.mark.parametrize("make", EAGER[1:])
def test_all_but_bop_do_not_depend_on_the_unit_of_the_loss(make: Callable[[], Rule], factor: float) -> None:
    rules, signs = (make(), make()), torch.where(torch.randn(6, 10) >= 0, 1.0, -1.0)
    for step in range(5):
        grad = torch.randn(6, 10)
        assert torch.equal(*(r.flips(signs, g, step) for r, g in zip(rules, (grad, grad * factor), strict=True)))


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_is_refused_before_anything_changes(make: Callable[[], Rule], bad: float) -> None:
    rules, signs = (make(), make()), torch.ones(2, 3)
    grads, broken = torch.randn(2, 2, 3), torch.zeros(2, 3)
    broken[1, 1] = bad
    masks = [rule.flips(signs, grads[0], 0) for rule in rules]
    with pytest.raises(NonFiniteGradient, match="at step 1"):
        rules[0].flips(signs, broken, 1)
    masks += [rule.flips(signs, 100 * grads[1], 1) for rule in rules]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])


@EVERY
def test_one_instance_serves_one_layer(make: Callable[[], Rule]) -> None:
    rule = make()
    rule.flips(torch.ones(2, 3), torch.randn(2, 3), 0)
    with pytest.raises(ValueError, match="one shape"):
        rule.flips(torch.ones(3, 2), torch.randn(3, 2), 1)


@EVERY
def test_neither_signs_nor_gradient_are_changed_and_low_precision_is_taken(make: Callable[[], Rule]) -> None:
    signs, grad = torch.ones(4, 4, dtype=torch.bfloat16), torch.randn(4, 4, dtype=torch.bfloat16)
    copies = signs.clone(), grad.clone()
    mask = make().flips(signs, grad, 0)
    assert (mask.dtype, mask.shape) == (torch.bool, (4, 4))
    assert torch.equal(signs, copies[0])
    assert torch.equal(grad, copies[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bop(adaptivity=1.5),
        lambda: Bop(threshold=-1.0),
        lambda: Bold(math.nan),
        lambda: AccumulateFireSpend(threshold=0.0),
        lambda: AccumulateFireSpend(leak_steps=0.0),
        lambda: AccumulateFireSpend(momentum=1.0),
        lambda: PaperKBOP(momentum=1.0),
        lambda: PaperKBOP(deviations=-0.5),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Rule]) -> None:
    with pytest.raises(ValueError, match="legal: "):
        make()
