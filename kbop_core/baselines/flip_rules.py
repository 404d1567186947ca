"""Owns the other latent-free flip rules, each over one layer's dense tensors: Bop, B⊕LD, accumulate–fire–spend, KBOP's.

Refuses to flip: a rule answers which signs flip and changes only its own float32 state, taking for granted that the
caller flips exactly those. One instance per layer. Nothing is packed, sharded or lean; these exist to be compared with.

As in kbop.py, s ∈ {±1}, g = ∂loss/∂s, and a flip s → −s helps to first order where s·g > 0. In all rules a zero
gradient at a weight that never had another flips nothing.

| rule | source | flips where | state after a flip |
|---|---|---|---|
| `Bop` | Helwegen et al. 2019, arXiv 1906.02107 | s·m > τ | kept |
| `Bold` | Nguyen et al. 2024, arXiv 2405.16339 | s·m ≥ 1 | m ← 0 |
| `AccumulateFireSpend` | reported for long ternary pre-training (design notes), no paper | s·e ≥ θ | e ← e − θ s |
| `PaperKBOP` | OpenReview r16HwfP4HA, what is public of it | s·v > mean\\|v\\| + c·std\\|v\\| | kept |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kbop_core.errors import NonFiniteGradient


class Rule(Protocol):
    """Decides which signs of one layer flip; holds what it remembers of that layer's gradients."""

    def flips(self, signs_OI: Tensor, grad_OI: Tensor, step: int) -> Tensor:
        """Take one step's gradient in and say what flips.

        Args:
            signs_OI: ±1 before this step, any floating dtype; not changed.
            grad_OI: ∂loss/∂s of the whole step (micro-steps averaged), any floating dtype; not changed. Unit: loss.
            step: 0 for the first gradient that the rule sees, then one more each time.

        Returns:
            A new bool mask (O, I).

        Raises:
            NonFiniteGradient: NaN or infinity in the gradient; the state is as before.
            ValueError: shapes of signs, gradient and earlier gradients differ.
        """
        ...


class Bop:
    """m ← (1 − γ) m + γ g; flip where |m| > τ and sign(m) = s. m goes on as it was: no reset.

    Args:
        adaptivity: γ, 0 … 1: how fast the average follows. The paper's 1e-4 is for runs of 10⁵ steps and more.
        threshold: τ ≥ 0, unit of g: loss. It is absolute, so it has to be tuned to the layers' gradients.
    """

    def __init__(self, adaptivity: float = 1e-4, threshold: float = 1e-8) -> None:
        self.adaptivity = _legal("adaptivity", adaptivity, 0.0 <= adaptivity <= 1.0, "0 … 1")
        self.threshold = _legal("threshold", threshold, threshold >= 0.0, "≥ 0")
        self.average: Tensor | None = None  # m

    def flips(self, signs_OI: Tensor, grad_OI: Tensor, step: int) -> Tensor:
        """See `Rule.flips`; the step does not matter."""
        grad = _taken(signs_OI, grad_OI, self.average, step)
        self.average = torch.zeros_like(grad) if self.average is None else self.average
        self.average.lerp_(grad, self.adaptivity)
        return signs_OI * self.average > self.threshold


class Bold:
    """m ← β m + η q; flip where s·m ≥ 1, then m ← 0 there; β = share of the layer not flipped in the step before.

    In B⊕LD q counts Boolean votes. Ours are real and tiny, so q = g / RMS(g) over the layer: then η is the vote of a
    typical gradient against the fixed threshold 1 (ours; the paper has no such division). A layer whose gradient is
    zero votes nothing.

    Args:
        rate: η ≥ 0, unit 1.
    """

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = _legal("rate", rate, rate >= 0.0, "≥ 0")
        self.accumulator: Tensor | None = None  # m
        self.kept = 1.0  # β

    def flips(self, signs_OI: Tensor, grad_OI: Tensor, step: int) -> Tensor:
        """See `Rule.flips`; the step does not matter."""
        votes = _over_root_mean_square(_taken(signs_OI, grad_OI, self.accumulator, step))
        self.accumulator = torch.zeros_like(votes) if self.accumulator is None else self.accumulator
        self.accumulator.mul_(self.kept).add_(votes, alpha=self.rate)
        mask = signs_OI * self.accumulator >= 1.0
        self.accumulator.masked_fill_(mask, 0.0)
        self.kept = 1.0 - int(mask.sum()) / mask.numel()
        return mask


@dataclass
class _Integrated:
    """What `AccumulateFireSpend` remembers of one layer."""

    average_OI: Tensor  # m, float32
    energy_OI: Tensor  # e, float32
    row_O: Tensor  # r, float64
    column_I: Tensor  # c, float64

    @classmethod
    def empty(cls, grad_OI: Tensor) -> _Integrated:
        zeros = torch.zeros_like(grad_OI)
        rows, columns = grad_OI.shape
        row_O, column_I = (grad_OI.new_zeros(n, dtype=torch.float64) for n in (rows, columns))
        return cls(zeros, zeros.clone(), row_O, column_I)


class AccumulateFireSpend:
    """Integrate a normalised gradient, fire where it has reached θ, pay θ for each flip.

        m ← 0.9 m + 0.1 g,    r ← 0.98 r + 0.02 mean_j g²,    c ← 0.98 c + 0.02 mean_i g²
        ĝ_ij = m_ij / √(r_i c_j / mean(r)),    e ← λ e + ĝ,    λ = exp(−1/τ)
        fire where s·e ≥ θ;  then e ← e − θ s  (s before the flip)

    m, r and c are divided by 1 − decay^(step+1), as in Adam. r_i c_j / mean(r) is Adafactor's estimate of g²_ij
    (arXiv 1804.04235): unlike KBOP's √(r c) it leaves ĝ without unit, so that θ counts typical gradients.
    What a spend leaves in e still speaks for the flip just made, so that a surplus delays the way back.

    Args:
        threshold: θ > 0, unit 1.
        leak_steps: τ > 0, steps after which an unspent e has fallen to 1/e; infinity: no leak.
        momentum: decay of m, 0 ≤ … < 1.
        moment_decay: decay of r and c, 0 ≤ … < 1.
    """

    def __init__(
        self,
        threshold: float = 16.0,
        leak_steps: float = 1000.0,
        momentum: float = 0.9,
        moment_decay: float = 0.98,
    ) -> None:
        self.threshold = _legal("threshold", threshold, threshold > 0.0, "> 0")
        self.leak = math.exp(-1.0 / _legal("leak_steps", leak_steps, leak_steps > 0.0, "> 0"))
        self.momentum = _legal("momentum", momentum, 0.0 <= momentum < 1.0, "0 ≤ … < 1")
        self.moment_decay = _legal("moment_decay", moment_decay, 0.0 <= moment_decay < 1.0, "0 ≤ … < 1")
        self.state: _Integrated | None = None

    def flips(self, signs_OI: Tensor, grad_OI: Tensor, step: int) -> Tensor:
        """See `Rule.flips`; the step decides the correction of young averages."""
        grad = _taken(signs_OI, grad_OI, self.state.energy_OI if self.state else None, step)
        state = self.state = self.state or _Integrated.empty(grad)
        squares = grad.double().square_()
        state.average_OI.lerp_(grad, 1.0 - self.momentum)
        state.row_O.lerp_(squares.mean(1), 1.0 - self.moment_decay)
        state.column_I.lerp_(squares.mean(0), 1.0 - self.moment_decay)
        state.energy_OI.mul_(self.leak).add_(self._normalised(state, step))
        mask = signs_OI * state.energy_OI >= self.threshold
        state.energy_OI -= self.threshold * signs_OI.float() * mask
        return mask

    def _normalised(self, state: _Integrated, step: int) -> Tensor:
        """ĝ, float32 (O, I); 0 in rows and columns that never had a gradient."""
        tiny = torch.finfo(torch.float64).tiny
        share_O = state.row_O / (state.row_O.mean() + tiny)  # r / mean(r): the correction for youth cancels
        square_I = state.column_I / (1.0 - self.moment_decay ** (step + 1))
        by_row, by_column = (torch.where(t > 0, t.rsqrt(), 0.0) for t in (share_O, square_I))
        scaled = state.average_OI.double() * by_row[:, None] * by_column
        return (scaled / (1.0 - self.momentum ** (step + 1))).float()


class PaperKBOP:
    """v ← β v + (1 − β) g; flip where sign(v) = s and |v| > mean|v| + c·std|v| over the layer. v goes on as it was.

    This is the rule as far as it is public: an average, a threshold made of the mean and the deviation of |v| over
    the layer, and a learning rate λ that sets its rigidity. How λ enters is not public; here it is one number, c,
    which grows as λ falls (c = 1/λ is one reading), and stays constant. Mean and std (of the population) are taken
    in float64, so that a layer of equal |v| flips nothing; nor does a layer of one weight; ties do not flip.

    Args:
        momentum: β, 0 ≤ β < 1.
        deviations: c ≥ 0, unit 1.
    """

    def __init__(self, momentum: float = 0.98, deviations: float = 3.0) -> None:
        self.momentum = _legal("momentum", momentum, 0.0 <= momentum < 1.0, "0 ≤ … < 1")
        self.deviations = _legal("deviations", deviations, deviations >= 0.0, "≥ 0")
        self.average: Tensor | None = None  # v

    def flips(self, signs_OI: Tensor, grad_OI: Tensor, step: int) -> Tensor:
        """See `Rule.flips`; the step does not matter."""
        grad = _taken(signs_OI, grad_OI, self.average, step)
        self.average = torch.zeros_like(grad) if self.average is None else self.average
        self.average.lerp_(grad, 1.0 - self.momentum)
        size = self.average.double().abs()
        threshold = size.mean() + self.deviations * size.std(correction=0)
        return (size > threshold) & (signs_OI * self.average > 0)


def _taken(signs_OI: Tensor, grad_OI: Tensor, state_OI: Tensor | None, step: int) -> Tensor:
    """The gradient in float32 once it is fit to be taken in."""
    shapes = {tuple(t.shape) for t in (signs_OI, grad_OI, state_OI) if t is not None}
    if len(shapes) > 1 or grad_OI.dim() != 2:
        raise ValueError(f"signs, gradient and state must have one shape (O, I); got {sorted(shapes)}")
    if not bool(grad_OI.isfinite().all()):
        raise NonFiniteGradient(
            f"non-finite gradient at step {step}; no sign was flipped in this step",
            "resume from the last checkpoint with smaller learning rates, or look for NaN in the data's loss",
        )
    return grad_OI.float()


def _over_root_mean_square(grad_OI: Tensor) -> Tensor:
    """g / RMS(g), unit 1; zero stays zero. In float64, where no square of a float32 underflows."""
    size = float(grad_OI.double().square_().mean().sqrt())
    return grad_OI / size if size > 0 else grad_OI


def _legal(name: str, value: float, is_legal: bool, legal: str) -> float:
    """The value, if it is legal."""
    if not is_legal:
        raise ValueError(f"{name} is {value}; legal: {legal}")
    return value
