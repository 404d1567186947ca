"""What the rule is for: problems whose best signs are known, and that it ends there as η → 0 and β → 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbop_core.evidence import EvidenceKind
from kbop_core.schedules import FlipSchedule, warmup_cosine

ROWS, COLUMNS = 16, 33
every_kind = pytest.mark.parametrize("kind", ["bfloat16", "int8"])
five_seeds = pytest.mark.parametrize("seed", range(5))


def annealed(steps: int) -> FlipSchedule:
    """A peak at which the whole run may flip each weight ten times: half start wrong, and most flips are taken back."""
    total = sum(warmup_cosine(t, steps, steps // 20) for t in range(steps))
    return FlipSchedule(10.0 / total, steps, steps // 20)


def random_signs(rng: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (ROWS, COLUMNS), generator=rng) * 2.0 - 1.0


def wrong(signs: Tensor, best: Tensor) -> float:
    return float((signs != best).float().mean())


@pytest.mark.parametrize(("kind", "spread"), [("bfloat16", 1.0), ("int8", 0.25)])
@five_seeds
def test_a_noisy_separable_quadratic_ends_at_its_optimum_but_for_the_last_trials(
    learner: Callable, seed: int, kind: EvidenceKind, spread: float
) -> None:
    """½ Σ h (a s − w)², |w| > a, with noise as large as a flip's effect, and h, a unlike between rows and columns.

    A flip is a trial until the next gradients confirm it; the last ones may end untaken back: under 1 % of the signs.
    int8 needs columns of like size: what is below 1/254 of the largest of 64 neighbours is rounded away.
    """
    rng = torch.Generator().manual_seed(seed)
    best = random_signs(rng)
    h, a = (
        torch.exp(torch.randn(ROWS, 1, generator=rng)) * torch.exp(spread * torch.randn(COLUMNS, generator=rng))
        for _ in range(2)
    )
    w = a * best * (1.3 + 0.7 * torch.rand(ROWS, COLUMNS, generator=rng))
    subject = learner(ROWS, COLUMNS, annealed(800), seed=seed + 100, evidence=kind)
    assert wrong(subject.layer.signs(), best) > 0.4
    for _ in range(800):
        noise = a * torch.randn(ROWS, COLUMNS, generator=rng)
        subject.step(h * a * (a * subject.layer.signs() - w + noise))
    assert wrong(subject.layer.signs(), best) < 0.01


@five_seeds
def test_annealed_flips_reach_the_optimum_of_a_convex_quadratic(learner: Callable, seed: int) -> None:
    """f(S) = ½ tr((S−T) A (S−T)ᵀ) − ⟨C, S⟩, A positive definite, C of T's signs: T is the only minimum."""
    rng = torch.Generator().manual_seed(seed)
    best, inputs = random_signs(rng), torch.randn(132, COLUMNS, generator=rng)
    curvature, pull = inputs.t() @ inputs / 132, 0.3 * best * (torch.rand(ROWS, COLUMNS, generator=rng) + 0.5)
    subject = learner(ROWS, COLUMNS, FlipSchedule(0.005, 600, 10), seed=seed + 100, momentum=0.9)
    assert wrong(subject.layer.signs(), best) > 0.4
    for _ in range(600):
        subject.step((subject.layer.signs() - best) @ curvature - pull)
    assert torch.equal(subject.layer.signs(), best)


@every_kind
@five_seeds
def test_a_student_finds_its_teachers_signs_from_noisy_labels_of_correlated_inputs(
    learner: Callable, seed: int, kind: EvidenceKind
) -> None:
    """y = x Tᵀ + noise as large as that: the best signs are T's; neighbouring inputs have correlation 0.8."""
    rng, places = torch.Generator().manual_seed(seed), torch.arange(COLUMNS)
    best, mix = random_signs(rng), torch.linalg.cholesky(0.8 ** (places[:, None] - places).abs()).t()
    subject = learner(ROWS, COLUMNS, annealed(600), seed=seed + 100, evidence=kind)
    for _ in range(600):
        x = torch.randn(64, COLUMNS, generator=rng) @ mix
        error = x @ (subject.layer.signs() - best).t() + COLUMNS**0.5 * torch.randn(64, ROWS, generator=rng)
        subject.step(error.t() @ x / 64)
    assert wrong(subject.layer.signs(), best) < 0.02
