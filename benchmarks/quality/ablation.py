"""Owns the laboratory's flip rule: ours, dense, in float32, with every choice as a knob. One instance per layer.

With its defaults it makes nearly the flips of kbop_core.kbop.KBOP (tests/unit/benchmarks/test_quality.py): second
moments are exact here and projected there, evidence is float32 here and bfloat16 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kbop_core.kbop import MIRROR
from kbop_core.schedules import FlipSchedule, MomentumSchedule
from kbop_core.selection import kth_largest
from kbop_core.shard import Gang

Normalisation = Literal["factored", "evidence", "row", "element", "none"]


@dataclass
class ShareRule:
    """Flip the k_t weights whose normalised evidence most wants it.

    Attributes:
        schedule: η over time.
        momentum: constant β of the evidence; None: the product's growing memory.
        first, growth: of that memory.
        moment_decay: decay of the gradient's second moments.
        normalisation: what the evidence is divided by.
        power: p: m / v^p; ½ is the root mean square.
        kept_at_flip: the factor a flip puts on its evidence, −1 … 1: negative mirrors it, 0 forgets it.
        curvature: subtracted from the score, in units of its root mean square over the layer.
        significance: flip only where the evidence is this many standard deviations of its noise away from 0.
        shape: "cosine" (the product's), "linear" or "constant" share over time.
        every: flips of that many steps are made in one, 1: in each.
        phase: which of `every` steps, 0 … every − 1: layers take turns.
    """

    schedule: FlipSchedule
    momentum: float | None = None
    first: float = MomentumSchedule.first
    growth: float = MomentumSchedule.growth
    moment_decay: float = 0.98
    normalisation: Normalisation = "factored"
    power: float = 0.75
    kept_at_flip: float = -MIRROR
    curvature: float = 0.0
    significance: float = 0.0
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    every: int = 1
    phase: int = 0

    def __post_init__(self) -> None:
        self.evidence: Tensor | None = None
        self.rows = self.columns = self.elements = torch.zeros(())
        self.carried = self.weight = 0.0
        self.waiting = 0

    def flips(self, signs_OI: Tensor, grad_OI: Tensor, step: int) -> Tensor:
        """See kbop_core.baselines.flip_rules.Rule."""
        grad = grad_OI.float()
        if self.evidence is None:
            self.evidence = torch.zeros_like(grad)
        self._take_moments(grad, step)
        beta = self._momentum(step)
        self.evidence = torch.lerp(grad, self.evidence, beta)
        self.weight = beta**2 * self.weight + (1.0 - beta) ** 2  # Σ of the squared weights of the average
        scores = signs_OI * self._normalised()
        if self.significance:
            noise = self.weight * self.rows[:, None] * self.columns / (self.rows.mean() + 1e-38)
            scores = torch.where(self.evidence.square() > self.significance**2 * noise, scores, 0.0)
        if self.curvature:
            scores -= self.curvature * scores.square().mean().sqrt()
        flat = scores.reshape(-1)
        self.waiting += self._count(step, flat.numel())
        turn = step % self.every == self.phase or step == self.schedule.steps - 1
        count, self.waiting = (self.waiting, 0) if turn else (0, self.waiting)
        best = flat.topk(min(count + 1, flat.numel())).values
        mask = (
            scores > kth_largest([best], [count + 1], Gang())[0]
            if count
            else torch.zeros_like(scores, dtype=torch.bool)
        )
        self.evidence = torch.where(mask, self.kept_at_flip * self.evidence, self.evidence)
        return mask

    def _momentum(self, step: int) -> float:
        if self.momentum is None:
            return MomentumSchedule(self.first, self.growth).beta(step)
        return self.momentum

    def _take_moments(self, grad: Tensor, step: int) -> None:
        squares = grad.square()
        gain = max(1.0 - self.moment_decay, 1.0 / (step + 1))
        if self.normalisation == "element":
            self.elements = self.elements + gain * (squares - self.elements)
        self.rows = self.rows + gain * (squares.mean(1) - self.rows)
        self.columns = self.columns + gain * (squares.mean(0) - self.columns)

    def _normalised(self) -> Tensor:
        assert self.evidence is not None
        m, tiny = self.evidence, torch.finfo(torch.float32).tiny
        rows, columns = self.rows, self.columns
        if self.normalisation == "evidence":
            squares = m.square()
            rows, columns = squares.mean(1), squares.mean(0)
        if self.normalisation in ("factored", "evidence"):
            return m * (rows + tiny).pow(-self.power)[:, None] * (columns + tiny).pow(-self.power)
        if self.normalisation == "row":
            return m * (rows + tiny).pow(-self.power)[:, None]
        if self.normalisation == "element":
            return m * (self.elements + tiny).pow(-self.power)
        return m  # one factor for the whole layer would not change the order within it

    def _count(self, step: int, weights: int) -> int:
        if self.shape == "cosine":
            return self.schedule.count(step, weights)
        left = 1.0 - step / max(1, self.schedule.steps)
        rise = min(1.0, (step + 1) / max(1, self.schedule.warmup))
        self.carried += weights * self.schedule.peak * rise * (left if self.shape == "linear" else 1.0)
        count = int(self.carried)
        self.carried -= count
        return count
