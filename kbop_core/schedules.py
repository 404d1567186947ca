"""Owns how KBOP's numbers change over a run: the flips' learning rate, the evidence's momentum, warm-up and cosine.

Refuses to know gradients or signs (kbop.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

#: Largest β: beyond, what a gradient adds is less than half the last digit of a bfloat16 average of noise.
MOST_MOMENTUM = 0.9999
#: Peak share of a layer's weights flipped in a step: the flips' default learning rate. One number for all models and
#: lengths (docs/quality.md).
FLIP_RATE = 0.004


@dataclass(frozen=True)
class MomentumSchedule:
    """β over time: the evidence remembers the last `first` + `growth`·t steps.

    Attributes:
        first: w₀, steps remembered at the start, ≥ 1.
        growth: c, how much longer the memory gets with each step, 0 … 1; 0 keeps β constant.
    """

    first: float = 20.0
    growth: float = 0.2

    def __post_init__(self) -> None:
        if not 1.0 <= self.first <= 1.0 / (1.0 - MOST_MOMENTUM) + 1.0:
            raise ValueError(f"momentum remembers {self.first} steps; legal: 1 … {1.0 / (1.0 - MOST_MOMENTUM):.0f}")
        if not 0.0 <= self.growth <= 1.0:
            raise ValueError(f"memory is {self.growth}; it is a share of the steps done, 0 … 1")

    @classmethod
    def constant(cls, beta: float) -> MomentumSchedule:
        """The same β at all steps, 0 ≤ β ≤ MOST_MOMENTUM."""
        if not 0.0 <= beta <= MOST_MOMENTUM:
            raise ValueError(f"momentum is {beta}; legal: 0 ≤ momentum ≤ {MOST_MOMENTUM}")
        return cls(1.0 / (1.0 - beta), 0.0)

    def beta(self, step: int) -> float:
        """β_t at a step, 0 ≤ step."""
        return min(1.0 - 1.0 / (self.first + self.growth * step), MOST_MOMENTUM)


@dataclass(frozen=True)
class FlipSchedule:
    """The flips' learning rate over time: linear warm-up, then cosine to zero.

    Attributes:
        peak: η, largest share of a layer's weights flipped in one step, 0 … 0.5.
        steps: length of the run.
        warmup: steps of the linear rise.
    """

    peak: float
    steps: int
    warmup: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.peak <= 0.5:
            raise ValueError(f"flip_rate is {self.peak}; it is a share of the weights per step, 0 … 0.5")

    def share(self, step: int) -> float:
        """η at a step, 0 ≤ step; 0 beyond the end."""
        return self.peak * warmup_cosine(step, self.steps, self.warmup)

    @cached_property
    def _spent(self) -> tuple[float, ...]:
        """H(0) … H(steps)."""
        return tuple(accumulate((self.share(t) for t in range(self.steps)), initial=0.0))

    def count(self, step: int, weights: int) -> int:
        """k_t: flips allowed in a layer of `weights` weights; fractions are carried from step to step."""
        if step >= self.steps:
            return 0
        return math.floor(weights * self._spent[step + 1]) - math.floor(weights * self._spent[step])


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor in (0, 1]: linear over the first `warmup` steps, then cosine to 0 at `steps`."""
    if step >= steps:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup + 1) / max(1, steps - warmup + 1)))
